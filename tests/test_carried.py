"""What a session carries: S of earlier facts against the papers by direct solves, and its state against its steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact, Session
from editkit.edits.base import Base
from editkit.errors import EditkitError
from editkit.methods import get_method
from editkit.methods.betaedit import BetaEditSettings
from editkit.methods.emmet import EmmetSettings, equality
from editkit.methods.encore import EncoreSettings
from editkit.methods.ft import FtSettings
from editkit.methods.memit_seq import MemitSeqSettings
from editkit.methods.pmet import PmetSettings
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import MANY, Held, least_squares
from editkit.models.experts import down_of, has_experts, site_of
from editkit.models.load import LanguageModel
from editkit.moments import Identity, second_moments
from editkit.moments.experts import FactoredExperts
from editkit.settings import MomentSettings
from editkit.testing.tiny import EXPERTS, SITES, tiny_lm
from tests.conftest import Near, inputs_of
from tests.expert_oracle import memory_of
from tests.oracles import session_updates, spread_updates
from tests.test_experts import CONTEXTS, FACTS, blocks_of
from tests.test_methods import SETTINGS, random_moment

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),  # on tiny random models it is large
    pytest.mark.filterwarnings("ignore:The second moment at"),  # and few tokens are read
]

MOMENTS = MomentSettings(tokens=2000)
KEEPING: dict[str, Any] = {
    "memit_seq": MemitSeqSettings(mom2_update_weight=30.0),
    "encore": EncoreSettings(mom2_update_weight=30.0, gamma=2.0, stop_likeliest=2),
    "emmet": EmmetSettings(mom2_update_weight=2.0, keep_earlier=True),
    "pmet": PmetSettings(mom2_update_weight=30.0, kl_factor=0.5, stop_kl=0.0, keep_earlier=True),
    "alphaedit": SETTINGS["alphaedit"],
    "betaedit": BetaEditSettings(fraction=0.5, l2=0.5, mom2_update_weight=3.0, rebuild_every=1, largest=1e9),
}
BATCHES = [FACTS[:1], FACTS[1:]]
FULL = ("memit_seq", "encore", "betaedit")
CELLS = [(family, method) for family in SITES for method in FULL]
CELLS += [(family, method) for family in ("gpt2", "llama", "mixtral") for method in KEEPING if method not in FULL]


def apart(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖."""
    return float((ours - exact).norm() / exact.norm())


def settings_for(lm: LanguageModel, method: str, **more: Any) -> Any:
    one = method == "emmet" or lm.architecture.mlp_norm is not None
    quick = {"steps": 3, "clamp": 0.75, "stop_loss": 0.0, "solver": "adam", "lr": 0.02, "weight_decay": 1e-3}
    return replace(KEEPING[method], layers=[1] if one else [0, 1], **quick | more)


# S in a session


@pytest.mark.cells
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_a_session_is_the_oracles(family: str, method: str, monkeypatch: pytest.MonkeyPatch, near: Near) -> None:
    """S from keys that the oracle measures again on the edited model."""
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    settings = settings_for(lm, method)
    layers = settings.layers
    moments = second_moments(lm, layers, MOMENTS, progress=False)
    given = {"moments": moments, "contexts": CONTEXTS}
    monkeypatch.setattr("editkit.methods.shared.prelude.shared_inputs", lambda *_: given)
    ridge = 0.0 if method in ("alphaedit", "betaedit") else MOMENTS.ridge
    expected = session_updates(
        lm.model,
        method,
        lm.architecture.block,
        lm.architecture.attention,
        [site_of(lm, layer) for layer in layers],
        layers,
        [[inputs_of(lm, fact, CONTEXTS) for fact in batch] for batch in BATCHES],
        [blocks_of(moments[layer], ridge) for layer in layers],
        settings,
        memory_of,
        own_target=lm.architecture.mlp_norm is not None,
        rebuild=[not has_experts(lm, layer) for layer in layers] if method == "betaedit" else (),
    )
    with Session(lm, method, settings, moments=moments, progress=False) as session:
        for batch, updates in zip(BATCHES, expected, strict=True):
            for delta, update in zip(session.edit(batch).deltas, updates, strict=True):
                near(f"{method}, a session", family, delta.change(), update, 1e-4)
        keys = [step.memory[down_of(lm, layer)] for step in session.steps for layer in layers]
        assert [k.shape[1] for k in keys] == [1] * len(layers) + [len(FACTS) - 1] * len(layers)


@pytest.mark.parametrize("method", ["memit_seq", "emmet", "pmet"])
def test_without_earlier_facts_nothing_is_kept(method: str) -> None:
    lm = tiny_lm("gpt2")
    settings = settings_for(lm, method)
    plain = get_method("memit" if method == "memit_seq" else method)
    given: dict[str, Any] = {"moments": MOMENTS, "contexts": CONTEXTS, "progress": False}
    first = get_method(method)(lm, FACTS[0], settings, **given)
    with first.applied(lm):
        off = plain(lm, FACTS[1], replace(settings, keep_earlier=False), earlier=[first], **given)
        alone = get_method(method)(lm, FACTS[1], settings, **given)
        after = get_method(method)(lm, FACTS[1], settings, earlier=[first], **given)
    assert not off.memory and after.memory
    assert all(torch.equal(a.change(), b.change()) for a, b in zip(off.deltas, alone.deltas, strict=True))
    assert not torch.equal(after.deltas[0].change(), alone.deltas[0].change())


@pytest.mark.parametrize("method", ["memit_seq", "emmet", "betaedit"])
def test_undone_and_resumed_a_session_carries_what_its_steps_give(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    settings = settings_for(lm, method)

    def opened() -> Session:
        return Session(lm, method, settings, moments=MOMENTS, progress=False)

    more = replace(FACTS[0], subject="Big Ben")
    with opened() as session:
        for fact in FACTS:
            session.edit(fact)
        session.undo(1)
        session.save(tmp_path)
        weights = {name: p.clone() for name, p in lm.model.named_parameters()}
        after = session.edit(more)
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as again:
        assert all(torch.equal(p, weights[name]) for name, p in lm.model.named_parameters())
        assert again.edit(more).to_bytes() == after.to_bytes()
    with opened() as other:  # the first two steps alone: the third was computed on top of the one that was undone
        other.edit(FACTS[0])
        other.edit(FACTS[2])
        never = other.edit(more)
    assert never.to_bytes() != after.to_bytes()


def test_batches_one_after_the_other_are_one_batch() -> None:
    """Least squares with S is recursive: in one block, with R what is still missing."""
    moment, draw = random_moment(40, 400), torch.Generator().manual_seed(0)
    keys = torch.randn(40, 30, generator=draw, dtype=torch.float64)
    wanted = torch.randn(20, 30, generator=draw, dtype=torch.float64)
    whole = wanted @ least_squares(Held(moment.factor(), 5.0), keys)
    held, total = Held(moment.factor(), 5.0), torch.zeros(20, 40, dtype=torch.float64)
    for some in (slice(0, 1), slice(1, 2), slice(2, 12), slice(12, 30)):
        missing = wanted[:, some] - total @ keys[:, some]
        total = total + missing @ least_squares(held, keys[:, some])
        held = held.also(keys[:, some])
    assert apart(total, whole) <= 1e-9


def test_betaedit_refuses_a_step_that_is_too_large() -> None:
    lm = tiny_lm("gpt2")
    settings = settings_for(lm, "betaedit", largest=1e-3)
    before = lm.digest
    with Session(lm, "betaedit", settings, moments=MOMENTS, progress=False) as session:
        with pytest.raises(EditkitError, match="‖ΔW‖/√n is .* over method.largest=0.001"):
            session.edit(FACTS)
        assert session.steps == [] and lm.digest == before


def test_encore_stops_a_value_that_says_the_target() -> None:
    """At the step of the oracle; with a learning rate at which the target becomes the likeliest."""
    lm = tiny_lm("gpt2", dtype=torch.float64)
    moments = second_moments(lm, [1], MOMENTS, progress=False)
    # The subject stands last: attention with random weights carries next to nothing from it to a later token.
    facts = [Fact("The city of {}", "The Eiffel Tower", "Rome"), Fact("The capital of {}", "France", "Madrid")]
    found = []
    for times in (1, 2):
        settings = settings_for(lm, "encore", steps=40, lr=1.0, clamp=30.0, stop_likeliest=times)
        settings = replace(settings, layers=[1])
        edit = get_method("encore")(lm, facts, settings, moments=moments, contexts=CONTEXTS, progress=False)
        (expected,) = spread_updates(
            lm.model,
            "encore",
            lm.architecture.block,
            lm.architecture.attention,
            [site_of(lm, 1)],
            [1],
            [inputs_of(lm, fact, CONTEXTS) for fact in facts],
            [blocks_of(moments[1], MOMENTS.ridge)],
            settings,
        )
        assert apart(edit.deltas[0].change(), expected) <= 1e-4
        found.append([len(report["steps"]) for report in edit.provenance["reports"]])
    (one, never), (two, _) = found
    assert 1 < one < two < never == 40  # the second fact's target is never the likeliest


@pytest.mark.parametrize("method", ["memit_seq", "alphaedit", "ft"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_simie_rewrites_each_step(family: str, method: str, tmp_path: Path, near: Near) -> None:
    lm = tiny_lm(family)
    settings: Any = FtSettings(layer=1, steps=2, simie=7.0) if method == "ft" else settings_for(lm, method, simie=7.0)
    given: dict[str, Any] = {"moments": MOMENTS, "progress": False}
    with Session(lm, method, settings, **given) as session:
        if method == "ft":
            with pytest.raises(EditkitError, match="method=ft remembers none of .*memit_seq"):
                session.edit(FACTS[0])
            return
        options = session._of_base()  # the contexts and second moments of the unedited model
        S: dict[str, Tensor] = {}
        for batch in BATCHES:
            base = get_method(method)(lm, batch, settings, earlier=list(session.steps), progress=False, **options)
            for delta, before in zip(session.edit(batch).deltas, base.deltas, strict=True):
                keys = base.memory[delta.module].double()
                S[delta.module] = S.get(delta.module, torch.zeros(())) + keys @ keys.T
                wanted = before.change() @ keys @ keys.T
                wanted = wanted @ torch.linalg.inv(7.0 * torch.eye(len(keys)).double() + S[delta.module])
                near(f"{method}, SimIE", family, delta.change(), wanted, 1e-5)
        session.undo(0)
        session.save(tmp_path)
        after = session.edit(FACTS[0])
    with Session.load(tmp_path, lm, **given) as again:
        assert again.edit(FACTS[0]).to_bytes() == after.to_bytes()


# Its fast forms


def experts(count: int, size: int) -> FactoredExperts:
    blocks = torch.stack([random_moment(size, 200, seed).matrix for seed in range(count)])
    return FactoredExperts("here", blocks, 0.0, (100,) * count)


PRIORS: dict[str, Callable[[], Any]] = {
    "one": lambda: random_moment(48, 400).factor(),
    "identity": Identity,
    "experts": lambda: experts(4, 12),
}


@pytest.mark.parametrize("prior", PRIORS)
def test_both_forms_are_the_direct_solve(prior: str) -> None:
    factored, draw = PRIORS[prior](), torch.Generator().manual_seed(1)
    held, a = Held(factored, 3.0), 3.0 * factored.matrix(48)
    forms = set()
    for n in (1, 1, 2, 5, 60, 1):
        keys = torch.randn(48, n, generator=draw, dtype=torch.float64)
        assert apart(held.solve(keys), torch.linalg.solve(a, keys)) < 1e-8
        assert apart(held.matrix(48), a) < 1e-8
        assert apart(least_squares(held, keys), keys.T @ torch.linalg.inv(a + keys @ keys.T)) < 1e-8
        weighed = torch.linalg.inv(a)
        exact = torch.linalg.solve(keys.T @ weighed @ keys + 0.1 * torch.eye(n), keys.T @ weighed)
        assert apart(equality(held, keys, 0.1), exact) < 1e-7
        held, a = held.also(keys), a + keys @ keys.T
        forms.add(held.earlier.inverse is None)
    assert forms == ({True} if prior == "experts" else {True, False})


def test_q_does_not_drift() -> None:
    """After 1,000 steps, of which many keys are nearly alike."""
    moment, draw = random_moment(48, 400), torch.Generator().manual_seed(2)
    held, a = Held(moment.factor(), 1.0), moment.matrix.clone()
    few = torch.randn(48, 10, generator=draw, dtype=torch.float64)
    for number in range(1000):
        keys = few[:, number % 10 :][:, :1] + 0.01 * torch.randn(48, 1, generator=draw, dtype=torch.float64)
        held, a = held.also(keys), a + keys @ keys.T
    assert held.earlier.inverse is not None and MANY * 48 < 1000
    probe = torch.randn(48, 5, generator=draw, dtype=torch.float64)
    assert apart(held.solve(probe), torch.linalg.solve(a, probe)) <= 1e-9


# The state


def step(value: float) -> Edit:
    return Edit((), Base("", "", ""), memory={"x": torch.tensor([value])})


def test_the_state_is_that_of_the_steps_whatever_was_asked_before() -> None:
    carried, added = Carried(), list[float]()

    def asked(earlier: list[Edit], name: str = "sums") -> list[float]:
        def add(state: list[float], edit: Edit) -> list[float]:
            added.append(edit.memory["x"].item())
            return [*state, edit.memory["x"].item()]

        added.clear()
        return carried.state(name, earlier, list, add)

    one, two, three = step(1), step(2), step(3)
    assert asked([one]) == [1] and added == [1]
    assert asked([one, two, three]) == [1, 2, 3] and added == [2, 3]  # goes on
    assert asked([one, two, three]) == [1, 2, 3] and added == []
    assert asked([one, three]) == [1, 3] and added == [1, 3]  # a step was undone
    assert asked([one], "other") == [1] and asked([]) == []
    assert asked([step(1)]) == [1] and added == [1]  # an equal step is another one


def test_a_step_that_fails_leaves_the_state() -> None:
    carried = Carried()

    def add(state: Tensor, edit: Edit) -> Tensor:
        if edit.memory["x"].item() < 0:
            raise KeyboardInterrupt
        return state + edit.memory["x"]

    def start() -> Tensor:
        return torch.zeros(1)

    good = [step(1), step(2)]
    assert carried.state("sum", good, start, add).item() == 3
    with pytest.raises(KeyboardInterrupt):
        carried.state("sum", [*good, step(4), step(-1)], start, add)
    assert carried.state("sum", [*good, step(8)], start, add).item() == 11


def test_families_are_all_here() -> None:
    assert {family for family, _ in CELLS} == {*SITES} and {*EXPERTS} < {*SITES}
