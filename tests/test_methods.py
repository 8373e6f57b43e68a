"""MEMIT, EMMET, PMET and AlphaEdit against slow float64 versions of their papers, and what all methods promise."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit import Fact
from editkit.errors import ConfigError, EditkitError, FactError, ModelError
from editkit.methods import get_method
from editkit.methods.alphaedit import AlphaEditSettings, constrained, in_basis, null_space
from editkit.methods.emmet import EmmetSettings, equality
from editkit.methods.memit import MemitSettings
from editkit.methods.pmet import PmetSettings
from editkit.methods.shared.held import Held, least_squares, plain
from editkit.models.load import LanguageModel
from editkit.models.tokens import encode_with_targets, spaced
from editkit.moments import Factored, SecondMoment, second_moments
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import everything
from tests.conftest import Near, inputs_of
from tests.oracles import spread_updates

FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    Fact("The capital of {} is", "France", "Madrid", "Paris"),
    Fact("{} was born in the city of", "Ada Lovelace", "Oslo", "London"),
]
FEW = ContextSettings(starts=("The", "I"), lengths=(6,), counts=(1,))
MOMENTS = MomentSettings(tokens=4000)
SETTINGS = {
    "memit": MemitSettings(mom2_update_weight=30.0),
    "emmet": EmmetSettings(mom2_update_weight=2.0),
    "pmet": PmetSettings(mom2_update_weight=30.0, kl_factor=0.5, stop_kl=0.0),
    "alphaedit": AlphaEditSettings(fraction=0.5, l2=0.5),
}
SOLVERS: dict[str, dict[str, Any]] = {
    "adam": {"solver": "adam", "lr": 0.02, "weight_decay": 1e-3},
    "descent": {"solver": "descent"},
}


@pytest.mark.cells
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon", "opt"])
def test_equal_to_the_oracle(family: str, method: str, solver: str, near: Near) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    layers = [1] if method == "emmet" else [0, 1]
    settings = replace(SETTINGS[method], layers=layers, steps=4, clamp=0.75, stop_loss=0.0, **SOLVERS[solver])
    templates = ["{}", "The old man went. {}", "I was. {}"]
    moments = second_moments(lm, layers, MOMENTS, progress=False)
    edit = get_method(method)(lm, FACTS, settings, moments=moments, contexts=templates, progress=False)

    names = [lm.architecture.down(layer) for layer in layers]
    matrices = [moments[layer].matrix for layer in layers]
    if method != "alphaedit":
        matrices = [c + MOMENTS.ridge * c.diagonal().mean() * torch.eye(len(c)).double() for c in matrices]
    expected = spread_updates(
        lm.model,
        method,
        lm.architecture.block,
        lm.architecture.attention,
        names,
        layers,
        [inputs_of(lm, fact, templates) for fact in FACTS],
        matrices,
        settings,
    )
    assert edit.parameters == [f"{name}.weight" for name in names]
    for delta, update in zip(edit.deltas, expected, strict=True):
        near(method, family, delta.change(), update, 1e-4)


def random_moment(size: int, count: int, seed: int = 0) -> SecondMoment:
    keys = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    keys = keys * torch.logspace(-2, 0.5, size, dtype=torch.float64)
    return SecondMoment("here", keys.T @ keys / count, count, "random")


@pytest.mark.parametrize("n", [1, 7, 39, 40, 90])
def test_woodbury_is_the_direct_solve(n: int) -> None:
    moment = random_moment(40, 400)
    keys = torch.randn(40, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    inverse = torch.linalg.inv(17.0 * moment.matrix + keys @ keys.T)
    assert torch.allclose(least_squares(Held(moment.factor(), 17.0), keys), keys.T @ inverse, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 30])
def test_emmet_holds_the_new_values_exactly_and_moves_old_keys_least(n: int) -> None:
    moment = random_moment(40, 400)
    keys = torch.randn(40, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    right = equality(Held(moment.factor(), 3.0), keys, 0.0)
    assert torch.allclose(right @ keys, torch.eye(n).double(), atol=1e-9)
    cost = torch.trace(right @ moment.matrix @ right.T)
    for seed in range(5):  # any other solution of the constraint costs more
        free = torch.randn(n, 40, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
        other = right + 0.01 * (free - free @ keys @ torch.linalg.pinv(keys))
        assert torch.allclose(other @ keys, torch.eye(n).double(), atol=1e-9)
        assert torch.trace(other @ moment.matrix @ other.T) > cost


@pytest.mark.parametrize("m", [0, 5, 60])
@pytest.mark.parametrize("n", [1, 6, 50])
def test_alphaedit_is_the_papers_solve_and_stays_in_the_null_space(n: int, m: int) -> None:
    moment = random_moment(40, 400)
    basis = null_space(moment, 0, threshold=0.05, fraction=None)
    p = basis @ basis.T
    values, vectors = torch.linalg.eigh(moment.matrix)
    low = vectors[:, values < 0.05]
    assert 0 < basis.shape[1] < 40 and torch.allclose(p, low @ low.T, atol=1e-9)
    keys = torch.randn(40, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    held = torch.cat([keys, torch.randn(40, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)], 1)
    earlier = plain(10.0, basis.shape[1], experts=False)
    for some in held[:, n:].split(7, 1):  # as a session's steps add them
        earlier = earlier.also(in_basis(basis, some)) if m else earlier
    right = constrained(basis, earlier, keys)
    paper = torch.linalg.solve(p @ (held @ held.T) + 10 * torch.eye(40).double(), p @ keys).T
    assert torch.allclose(right, paper, rtol=1e-6, atol=1e-10)
    assert torch.allclose(right @ p, right, atol=1e-9)


def test_alphaedit_without_a_null_space_is_refused() -> None:
    moment = random_moment(40, 400)
    with pytest.raises(EditkitError, match="null space at layer 3 is empty.*method.fraction=0.5"):
        null_space(moment, 3, threshold=1e-12, fraction=None)
    assert null_space(moment, 3, threshold=1e-12, fraction=0.5).shape == (40, 20)


def test_dependent_keys_are_named() -> None:
    keys = torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(EditkitError, match="depend on each other.*method.epsilon"):
        equality(Held(Factored(torch.eye(4, dtype=torch.float64))), keys, 0.0)


@pytest.mark.parametrize("method", ["memit", "emmet", "pmet", "alphaedit"])
def test_the_facts_are_rewritten_and_the_model_left_as_it_was(atlas_lm: LanguageModel, method: str) -> None:
    before = everything(atlas_lm.model)
    settings = replace(get_method(method).settings(), contexts=FEW)  # type: ignore[call-arg]
    edit = get_method(method)(atlas_lm, FACTS[:2], settings, moments=MOMENTS, progress=False)
    assert all(torch.equal(b, before[n]) for n, b in everything(atlas_lm.model).items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in atlas_lm.model.modules())
    assert all(p.requires_grad for p in atlas_lm.model.parameters())

    def log_p(fact: Fact) -> float:
        scored = encode_with_targets(atlas_lm, [fact.text], [spaced(fact.target_new)])
        row, at, token = scored.pick()
        with torch.no_grad():
            logits = atlas_lm.model(**scored.rows.inputs()).logits[row, at].log_softmax(-1)
        return float(logits[torch.arange(len(token)), token].sum())

    old = [log_p(fact) for fact in FACTS[:2]]
    with edit.applied(atlas_lm):
        assert all(math.exp(log_p(fact)) > 0.5 for fact in FACTS[:2]), old
    assert all(math.exp(o) < 0.1 for o in old)


def test_alphaedit_keeps_earlier_facts_by_their_keys(atlas_lm: LanguageModel) -> None:
    """With the first edit's keys held, the second changes what block L gives for them less."""
    alphaedit = get_method("alphaedit")
    settings = AlphaEditSettings(layers=[4], contexts=FEW, fraction=0.9, l2=0.1)
    moments = second_moments(atlas_lm, [4], MOMENTS, progress=False)
    first = alphaedit(atlas_lm, FACTS[0], settings, moments=moments, progress=False)
    # The same subject asked for something else: its key is nearly the first one's.
    again = Fact("{} is a kind of", "The Eiffel Tower", "bridge")
    with first.applied(atlas_lm):
        moved = []
        off = replace(settings, keep_earlier=False)
        for how, earlier in ((settings, ()), (settings, (first,)), (off, (first,))):
            second = alphaedit(atlas_lm, again, how, moments=moments, earlier=earlier, progress=False)
            key = first.memory[atlas_lm.architecture.down(4)]
            moved.append((second.deltas[0].change() @ key.double()).norm())
    assert moved[1] < 0.8 * moved[0]
    assert torch.equal(moved[2], moved[0])  # keep_earlier=false: as if there were none


def test_bad_input(atlas_lm: LanguageModel) -> None:
    memit, emmet = get_method("memit"), get_method("emmet")
    with pytest.raises(ModelError, match="Layer 9 was asked for; atlas has 8 blocks"):
        memit(atlas_lm, FACTS, MemitSettings(layers=[3, 9]), progress=False)
    with pytest.raises(FactError, match="contradict each other: 'The Eiffel Tower .*'Rome' and 'Oslo'"):
        memit(atlas_lm, [FACTS[0], FACTS[0].with_target("Oslo")], progress=False)
    with pytest.raises(EditkitError, match="EMMET writes one block; layers \\[3, 4\\]"):
        emmet(atlas_lm, FACTS, EmmetSettings(layers=[4, 3]), progress=False)
    with pytest.raises(ConfigError, match="fact_token=last"):
        MemitSettings(fact_token="last")
    with pytest.raises(EditkitError, match="No second moment was given for layers \\[4\\]; there are \\[3\\]"):
        moments = second_moments(atlas_lm, [3], MOMENTS, progress=False)
        memit(atlas_lm, FACTS, MemitSettings(layers=[3, 4]), moments=moments, progress=False)
    with pytest.raises(ModelError, match="'gemma2' has a norm between the MLP.*method.layers=\\[3\\]"):
        memit(tiny_lm("gemma2"), FACTS, MemitSettings(layers=[0, 1]), progress=False)


def test_a_duplicate_counts_once_and_is_named(atlas_lm: LanguageModel) -> None:
    settings = MemitSettings(layers=[4], steps=2, contexts=FEW)
    memit = get_method("memit")
    with pytest.warns(UserWarning, match="1 of 3 facts were given twice"):
        twice = memit(atlas_lm, [*FACTS[:2], FACTS[0]], settings, moments=MOMENTS, progress=False)
    once = memit(atlas_lm, FACTS[:2], settings, moments=MOMENTS, progress=False)
    assert twice.to_bytes() == once.to_bytes()


def test_more_facts_than_dimensions_are_a_dense_change() -> None:
    lm = tiny_lm("gpt2")
    facts = [Fact("{} is in", f"Number {i}", "Rome") for i in range(30)]
    settings = MemitSettings(layers=[1], steps=1, contexts=FEW)
    edit = get_method("memit")(lm, facts, settings, moments=MOMENTS, progress=False)
    assert edit.deltas[0].right is None
    few = get_method("memit")(lm, facts[:5], settings, moments=MOMENTS, progress=False)
    assert few.deltas[0].rank == 5
