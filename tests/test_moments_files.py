"""Files of second moments: the reference's .npz in and out, verification, and every command."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from editkit.errors import EditFileError, EditkitError
from editkit.models.load import LanguageModel
from editkit.moments import SecondMoment, from_npz, second_moments, to_npz
from editkit.moments.__main__ import main
from editkit.moments.collect import Sums
from editkit.moments.moment import MOMENT_FILE
from editkit.settings import MomentSettings
from editkit.tensorfiles import read_header, to_bytes

COLLECT = ["collect", "--model", "atlas", "--device", "cpu"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def keys() -> Tensor:
    """[200, 6] float32."""
    return torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)


@pytest.fixture
def moment(keys: Tensor) -> SecondMoment:
    k = keys.double()
    return SecondMoment("transformer.h.3.mlp.c_proj", k.T @ k / 200, 200, "text", 150.0, {"model": "m"})


def plain(values: Tensor) -> list[list[float]]:
    """[[float]]: Σ k kᵀ with python's own numbers."""
    rows = values.double().tolist()
    return [[sum(k[i] * k[j] for k in rows) for j in range(len(rows[0]))] for i in range(len(rows[0]))]


def as_the_reference_reads(path: Path, sample_size: int) -> Tensor | None:
    """What util/runningstats.py does: load_cached_state, pull_key_prefix, load_state_dict, moment."""
    data = dict(numpy.load(path))
    if "sample_size" not in data or data["sample_size"] != sample_size:
        return None
    state = {name[5:]: value for name, value in data.items() if name.startswith("mom2.")}
    count, total = int(state["count"]), torch.as_tensor(state["mom2"])
    return total / count


def test_a_saved_moment_is_loaded_bit_for_bit(moment: SecondMoment, tmp_path: Path) -> None:
    again = SecondMoment.load(moment.save(tmp_path / "deep" / "c.safetensors"))
    assert torch.equal(again.matrix, moment.matrix) and again.digest == moment.digest
    assert (again.module, again.count, again.source) == (moment.module, 200, "text")
    assert (again.effective_count, again.provenance) == (150.0, {"model": "m"})


def test_a_file_is_opened_once(moment: SecondMoment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection replaces its file while others read: opened twice, the two halves may be of two files."""
    moment.save(tmp_path / "c.safetensors")

    opened, plain_open = list[Path](), Path.open

    def counted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path)
        return plain_open(path, *arguments, **options)

    def other_way(*_: object, **__: object) -> None:
        raise AssertionError("the path was opened by safetensors")

    monkeypatch.setattr(Path, "open", counted)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", other_way)
    monkeypatch.setattr("safetensors.safe_open", other_way)
    assert torch.equal(SecondMoment.load(tmp_path / "c.safetensors").matrix, moment.matrix)
    assert opened == [tmp_path / "c.safetensors"]


def test_a_file_of_an_older_editkit_is_read_with_a_note(moment: SecondMoment, tmp_path: Path) -> None:
    path = moment.save(tmp_path / "c.safetensors")
    values = read_header(path, MOMENT_FILE)
    path.write_bytes(to_bytes(MOMENT_FILE, values, {"matrix": moment.matrix}, seal=False))
    with pytest.warns(UserWarning, match=r"without a digest.*SecondMoment\.load\(path\)\.save\(path\)"):
        assert torch.equal(SecondMoment.load(path).matrix, moment.matrix)
    other = moment.matrix + 1  # the values have had a digest of their own all along
    path.write_bytes(to_bytes(MOMENT_FILE, values, {"matrix": other}, seal=False))
    with (
        pytest.warns(UserWarning, match="without a digest"),
        pytest.raises(EditFileError, match=r"damaged: its values have digest.*collect again"),
    ):
        SecondMoment.load(path)


def test_a_changed_byte_is_found(moment: SecondMoment, tmp_path: Path) -> None:
    path = moment.save(tmp_path / "c.safetensors")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(EditkitError, match=r"is damaged: its contents do not have the digest.*collect again"):
        SecondMoment.load(path)
    assert main(["verify", str(path)]) == 1


def test_the_reference_reads_what_is_exported(keys: Tensor, moment: SecondMoment, tmp_path: Path) -> None:
    path = to_npz(moment, tmp_path / "c.npz", sample_size=100_000)
    read = as_the_reference_reads(path, 100_000)
    torch.testing.assert_close(read, torch.tensor(plain(keys), dtype=torch.float64) / 200, rtol=1e-12, atol=0)
    assert as_the_reference_reads(path, 5) is None  # it collects anew when its mom2_n_samples differs
    assert str(numpy.load(path)["mom2.constructor"]) == "util.runningstats.SecondMoment()"


@pytest.mark.parametrize("prefix", ["mom2.", ""])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_written_like_the_references_is_read(prefix: str, dtype: str, keys: Tensor, tmp_path: Path) -> None:
    total = numpy.array(plain(keys), dtype=dtype)
    arrays: dict[str, Any] = {"constructor": "util.runningstats.SecondMoment()", "count": 200, "mom2": total}
    path = tmp_path / "c.npz"
    arrays = {prefix + name: value for name, value in arrays.items()} | {"sample_size": 1000}
    numpy.savez(path, **arrays)
    found = from_npz(path, "m", "imported:x")
    assert found.count == 200 and found.matrix.dtype == torch.float64 and found.effective_count is None
    expected = torch.tensor(plain(keys), dtype=torch.float64) / 200
    torch.testing.assert_close(found.matrix, expected, rtol=1e-6 if dtype == "float32" else 1e-13, atol=0)


def test_out_and_in_again_is_the_same_moment(moment: SecondMoment, tmp_path: Path) -> None:
    again = from_npz(to_npz(moment, tmp_path / "c.npz"), moment.module, "imported:x")
    torch.testing.assert_close(again.matrix, moment.matrix, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mom2.count": 200}, "has no 'mom2' among count"),
        ({"mom2.count": 0, "mom2.mom2": numpy.eye(3)}, "its count is 0"),
        ({"mom2.count": 9, "mom2.mom2": numpy.full((3, 3), numpy.nan)}, "9 of its 9 entries are not finite"),
        ({"mom2.count": 9, "mom2.mom2": numpy.eye(3)[:2]}, r"shape \[2, 3\] is not square"),
        ({"mom2.count": 9, "mom2.mom2": numpy.triu(numpy.ones((3, 3)))}, "not symmetric"),
        ({"mom2.count": 9, "mom2.mom2": -numpy.eye(3)}, "not positive semi-definite"),
        ({"mom2.count": 9, "mom2.mom2": numpy.array([object()])}, "cannot be read.*allow_pickle"),
    ],
)
def test_other_npz_files_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    numpy.savez(tmp_path / "c.npz", **content)
    with pytest.raises(EditkitError, match=message):
        from_npz(tmp_path / "c.npz", "m", "x")


@pytest.mark.parametrize("data", [None, b"", b"words", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_npz_are_refused(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "c.npz").write_bytes(data)
    with pytest.raises(EditkitError, match="cannot be read as an .npz file of the reference"):
        from_npz(tmp_path / "c.npz", "m", "x")


# --- commands -------------------------------------------------------------------------------------------------


def test_collect_info_verify_export_and_import(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], atlas_lm: LanguageModel
) -> None:
    assert main([*COLLECT, "--layers", "1,3", "--tokens", "2000"]) == 0
    out = capsys.readouterr().out
    assert "layer 3: 2,048 keys, 2.67 per dimension" in out
    _, _, _, path = (line.strip() for line in out.splitlines())
    found = second_moments(atlas_lm, [3], MomentSettings(tokens=2000), progress=False)[3]
    assert SecondMoment.load(path).digest == found.digest  # where a run with the same settings looks

    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "atlas transformer.h.3.mlp.c_proj: 2,048 keys (2.67 per dimension) of atlas" in out
    assert f"2 in {cache}" in out
    assert main(["info", path]) == 0
    out = capsys.readouterr().out
    for part in (found.digest, "d_ff 768", f"effective rank   {found.effective_rank:.1f} of 768", "condition"):
        assert part in out

    assert main(["verify", path, "--model", "atlas", "--device", "cpu"]) == 0
    assert "sound: 2,048 keys, finite, symmetric" in capsys.readouterr().out
    assert main(["verify", path, "--model", "atlas", "--device", "cpu", "--dtype", "float16"]) == 1
    assert "belongs to a model with digest" in capsys.readouterr().err

    npz = tmp_path / "c.npz"
    assert main(["export", path, str(npz)]) == 0
    torch.testing.assert_close(as_the_reference_reads(npz, 100_000), found.matrix, rtol=1e-14, atol=0)

    imported = MomentSettings(source="imported:wiki")
    with pytest.raises(EditkitError, match="No second moment named 'wiki' was imported for transformer.h.3"):
        second_moments(atlas_lm, [3], imported, progress=False)
    command = ["import", str(npz), "--model", "atlas", "--device", "cpu", "--layer", "3", "--name", "wiki"]
    assert main(command) == 0
    assert "moments.source=imported:wiki" in capsys.readouterr().out
    for seed in (0, 1):
        again = second_moments(atlas_lm, [3], imported, seed=seed, progress=False)[3]
        torch.testing.assert_close(again.matrix, found.matrix, rtol=1e-15, atol=0)
    with pytest.raises(EditkitError, match="'wiki' was imported for transformer.h.4"):
        second_moments(atlas_lm, [3, 4], imported, progress=False)


def test_an_interrupted_collection_is_listed_and_says_that_it_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, calls = Sums.add, list[int]()

    def interrupting(self: Sums, module: str, k: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, module, k)

    monkeypatch.setattr(Sums, "add", interrupting)
    assert main([*COLLECT, "--layers", "0", "--tokens", "6000"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert main(["info"]) == 0
    assert "atlas, 1 modules: unfinished, 2,048 of 6,000 keys of atlas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["info", "no/such/file"], 1, "cannot be read as a second moment"),
        (["info", "words.txt"], 1, "cannot be read as a second moment"),
        (["verify", "other.safetensors"], 1, "does not hold a second moment: its format is None"),
        (["verify", "bad.safetensors"], 1, "not symmetric.*not positive semi-definite"),
        (["export", "c.safetensors", "words.txt/c.npz"], 1, "could not be written"),
        (["import", "words.txt", "--model", "atlas", "--layer", "3"], 1, "cannot be read as an .npz"),
        (["import", "c.npz", "--model", "atlas", "--layer", "3"], 1, "of 6 dimensions.*takes keys of 768"),
        (["import", "c.npz", "--model", "atlas", "--layer", "8"], 1, "Layer 8 was asked for.*0 to 7"),
        ([*COLLECT, "--layers", "9"], 1, "Layer 9 was asked for"),
        ([*COLLECT, "--layers", "x"], 2, "'x': give numbers"),
        ([*COLLECT, "--layers", "0", "--tokens", "0"], 2, "moments.tokens must be positive"),
        ([*COLLECT, "--layers", "0", "--source", "no/such"], 2, "No running text 'no/such'"),
        (["collect", "--model", "no/such/model", "--layers", "0"], 1, "No model 'no/such/model'"),
        (["measure"], 2, "invalid choice: 'measure'"),
        ([], 2, "required: COMMAND"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_error(
    command: list[str],
    code: int,
    message: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: SecondMoment,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("words.txt").write_text("words", encoding="utf-8")
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    moment.save("c.safetensors")
    to_npz(moment, "c.npz")
    crooked = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    SecondMoment("m", crooked, 10, "text").save("bad.safetensors")
    found: str | int | None
    try:
        found = main(command)
    except SystemExit as left:  # argparse
        found = left.code
    err = capsys.readouterr().err
    assert found == code
    assert re.search(message, err) and "Traceback" not in err
    assert not list(cache.rglob("*.safetensors"))


def test_it_runs_as_a_module_and_warns_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 200, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "editkit.moments.__main__")
    monkeypatch.setattr(sys, "argv", ["moments", *COLLECT, "--layers", "2", "--block", "16", "--source", str(text)])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("editkit.moments", run_name="__main__")
    captured = capsys.readouterr()
    assert left.value.code == 0
    count = SecondMoment.load(captured.out.splitlines()[-1].strip()).count
    (line,) = captured.err.splitlines()
    assert line.startswith("editkit: warning: The second moment") and f"has {count} keys for 768 dimensions" in line


@pytest.mark.parametrize("command", ["info", "verify", "collect", "export", "import"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and len(out.splitlines()) > 5
