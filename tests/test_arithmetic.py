"""Edits as vectors: sums, multiples, cuts, files in order, spectra; against the matrices themselves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from editkit import apply_files
from editkit.edits import Edit, alignment, base_of, compressed, dense_delta, low_rank_delta, spectra
from editkit.errors import EditFileError, EditkitError
from editkit.methods.shared.transforms import prune
from editkit.models.load import LanguageModel
from editkit.models.snapshot import same_bits
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import everything

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large


def made(
    lm: LanguageModel,
    layer: int,
    rank: int = 2,
    seed: int = 0,
    size: float = 1.0,
    dense: bool = False,
    parents: tuple[str, ...] = (),
) -> Edit:
    """A random edit of block `layer`."""
    generator = torch.Generator().manual_seed(seed)
    left, right = size * torch.randn(32, rank, generator=generator), torch.randn(rank, 64, generator=generator)
    site = lm.architecture.down(layer)
    delta = dense_delta(lm, site, left @ right) if dense else low_rank_delta(lm, site, left, right)
    return Edit((delta,), base_of(lm), {"method": f"random {seed}"}, parents)


def change(edit: Edit, layer: int) -> Tensor:
    found = [d.change() for d in edit.deltas if f".{layer}." in d.module]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("dense", [False, True])
def test_edits_add_and_scale_like_their_matrices(dense: bool) -> None:
    lm = tiny_lm("gpt2")
    a, b = made(lm, 0, seed=1), made(lm, 0, seed=2, dense=dense) + made(lm, 1, seed=3)
    both = 2 * a - b
    torch.testing.assert_close(change(both, 0), 2 * change(a, 0) - change(b, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(change(both, 1), -change(b, 1), rtol=1e-6, atol=1e-6)
    assert both.deltas[0].right is None if dense else both.deltas[0].rank == 4
    assert [part["factor"] for part in both.provenance["of"]] == [1.0, -1.0]
    torch.testing.assert_close(change(-a, 0), -change(a, 0))
    with pytest.raises(EditkitError, match="different bases cannot be added"):
        _ = a + made(tiny_lm("gpt2", seed=1), 0)


@pytest.mark.parametrize("dense", [False, True])
def test_a_cut_is_the_best_of_its_rank_and_says_its_error(dense: bool) -> None:
    lm = tiny_lm("llama")
    edit = made(lm, 1, rank=5, dense=dense)
    cut = compressed(edit, 2)
    exact = change(edit, 1)
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(change(cut, 1), (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-4, atol=1e-4)
    error = cut.provenance["compressed"]["relative_error"][edit.parameters[0]]
    assert error == pytest.approx(((exact - change(cut, 1)).norm() / exact.norm()).item(), rel=1e-4)
    assert cut.rank == 2


def test_files_apply_as_one_in_their_order(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    before = everything(lm.model)
    start = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    first, alone = made(lm, 0, seed=1), made(lm, 1, seed=2)
    with first.applied(lm):
        second = made(lm, 0, seed=3, parents=(first.digest,))
    one, two, three = (e.save(tmp_path / f"{n}.safetensors") for n, e in enumerate((first, second, alone)))
    with apply_files([one, two, three], lm):
        for layer, total in ((0, change(first, 0) + change(second, 0)), (1, change(alone, 1))):
            name = f"{lm.architecture.down(layer)}.weight"
            expected = (start[name].double() + total.T).float()
            torch.testing.assert_close(lm.model.get_parameter(name), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(b, before[n]) for n, b in everything(lm.model).items())
    for wrong, named in (([two, one], two), ([one, three, two], two), ([two], two)):
        with pytest.raises(EditkitError, match=f"'{named}' was computed for"), apply_files(wrong, lm):
            pass
    with pytest.raises(EditkitError, match="computed for"), apply_files([one], tiny_lm("gpt2", seed=1)):
        pass
    with pytest.raises(EditFileError), apply_files([one, tmp_path / "none"], lm):
        pass
    assert all(torch.equal(b, before[n]) for n, b in everything(lm.model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spectra_are_those_of_the_matrix_and_of_what_is_written(dtype: torch.dtype) -> None:
    lm = tiny_lm("llama", dtype=dtype)
    edit = made(lm, 1, rank=3, size=0.01)
    (found,) = spectra(edit, lm)
    exact, name = change(edit, 1), edit.parameters[0]
    values = torch.linalg.svdvals(exact)
    torch.testing.assert_close(torch.tensor(found.values[:3]).double(), values[:3], rtol=1e-5, atol=1e-6)
    share = values / values.sum()
    share = share[share > 1e-9]
    assert found.effective_rank == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-4)
    weight = lm.model.get_parameter(name).detach().clone()
    with edit.applied(lm):
        written = lm.model.get_parameter(name).detach().double() - weight.double()
    assert found.rounding_error == pytest.approx(((written - exact).norm() / exact.norm()).item(), rel=1e-3, abs=1e-8)
    assert found.rounding_error is not None
    assert (found.rounding_error > 1e-3) == (dtype == torch.bfloat16)
    assert found.relative_norm == pytest.approx((exact.norm() / weight.double().norm()).item(), rel=1e-5)
    assert same_bits(lm.model.get_parameter(name), weight)


def test_alignment_is_one_for_white_keys_and_nothing_in_the_null_space() -> None:
    lm = tiny_lm("llama")
    delta = made(lm, 1).deltas[0]
    assert alignment(delta, torch.eye(64)) == pytest.approx(1.0, rel=1e-6)
    assert delta.right is not None
    right = delta.right.double()
    free = torch.eye(64).double() - torch.linalg.pinv(right) @ right
    assert alignment(delta, free @ free.T) == pytest.approx(0.0, abs=1e-9)
    keys = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)).double()
    energy = sum((delta.change() @ k).square().sum() for k in keys) / 500
    c = keys.T @ keys / 500
    assert alignment(delta, c) == pytest.approx(
        (energy / delta.change().square().sum() / (c.trace() / 64)).item(), rel=1e-6
    )


@pytest.mark.parametrize("dense", [False, True])
def test_prune_pulls_back_what_is_larger_than_the_weight_and_nothing_else(dense: bool) -> None:
    lm = tiny_lm("gpt2")
    edit = made(lm, 1, rank=3, size=3.0, dense=dense)
    w = lm.model.get_parameter(edit.parameters[0]).detach().T.double()
    largest = torch.linalg.svdvals(w)[0]
    u, s, vt = torch.linalg.svd(change(edit, 1), full_matrices=False)
    assert s[0] > largest and (s < largest).any()
    s = torch.tensor([v.log() - largest.log() + largest if v > largest else v for v in s])
    torch.testing.assert_close(change(prune(lm, edit), 1), (u * s) @ vt, rtol=1e-4, atol=1e-4)
