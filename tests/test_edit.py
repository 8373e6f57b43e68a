"""Edit as a value: it saves, loads, refuses what is not its base, and never leaves half a file."""

import hashlib
import json
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from editkit.edits import Edit, base_of, dense_delta, low_rank_delta
from editkit.edits.editfile import written
from editkit.errors import EditFileError, EditkitError, OutputError
from editkit.models.load import LanguageModel
from editkit.nethook import get_parameter
from editkit.testing.tiny import tiny_lm
from tests.test_snapshot import random_edit

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return tiny_lm("gpt2")


def test_save_and_load_are_byte_identical(lm: LanguageModel, tmp_path: Path) -> None:
    edit = random_edit(lm)
    path = edit.save(tmp_path / "new" / "edit.safetensors")
    again = Edit.load(path)
    assert again.to_bytes() == edit.to_bytes() == path.read_bytes()
    assert again.digest == edit.digest and again.base == edit.base
    with edit.applied(lm):
        one = lm.model.get_parameter(edit.parameters[0]).clone()
    with again.applied(lm):
        assert torch.equal(lm.model.get_parameter(edit.parameters[0]), one)


def test_norm_and_rank_are_those_of_the_matrix(lm: LanguageModel) -> None:
    delta = random_edit(lm, rank=3).deltas[0]
    assert delta.rank == 3 == torch.linalg.matrix_rank(delta.matrix())
    assert delta.norm() == pytest.approx(delta.matrix().norm().item(), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_matrix_lies_as_the_module_stores_it(family: str) -> None:
    """The output changes by left (right · k): checked against the module itself, Conv1D and Linear."""
    lm = tiny_lm(family)
    edit = random_edit(lm)
    module = lm.model.get_submodule(edit.deltas[0].module)
    left, right = edit.deltas[0].left, edit.deltas[0].right
    assert right is not None
    k = torch.randn(5, right.shape[1])
    before = module(k)
    with edit.applied(lm):
        moved = module(k) - before
    expected = k @ right.T @ left.T
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_dense_change_is_the_same_edit_as_its_factors(family: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    factors = random_edit(lm, rank=3).deltas[0]
    assert factors.right is not None
    whole = dense_delta(lm, factors.module, factors.left @ factors.right)
    edit = Edit((whole,), base_of(lm), memory={"keys": torch.tensor([[1.0, -0.0]])})
    torch.testing.assert_close(whole.matrix(), factors.matrix())
    assert whole.norm() == pytest.approx(factors.norm(), rel=1e-5)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.to_bytes() == edit.to_bytes() and again.deltas[0].right is None
    assert again.memory["keys"].tolist() == [[1.0, -0.0]]
    before = lm.model.get_parameter(edit.parameters[0]).clone()
    with again.applied(lm):
        assert torch.equal(lm.model.get_parameter(edit.parameters[0]), before + factors.matrix())
    with pytest.raises(EditkitError, match="does not fit"):
        dense_delta(lm, factors.module, torch.zeros(2, 2))


def test_factors_larger_than_their_product_are_multiplied_out(lm: LanguageModel) -> None:
    site = lm.architecture.down(1)
    left, right = torch.randn(32, 22), torch.randn(22, 64)
    few, many = low_rank_delta(lm, site, left[:, :21], right[:21]), low_rank_delta(lm, site, left, right)
    assert few.rank == 21 and many.right is None and many.rank == 32
    assert torch.equal(many.left, left @ right)


def test_an_update_larger_than_its_weight_is_named(lm: LanguageModel) -> None:
    edit = random_edit(lm)
    weight = get_parameter(lm.model, edit.parameters[0]).norm().item()
    small, large = (0.9 * weight / edit.norm() * edit, 1.1 * weight / edit.norm() * edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with small.applied(lm):
            pass
    with pytest.warns(UserWarning, match=f"{edit.parameters[0]} is larger than the weight"), large.applied(lm):
        pass


def test_another_base_is_refused(lm: LanguageModel) -> None:
    edit = random_edit(lm)
    other = tiny_lm("gpt2", seed=1)
    with pytest.raises(EditkitError, match="computed for 'tiny-gpt2'.*Load the base it was made for"):
        edit.apply(other)


def test_a_base_that_differs_elsewhere_is_refused() -> None:
    edit, changed = random_edit(tiny_lm("gpt2")), tiny_lm("gpt2")
    with torch.no_grad():
        changed.model.get_parameter("transformer.ln_f.bias")[0] += 1
    with pytest.raises(EditkitError, match="other weights than the edited ones differ"):
        edit.apply(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_of_the_base_is_taken_when_asked(lm: LanguageModel, dtype: torch.dtype) -> None:
    edit, half = random_edit(lm), tiny_lm("gpt2", dtype=dtype)
    name = edit.parameters[0]
    with pytest.raises(EditkitError, match=r"another dtype takes edit\.in_dtype_of"):
        edit.apply(half)
    with edit.applied(lm):
        wanted = lm.model.get_parameter(name).detach().clone()
    moved = edit.in_dtype_of(half)
    with moved.applied(half) as applied:
        found = half.model.get_parameter(name).float()
    assert applied.reversal is not None and applied.reversal.exact
    assert (found - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    assert moved.provenance["computed_for"]["digest"] == edit.base.digest
    with pytest.raises(EditkitError, match="both float32: apply the edit as it is"):
        edit.in_dtype_of(lm)
    with pytest.raises(EditkitError, match="another model"):
        edit.in_dtype_of(tiny_lm("gpt_neo", dtype=dtype))


def test_applying_twice_is_refused(lm: LanguageModel) -> None:
    edit = random_edit(lm)
    with edit.applied(lm), pytest.raises(EditkitError, match="restore other edits first"):
        edit.apply(lm)


def test_factors_that_do_not_fit(lm: LanguageModel) -> None:
    site = lm.architecture.down(0)
    with pytest.raises(EditkitError, match="do not fit"):
        low_rank_delta(lm, site, torch.zeros(3, 1), torch.zeros(1, 3))
    d_ff, d_model = lm.model.get_parameter(f"{site}.weight").shape
    with pytest.raises(EditkitError, match="not finite"):
        low_rank_delta(lm, site, torch.full((d_model, 1), float("nan")), torch.zeros(1, d_ff))


def damaged(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) - 40]
    if how == "cut in the header":
        return data[:60]
    if how == "empty":
        return b""
    if how == "noise":
        return bytes(range(256)) * 4
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = json.loads(header["__metadata__"]["editkit"])
    if how == "another format":
        entry["format"] = "editkit-edit/9"
    else:
        del entry["base"]
    header["__metadata__"]["editkit"] = json.dumps(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("how", ["cut", "cut in the header", "empty", "noise", "another format", "a key is missing"])
def test_damaged_files_are_named(lm: LanguageModel, tmp_path: Path, how: str) -> None:
    path = tmp_path / "edit.safetensors"
    path.write_bytes(damaged(random_edit(lm).to_bytes(), how))
    with pytest.raises(EditFileError, match=str(path)):
        Edit.load(path)


@pytest.mark.parametrize("position", [0.2, 0.9])  # in the header, in a tensor
def test_one_other_bit_is_noticed(lm: LanguageModel, tmp_path: Path, position: float) -> None:
    data = bytearray(random_edit(lm).to_bytes())
    data[int(position * len(data))] ^= 1
    path = tmp_path / "edit.safetensors"
    path.write_bytes(data)
    with pytest.raises(EditFileError, match=f"'{path}' cannot be read as an edit: it is damaged: .*Compute the edit"):
        Edit.load(path)


def test_an_edit_of_an_older_editkit_is_read_with_a_note_and_is_the_same_edit(
    lm: LanguageModel, tmp_path: Path
) -> None:
    edit, path = random_edit(lm), tmp_path / "edit.safetensors"
    before = written(edit._parts(), seal=False)
    path.write_bytes(before)
    with pytest.warns(UserWarning, match=rf"'{path}' was written without a digest.*Edit\.load\(path\)\.save\(path\)"):
        again = Edit.load(path)
    assert again.to_bytes() == edit.to_bytes() != before
    # `parents` of older edits name it by the digest of those bytes
    assert again.digest == edit.digest == hashlib.sha256(before).hexdigest()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Edit.load(again.save(path)).digest == edit.digest
    assert len(path.read_bytes()) - len(before) < 100  # bytes


def test_an_edit_of_a_weight_that_the_model_lacks_is_refused(lm: LanguageModel) -> None:
    edit = random_edit(lm)
    with pytest.raises(EditkitError, match=r"changes transformer\.h\.1.*'tiny-llama' does not have"):
        edit.apply(tiny_lm("llama"))


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EditFileError, match="does not hold an edit: its format is None.*written by edit.save"):
        Edit.load(tmp_path / "other.safetensors")
    with pytest.raises(EditFileError, match="No such file"):
        Edit.load(tmp_path / "none.safetensors")


def test_a_full_disk_leaves_the_old_file_and_no_half(lm: LanguageModel, tmp_path: Path) -> None:
    """A real refusal of the system to write on: a limit on the size of files."""
    path = tmp_path / "edit.safetensors"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OutputError, match="could not be written"):
            random_edit(lm).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
