"""MEND: what it captures, what an untrained network does, that training helps, and its file."""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Fact, Session
from editkit.corpora import load_atlas
from editkit.data.cases import make_case
from editkit.errors import EditFileError, EditkitError, ModelError
from editkit.methods.mend import Mend, MendSettings, mend, rank_one_gradients
from editkit.metrics.scoring import score_probes
from editkit.models.load import LanguageModel
from editkit.nethook import requires_grad
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import TARGETS, plain_nll, tokens_of, untouched
from tests.conftest import Near
from tests.oracles import dense
from tests.scripts import script
from tests.test_snapshot import random_edit

train_mend = script("train_mend")

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [FACT, replace(FACT, subject="Big Ben", target_new=TARGETS[1])]
FAMILIES = ["gpt2", "llama"]
SMALL = train_mend.Recipe(layers=(1, 2), rank=8, steps=20, edits=2, warm=10, lr=1e-2, c_edit=1.0)


def weight_gradients(lm: LanguageModel, sites: Sequence[str], facts: Sequence[Fact]) -> dict[str, Tensor]:
    """autograd's own gradient [d_model, d_ff] of the sum of the facts' losses, per weight, on a float64 copy."""
    model = copy.deepcopy(lm.model).double()
    rows = [tokens_of(lm, f.text, f.target_new) for f in facts]
    torch.autograd.backward(plain_nll(model, rows) * len(rows))
    found: dict[str, Tensor] = {}
    for site in sites:
        module = model.get_submodule(site)
        gradient = model.get_parameter(f"{site}.weight").grad
        assert gradient is not None
        found[site] = gradient if dense(module) is module.weight else gradient.T
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_captured_pairs_sum_to_autograds_weight_gradient(family: str) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    sites = [lm.architecture.down(layer) for layer in (0, 2)]
    pairs, losses = rank_one_gradients(lm, sites, FACTS)
    for site, gradient in weight_gradients(lm, sites, FACTS).items():
        k, g = pairs[site]
        assert len(k) == len(g) <= sum(len(tokens_of(lm, f.text, f.target_new)[0]) for f in FACTS)
        torch.testing.assert_close(g.T @ k, gradient, rtol=1e-9, atol=1e-12)
    rows = [tokens_of(lm, f.text, f.target_new) for f in FACTS]
    assert losses.tolist() == pytest.approx([plain_nll(lm.model, [row]).item() for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_network_takes_one_step_of_sgd(family: str, tmp_path: Path, near: Near) -> None:
    """Whatever the tokens were normalised by."""
    lm = tiny_lm(family, dtype=torch.float64)
    network = Mend.for_model(lm, (0, 2), rank=4)
    network.normalise_by([rank_one_gradients(lm, network.sites, FACTS)[0]])
    path = network.save(tmp_path / "mend.safetensors")
    edit = mend(lm, FACTS, MendSettings(str(path)))
    for site, gradient in weight_gradients(lm, network.sites, FACTS).items():
        (delta,) = (d for d in edit.deltas if d.module == site)
        near("mend", family, delta.change(), -gradient, 1e-5)


def test_the_network_is_the_papers_formula() -> None:
    """Token by token, row by row of the matrices, with nothing at its starting value."""
    torch.manual_seed(0)
    network = Mend(["a", "b"], 5, 3, rank=2, base="").double()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.randn_like(tensor))
        network.std.abs_().add_(0.1)
    k, g = torch.randn(4, 5).double(), torch.randn(4, 3).double()
    left, right = network("b", k, g)
    for t in range(4):
        raw = torch.cat((k[t], g[t]))
        z = (raw - network.mean[1]) / network.std[1]
        h = z.clone()
        low = torch.stack([network.v[0, r] @ z for r in range(2)])
        for i in range(8):
            change = network.scale[1, 0, i] * (network.u[0, i] @ low + network.b[0, i]) + network.offset[1, 0, i]
            h[i] += max(0.0, change.item())
        y = h + network.scale[1, 1] * (network.u[1] @ (network.v[1] @ h) + network.b[1]) + network.offset[1, 1]
        new = raw + network.std[1] * (y - z)
        torch.testing.assert_close(right[t], new[:5])
        torch.testing.assert_close(left[:, t], -network.log_lr[1].exp() * new[5:])


@pytest.mark.parametrize("family", FAMILIES)
def test_training_lowers_its_loss(family: str, tmp_path: Path) -> None:
    """Mean over the same 12 edits, before and after 40 steps."""
    lm, atlas = tiny_lm(family), load_atlas()
    with untouched(lm, lm.architecture.down(1)):
        trained = train_mend.train(lm, replace(SMALL, steps=40), tmp_path / "checkpoint.pt")
    untrained = train_mend.train(lm, replace(SMALL, steps=0), tmp_path / "none.pt")
    facts, _ = train_mend.split(atlas, SMALL)

    def loss(network: Mend) -> float:
        rng, total = random.Random(1), 0.0
        with requires_grad(lm.model, only=[]), torch.no_grad():
            for fact in rng.sample(facts, 12):
                each = train_mend.example(atlas, fact, rng, SMALL)
                with torch.enable_grad():
                    edit, locality = train_mend.losses_after(lm, network, each)
                total += (SMALL.c_edit * edit + locality).item() / 12
        return total

    assert loss(trained) < 0.98 * loss(untrained)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, calls = tiny_lm("gpt2"), list[int]()
    recipe = replace(SMALL, steps=6, edits=1)
    whole = train_mend.train(lm, recipe, tmp_path / "a.pt", every=2)
    original = train_mend.losses_after

    def killed(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train_mend, "losses_after", killed)
    with untouched(lm, lm.architecture.down(1)), pytest.raises(KeyboardInterrupt):
        train_mend.train(lm, recipe, tmp_path / "b.pt", every=2)
    resumed = train_mend.train(lm, recipe, tmp_path / "b.pt", every=2)
    assert len(calls) == 8  # steps 5 and 6 again, not the first four
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(SystemExit, match="another recipe"):
        train_mend.train(lm, replace(recipe, lr=1.0), tmp_path / "b.pt")


def test_held_out_subjects_are_edited_by_no_example() -> None:
    atlas = load_atlas()
    facts, held = train_mend.split(atlas, SMALL)
    assert not {f.subject for f in facts} & {f.subject for f in held} and len(facts) + len(held) == len(atlas.facts)
    fact, rng = facts[0], random.Random(0)
    unseen = {p.format(fact.subject) for p in atlas.unseen_phrasings(fact)}
    for _ in range(20):
        each = train_mend.example(atlas, fact, rng, SMALL)
        assert all(fact.subject in p and p not in unseen and a == each.fact.target_new for p, a in each.changed)
        assert each.changed[0][0] == each.fact.text


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_left_as_it_was(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(family)
    site = lm.architecture.down(1)
    path = Mend.for_model(lm, (1,), rank=2).save(tmp_path / "mend.safetensors")
    with untouched(lm, site):
        edit = mend(lm, FACT, MendSettings(str(path)))
    assert edit.norm() > 0 and edit.rank <= len(tokens_of(lm, FACT.text, FACT.target_new)[0])

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for where in ("editkit.methods.shared.likelihood.log_softmax", "torch.Tensor.backward"):
        with monkeypatch.context() as patch, untouched(lm, site), pytest.raises(KeyboardInterrupt):
            patch.setattr(where, interrupted)
            mend(lm, FACTS, MendSettings(str(path)))


def test_the_network_of_the_base_goes_on_editing_what_it_edited(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    settings = MendSettings(str(Mend.for_model(lm, (1,), rank=2).save(tmp_path / "mend.safetensors")))
    with Session(lm, "mend", settings) as session:
        for fact in FACTS[:2]:
            session.edit([fact])
        assert len(session.steps) == 2
        with pytest.raises(EditkitError, match="trained for a model with digest"):
            mend(lm, FACT, settings)


def test_the_bundled_network_edits_the_atlas_model(atlas_lm: LanguageModel) -> None:
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    paraphrase, neighbor = "{} stands in the city of", "The Louvre is located in the city of"
    case = make_case(fact, [paraphrase], [neighbor])
    with mend(atlas_lm, fact).applied(atlas_lm):
        assert [score.new_wins for score in score_probes(atlas_lm, case.probes)] == [True, True, False]


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    how = "Train one with: python scripts/train_mend.py"
    with pytest.raises(EditFileError, match=f"tiny-gpt2_mend.safetensors.*No such file.*{how}"):
        mend(lm, FACT)
    edit = random_edit(lm).save(tmp_path / "edit.safetensors")
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"noise" * 100)
    for path in (edit, noise):
        with pytest.raises(EditFileError, match=f"{path}.*{how}"):
            mend(lm, FACT, MendSettings(str(path)))
    path = Mend.for_model(tiny_lm("gpt2", seed=1), (1,), rank=2).save(tmp_path / "mend.safetensors")
    with pytest.raises(EditkitError, match=f"trained for a model with digest.*{how}"):
        mend(lm, FACT, MendSettings(str(path)))
    with pytest.raises(EditkitError, match="trained for a model with digest"):
        mend(lm, FACT, MendSettings(str(path)), earlier=[random_edit(lm)])
    with pytest.raises(ModelError, match="Layer 9"):
        Mend.for_model(lm, (9,), rank=2)


def test_the_file_holds_the_network(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    network = Mend.for_model(lm, (0, 1), rank=2, lr=0.5, seed=3)
    network.normalise_by([rank_one_gradients(lm, network.sites, FACTS)[0]])
    path = network.save(tmp_path / "mend.safetensors")
    again = Mend.load(path)
    assert (again.sites, again.base) == (network.sites, lm.digest)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
