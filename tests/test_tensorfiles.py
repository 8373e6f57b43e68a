"""Files that know themselves: what is written is read again, and damage is one clear error, never other values."""

import json
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from editkit.errors import EditFileError
from editkit.models.load import LanguageModel
from editkit.models.snapshot import same_bits
from editkit.tensorfiles import (
    DTYPES,
    FileKind,
    contents_digest,
    read_header,
    read_tensors,
    to_bytes,
    write_tensors,
)
from tests.scripts import script

KIND = FileKind("test-kind/1", "a test", {"name": (str,), "more": (dict,)}, "Write it again.", "Tests do.", "again")
VALUES: dict[str, Any] = {"name": "Łódź \ud800", "more": {"b": [1, 0.1, None, float("inf")], "a": {"x": True}}}


def every_dtype() -> dict[str, Tensor]:
    """A tensor of each dtype and of unusual shapes."""
    tensors = {code: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for code, (name, _) in DTYPES.items()}
    return tensors | {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "turned": torch.randn(2, 3).T}


def test_a_file_has_the_bytes_of_safetensors_own_writer(tmp_path: Path) -> None:
    """Every dtype, odd names, a scalar, an empty one, one that is not contiguous; and no tensor at all."""
    for tensors in (every_dtype() | {'ü\n"\x7f/\u2028': torch.ones(1), "F32b": torch.zeros(3)}, {}):
        written = write_tensors(tmp_path / "file", KIND, VALUES, tensors).read_bytes()
        with safetensors.safe_open(tmp_path / "file", "pt") as file:
            metadata = file.metadata()
        theirs = safetensors.torch.save({name: each.contiguous() for name, each in tensors.items()}, metadata)
        assert written == to_bytes(KIND, VALUES, tensors) == theirs


def test_a_file_may_be_read_by_whom_the_umask_lets_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    """A cache of second moments is shared; safetensors makes its files for their owner alone."""
    (tmp_path / "plain").write_bytes(b"")
    write_tensors(tmp_path / "file", KIND, VALUES, every_dtype())
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "file"}


@pytest.fixture(params=["read", "mapped"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tensors are read from the file, or the file is their memory."""
    monkeypatch.setattr("editkit.tensorfiles.MAPPED", {"read": 2**60, "mapped": 1}[request.param])
    return str(request.param)


def test_what_is_written_to_a_mapped_tensor_stays_out_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editkit.tensorfiles.MAPPED", 1)
    path = write_tensors(tmp_path / "a", KIND, VALUES, {"x": torch.ones(1000)})
    before = path.read_bytes()
    tensor = read_tensors(path, KIND)[1]["x"]
    tensor.zero_()
    assert path.read_bytes() == before and tensor.sum() == 0
    write_tensors(path, KIND, VALUES, {"x": torch.full((1000,), 2.0)})  # another file in its place
    assert tensor.sum() == 0


@pytest.mark.usefixtures("either_way")
def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "new" / "a", KIND, VALUES, every_dtype())
    values, tensors = read_tensors(path, KIND)
    assert values == VALUES == read_header(path, KIND)
    assert tensors.keys() == every_dtype().keys()
    for name, tensor in every_dtype().items():
        if name != "turned":  # random
            assert same_bits(tensors[name], tensor)
    assert path.read_bytes() == to_bytes(KIND, values, tensors)


def test_safetensors_reads_the_same_tensors(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a", KIND, VALUES, every_dtype())
    ours, theirs = read_tensors(path, KIND)[1], safetensors.torch.load_file(path)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_the_digest_does_not_depend_on_order() -> None:
    tensors: dict[str, list[Any]] = {"a": ["F32", [2], "00"], "b": ["F32", [2], "11"]}
    turned = dict(reversed(tensors.items()))
    assert contents_digest({"x": 1, "y": 2}, tensors) == contents_digest({"y": 2, "x": 1}, turned)
    exchanged = {"a": tensors["b"], "b": tensors["a"]}
    others: list[tuple[dict[str, Any], dict[str, list[Any]]]] = [
        ({"x": 1, "y": 2}, tensors),
        ({"x": 1, "y": 3}, tensors),
        ({"x": 1, "y": 2.0}, tensors),
        ({"x": 1, "y": 2}, exchanged),
    ]
    digests = {contents_digest(*each) for each in others}
    assert len(digests) == 4


def made(entries: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, which says that the header has `length` bytes."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header(**tensors: object) -> dict[str, object]:
    inner = {"format": KIND.format, "name": "n", "more": {}}
    return {"__metadata__": {"editkit": json.dumps(inner)}} | tensors


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file, or is cut short"),
        (b"1234567", "not a safetensors file, or is cut short"),
        (made({}, length=10**12), "not a safetensors file, or is cut short"),
        (made(b"\xff\xff"), "decode"),
        (made(b"{'a'"), "JSON|Expecting"),
        (made(b"[" * 100_000), "nested too deeply"),
        (made([]), "its header is not an object"),
        (made(b'{"a": 1, "a": 2}'), "the key 'a' comes twice"),
        (made({"__metadata__": {"editkit": "{"}}), "Expecting"),
        (made({"__metadata__": {"editkit": 1}}), "metadata are not texts"),
        (made({"__metadata__": {"editkit": "[]"}}), "does not hold a test: its format is None"),
        (made({}), "does not hold a test: its format is None"),
        (made({"__metadata__": {"editkit": '{"format": "test-kind/2"}'}}), "'test-kind/2'.*Update editkit"),
        (made({"__metadata__": {"editkit": '{"format": "other/1"}'}}), "'other/1'.*Tests do"),
        (made({"__metadata__": {"editkit": '{"format": "test-kind/1", "name": "n"}'}}), "lacks 'more'"),
        (made(header(a=1)), "tensor 'a' is int, and not an object"),
        (made(header(a={"dtype": "F32"})), "tensor 'a' lacks"),
        (made(header(a=entry("F33")), b"1234"), "dtype 'F33'"),
        (made(header(a=entry(shape=(-1,))), b"1234"), "no numbers from 0 on"),
        (made(header(a=entry(shape=(True,))), b"1234"), "no numbers from 0 on"),
        (made(header(a=entry(offsets=(0, 4, 8))), b"1234"), "no numbers from 0 on"),
        (made(header(a=entry(shape=(2,))), b"1234"), "does not fit its offsets"),
        (made(header(a=entry(offsets=(4, 0))), b"1234"), "does not fit its offsets"),
        (made(header(a=entry(offsets=(4, 8))), b"12345678"), "begins at byte 4"),
        (made(header(a=entry(), b=entry()), b"1234"), "begins at byte 0 of its data, and not at 4"),
        (made(header(a=entry()), b"123"), "have 4 bytes, and 3 are there"),
        (made(header(a=entry()), b"12345"), "have 4 bytes, and 5 are there"),
    ],
)
def test_a_malformed_file_is_one_error_that_names_it(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (read_header, read_tensors):
        with pytest.raises(EditFileError, match=message) as caught:
            read(path, KIND)
        assert str(path) in str(caught.value) and str(caught.value).endswith((".", "Update editkit."))


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "null byte")):
        with pytest.raises(EditFileError, match=f"cannot be read as a test: .*{message}.*Write it again"):
            read_tensors(path, KIND)


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a", KIND, VALUES, {"a": torch.zeros(2)})
    code = f"""
import sys; sys.modules.update(torch=None, safetensors=None, numpy=None)
from editkit.tensorfiles import FileKind, read_header
kind = FileKind("test-kind/1", "", {{"name": (str,), "more": (dict,)}}, "", "", "")
print(sorted(read_header({str(path)!r}, kind)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("['more', 'name']\n", 0), run.stderr


# --- random damages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damage() -> types.ModuleType:
    return script("damage")


@pytest.fixture(scope="module")
def subjects(damage: types.ModuleType, atlas_lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return damage.subjects(atlas_lm, tmp_path_factory.mktemp("sound"), ["edit", "session", "moment", "hypernetwork"])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("kind", ["edit", "session", "moment", "hypernetwork"])
def test_a_damage_is_a_clear_error_or_changes_nothing(kind: str, damage: types.ModuleType, subjects: Any) -> None:
    each = list(damage.trials(subjects[kind], 60, seed=1))
    assert not [trial for trial in each if trial[1] in ("traceback", "other values")]
    assert sum(outcome == "clear error" for _, outcome, _ in each) >= 50
    assert all(
        "\n" not in message and message.endswith(".") for _, outcome, message in each if outcome == "clear error"
    )


def test_a_damage_that_nothing_notices_is_counted(damage: types.ModuleType, tmp_path: Path) -> None:
    """The count itself can fail: a reader without a digest gives other values, one without a net a traceback."""
    subject = damage.Subject({"a": b'{"x": 1, "y": 2}'}, lambda folder: json.loads((folder / "a").read_bytes()))
    outcomes = {outcome for _, outcome, _ in damage.trials(subject, 60, seed=0)}
    assert {"other values", "traceback"} <= outcomes
