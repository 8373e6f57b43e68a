"""Knowledge neurons against the paper, one unit at a time in float64; what is kept, and what is written."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editkit import Fact, Session
from editkit.errors import ConfigError, EditkitError, ModelError
from editkit.methods.kn import KnSettings, asked_of, kn, shared_neurons
from editkit.methods.shared.attribution import Units, attributed
from editkit.models.experts import down_of, has_experts, keys_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.nethook import Trace
from editkit.settings import ContextSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import untouched
from tests.conftest import Near
from tests.expert_oracle import memory_of
from tests.oracles import logits_of
from tests.present import present

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large

CONTEXTS = ["{}", "The old town. {}", "Because I was there for a long time. {}"]
FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [FACT, Fact("The capital of {} is", "France", "Madrid", "Paris")]
IN_FLOAT32 = ("gemma2", "bloom")
QUICK = ("gpt2", "llama", "opt", "qwen3_moe")  # an oracle over all units takes up to 20 seconds
SLOW = [family for family in SITES if family not in QUICK]
SETTINGS = KnSettings(steps=3, fewest=2, most=6, share=0.6)


def exact(family: str) -> LanguageModel:
    """In float64, but for two: padded rows of gemma2 are not numbers there (transformers adds two masks of its least
    number), and Bloom attends in float32 all the same."""
    return tiny_lm(family, dtype=torch.float32 if family in IN_FLOAT32 else torch.float64)


# The oracle


def last_input(model: nn.Module, module: nn.Module, ids: Sequence[int]) -> Tensor:
    """What enters the module at the last token [d]."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(len(ids), -1)[-1]))
    try:
        with torch.no_grad():
            logits_of(model, ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def slope(model: nn.Module, site: str, ids: Sequence[int], token: int, units: Tensor, unit: int) -> Tensor:
    """∂P(token)/∂w of one unit, with all units of the block at `units` [D] at the last token, through the whole model.

    A down-projection is given other inputs; of experts W w is put in the place of W κ.
    """
    memory, variable = memory_of(model, site), units[unit].clone().requires_grad_(True)
    w = torch.cat((units[:unit], variable[None], units[unit + 1 :]))
    x = last_input(model, memory.module, ids)

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        flat = args[0].reshape(len(ids), -1)
        return torch.cat((flat[:-1], w[None])).reshape(args[0].shape), *args[1:]

    def behind(_: nn.Module, __: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = whole.reshape(len(ids), -1)
        kappa = memory.keys(x[None])[0].detach()
        changed = torch.cat((flat[:-1], (flat[-1] + memory.matrix() @ (w - kappa))[None])).reshape(whole.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    experts = hasattr(memory.module, "experts")
    handle = memory.module.register_forward_hook(behind) if experts else memory.module.register_forward_pre_hook(before)
    try:
        p = logits_of(model, ids, use_cache=False)[-1].softmax(-1)[token]
    finally:
        handle.remove()
    return torch.autograd.grad(p, variable)[0]


def integral(model: nn.Module, site: str, ids: Sequence[int], token: int, unit: int, steps: int) -> float:
    """Attr of one unit: w̄_i/M Σ_{k<M} ∂P(k/M · w̄)/∂w_i."""
    memory = memory_of(model, site)
    with torch.no_grad():
        full = memory.keys(last_input(model, memory.module, ids)[None])[0]
    slopes = [slope(model, site, ids, token, k / steps * full, unit) for k in range(steps)]
    return float(full[unit] / steps * torch.stack(slopes).sum())


def prompts_of(lm: LanguageModel, fact: Fact) -> list[list[int]]:
    ids: list[list[int]] = [
        lm.tokenizer(fact.filled(each.replace("{}", fact.prompt)))["input_ids"] for each in CONTEXTS
    ]
    return ids


def first_token(lm: LanguageModel, fact: Fact, answer: str) -> int:
    prompt, whole = (lm.tokenizer(text)["input_ids"] for text in (fact.text, f"{fact.text} {answer}"))
    assert whole[: len(prompt)] == prompt
    return int(whole[len(prompt)])


def plain_model(lm: LanguageModel) -> PreTrainedModel:
    model: PreTrainedModel = copy.deepcopy(lm.model).double()
    model.requires_grad_(False)
    return model


def found(lm: LanguageModel, layers: Sequence[int], engine: str = "replay", steps: int = 3) -> dict[int, Units]:
    asked = asked_of(lm, FACT, CONTEXTS)
    return attributed(lm, layers, asked.rows, asked.at, [asked.old] * len(CONTEXTS), steps, engine=engine)


@pytest.mark.parametrize("family", SITES)
def test_the_attribution_is_the_papers(family: str) -> None:
    """Some units of a block in the middle and of the last one; of experts also one that is not chosen."""
    lm, layers = exact(family), [1, tiny_lm(family).layers - 1]
    tolerance = 1e-3 if family in IN_FLOAT32 else 1e-4
    model, token = plain_model(lm), first_token(lm, FACT, "Paris")
    ours = found(lm, layers)
    for layer in layers:
        largest = ours[layer].scores.abs().max().item()
        for row, ids in enumerate(prompts_of(lm, FACT)[:2]):
            scores = ours[layer].scores[row]
            order = scores.abs().argsort(descending=True).tolist()
            for unit in [*order[:4], *order[10:20:5], order[-1]]:
                wanted = integral(model, site_of(lm, layer), ids, token, unit, 3)
                assert abs(scores[unit].item() - wanted) <= tolerance * largest > 0


@pytest.mark.parametrize("family", SITES)
@pytest.mark.filterwarnings("error:.*full depth")
def test_replay_equals_full_depth(family: str) -> None:
    lm = exact(family)
    layers, tolerance = list(range(lm.layers)), 2e-3 if family in IN_FLOAT32 else 1e-5
    fast, slow = found(lm, layers), found(lm, layers, "full")
    for layer in layers:
        a, b = fast[layer], slow[layer]
        assert (a.scores - b.scores).norm() <= tolerance * b.scores.norm() > 0
        assert (a.values - b.values).norm() <= 1e-5 * b.values.norm()


def test_the_scores_of_a_block_add_up_to_what_it_does() -> None:
    """Completeness of integrated gradients: Σ Attr = P(w̄) − P(0)."""
    lm = tiny_lm("gpt2", dtype=torch.float64)
    asked = asked_of(lm, FACT, CONTEXTS[:1])
    units = attributed(lm, [1], asked.rows, asked.at, [asked.old], 2000)[1]
    ids = prompts_of(lm, FACT)[0]

    def p(scale: float) -> float:
        def scaled(given: Tensor) -> Tensor:
            given = given.clone()
            given[:, len(ids) - 1] *= scale
            return given

        with torch.no_grad(), Trace(lm.model, down_of(lm, 1), outputs=False, edit_input=scaled):
            return logits_of(lm.model, ids)[-1].softmax(-1)[asked.old].item()

    assert units.scores.sum().item() == pytest.approx(p(1.0) - p(0.0), rel=5e-3)


def refined(scores: dict[tuple[int, int], list[float]], settings: KnSettings) -> list[tuple[int, int]]:
    """The units that are kept, by plain loops over prompts. `scores`: of each unit in each prompt."""
    prompts = len(next(iter(scores.values())))
    votes: dict[tuple[int, int], int] = {}
    for row in range(prompts):
        most = max(each[row] for each in scores.values())
        for unit, each in scores.items():
            if each[row] > 0 and each[row] >= settings.threshold * most:
                votes[unit] = votes.get(unit, 0) + 1
    ranked = sorted(votes, key=lambda unit: (votes[unit], sum(scores[unit])), reverse=True)
    shared = [unit for unit in ranked if votes[unit] >= settings.share * prompts]
    return ranked[: settings.fewest] if len(shared) < settings.fewest else shared[: settings.most]


@pytest.mark.cells
@pytest.mark.parametrize("operation", ["update", "erase", "amplify"])
@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_the_edit_is_the_papers(family: str, operation: str, near: Near) -> None:
    """All units of one block in float64, kept by plain loops, and their columns."""
    lm = exact(family)
    settings = replace(SETTINGS, layers=[1], operation=operation, steps=2)
    model, fact = plain_model(lm), FACT
    old, new = (first_token(lm, fact, answer) for answer in ("Paris", "Rome"))
    memory = memory_of(model, site_of(lm, 1))
    W = memory.matrix()
    scores = {
        (1, unit): [integral(model, site_of(lm, 1), ids, old, unit, 2) for ids in prompts_of(lm, fact)[:2]]
        for unit in range(W.shape[1])
    }
    kept = refined(scores, settings)
    with torch.no_grad():
        values = torch.stack(
            [memory.keys(last_input(model, memory.module, ids)[None])[0] for ids in prompts_of(lm, fact)[:2]]
        ).mean(0)
    head = present(model.get_output_embeddings()).get_parameter("weight")
    expected = torch.zeros_like(W)
    for _, unit in kept:
        column = W[:, unit]
        update = 8 * head[new] / head[new].norm() - head[old] / head[old].norm()
        expected[:, unit] = {
            "update": (1 if values[unit] >= 0 else -1) * column.norm() * update,
            "erase": -column,
            "amplify": column,
        }[operation]
    with untouched(lm, down_of(lm, 1)):
        edit = kn(lm, fact, settings, contexts=CONTEXTS[:2], progress=False)
    (delta,) = edit.deltas
    assert {(1, n["unit"]) for n in edit.provenance["reports"][0]["neurons"]} == {*kept} and delta.rank == len(kept)
    near("kn", family, delta.change(), expected, 1e-5)
    if operation == "erase":
        with edit.applied(lm):
            assert all(not memory_of(lm.model, site_of(lm, 1)).matrix()[:, unit].any() for _, unit in kept)


def test_a_column_is_what_its_unit_writes() -> None:
    """To erase or double columns is to zero or double units, at every token."""
    lm = tiny_lm("llama")
    inputs = tokenise(lm, [FACT.text, "The old bridge of stone"]).inputs()
    for operation, factor in (("erase", 0.0), ("amplify", 2.0)):
        edit = kn(lm, FACT, replace(SETTINGS, operation=operation), contexts=CONTEXTS, progress=False)
        units = edit.provenance["reports"][0]["neurons"]
        sites = sorted({down_of(lm, unit["layer"]) for unit in units})

        def scaled(given: Tensor, site: str, units: Any = units, factor: float = factor) -> Tensor:
            given = given.clone()
            for unit in units:
                if down_of(lm, unit["layer"]) == site:
                    given[..., unit["unit"]] *= factor
            return given

        with torch.no_grad():
            with Trace(lm.model, sites, outputs=False, edit_input=scaled):
                wanted = lm.model(**inputs).logits
            clean = lm.model(**inputs).logits
            with edit.applied(lm):
                torch.testing.assert_close(lm.model(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - clean).abs().max() > 1e-2


# What is kept


def units_of(scores: list[list[float]]) -> Units:
    found = torch.tensor(scores, dtype=torch.float64)
    return Units(torch.ones_like(found), found)


def test_units_are_kept_by_prompts_and_then_by_attribution() -> None:
    units = {0: units_of([[1.0, 0.3, 0.1], [1.0, 0.1, 0.9]]), 2: units_of([[0.0, 0.5, -3.0], [0.2, 0.6, -3.0]])}
    settings = KnSettings(threshold=0.25, share=0.9, fewest=1, most=5)
    assert [(n.layer, n.unit, n.prompts) for n in shared_neurons(units, settings)] == [(0, 0, 2), (2, 1, 2)]
    fewer, more = replace(settings, most=1), replace(settings, fewest=4)
    assert [(n.layer, n.unit) for n in shared_neurons(units, fewer)] == [(0, 0)]
    assert [(n.layer, n.unit) for n in shared_neurons(units, more)] == [(0, 0), (2, 1), (0, 2), (0, 1)]
    assert shared_neurons({0: units_of([[-1.0, 0.0]])}, settings) == []


def test_two_facts_on_one_unit_add_up_and_are_erased_once() -> None:
    lm = tiny_lm("gpt2")
    settings = replace(SETTINGS, layers=[1], fewest=64, most=64, threshold=1e-9)
    edits = [kn(lm, facts, settings, contexts=CONTEXTS, progress=False) for facts in (FACTS, FACTS[:1], FACTS[1:])]
    both, one, other = (edit.deltas[0].change() for edit in edits)
    assert (one.any(0) & other.any(0)).sum() > 3
    torch.testing.assert_close(both, one + other, rtol=1e-5, atol=1e-6)
    erased = kn(lm, FACTS, replace(settings, operation="erase"), contexts=CONTEXTS, progress=False).deltas[0].change()
    W = memory_of(lm.model, site_of(lm, 1)).matrix().detach().double()
    assert torch.equal(erased.any(0), one.any(0) | other.any(0))
    assert torch.equal(erased[:, erased.any(0)], -W[:, erased.any(0)])


def test_the_sign_is_the_units() -> None:
    """Of a gated MLP units are under 0 too: a column is turned, so that the unit adds the new answer."""
    lm = tiny_lm("llama")
    edit = kn(lm, FACT, replace(SETTINGS, fewest=10, most=10), contexts=CONTEXTS[:1], progress=False)
    asked = asked_of(lm, FACT, CONTEXTS[:1])
    head, signs = lm.model.get_submodule("lm_head").get_parameter("weight").detach().double(), []
    for delta in edit.deltas:
        site = delta.module
        with torch.no_grad(), Trace(lm.model, site, inputs=True, outputs=False) as trace:
            lm.model(**tokenise(lm, [FACT.text]).inputs())
        key = keys_of(lm, site, trace.input[0, -1]).double()
        added = delta.change() @ key
        assert added @ head[asked.new or 0] > 0
        signs += key[delta.change().any(0)].sign().tolist()
    assert {*signs} == {1.0, -1.0}


# Answers


def test_answers_are_told_apart_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    text = "The mouth of the river Rhine lies in the"

    def asked(new: str, old: str) -> tuple[str, str, str | None]:
        found = asked_of(lm, Fact("The mouth of {} lies in the", "the river Rhine", new, old), CONTEXTS)
        ids = found.rows.ids[0, : found.at[0] + 1].tolist()
        assert all(at == found.rows.last(row) or at < found.rows.last(row) for row, at in enumerate(found.at))
        told = None if found.new is None else str(lm.tokenizer.decode([found.new]))
        return str(lm.tokenizer.decode(ids)), str(lm.tokenizer.decode([found.old])), told

    def pieces(answer: str) -> list[str]:
        return [str(lm.tokenizer.decode([i])) for i in lm.tokenizer(f" {answer}")["input_ids"]]

    north, black = pieces("North Sea"), pieces("Black Sea")
    assert asked("Black Sea", "North Sea") == (text, north[0], black[0])
    united, kingdom = pieces("North Carolina Sea"), pieces("North Dakota Sea")
    same = next(i for i, (a, b) in enumerate(zip(united, kingdom, strict=False)) if a != b)
    assert same > 0
    begin = text + "".join(united[:same])
    assert asked("North Carolina Sea", "North Dakota Sea") == (begin, kingdom[same], united[same])
    # One answer goes on where the other has ended.
    longer = text + "".join(north)
    says = lm.tokenizer.decode([int(logits_of(lm.model, lm.tokenizer(longer)["input_ids"])[-1].argmax())])
    assert asked("North Sea Coast", "North Sea") == (longer, says, pieces("North Sea Coast")[len(north)])
    assert asked("North Sea", "North Sea Coast") == (longer, pieces("North Sea Coast")[len(north)], None)
    # Without an old answer it is what the model says.
    says = lm.tokenizer.decode([int(logits_of(lm.model, lm.tokenizer(text)["input_ids"])[-1].argmax())])
    assert asked("Black Sea", "") == (text, says, black[0])


# Sessions, refusals


@pytest.mark.parametrize("operation", ["update", "erase"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_undone_and_resumed(family: str, operation: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    settings = replace(SETTINGS, operation=operation, contexts=ContextSettings(lengths=(3,), counts=(2,)))
    start = lm.digest
    with Session(lm, "kn", settings, progress=False) as session:
        first = session.edit(FACTS[0])
        alone = lm.digest
        second = session.edit(FACTS[1])
        assert first.provenance["contexts"] == second.provenance["contexts"]  # of the unedited model
        session.save(tmp_path)
        both = lm.digest
        session.undo(1)
        assert lm.digest == alone
    assert lm.digest == start
    with Session.load(tmp_path, lm, progress=False) as again:
        assert lm.digest == both
        again.undo(1)
        assert again.edit(FACTS[1]).to_bytes() == second.to_bytes() and lm.digest == both
    assert lm.digest == start


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"operation": "forget"}, "method.operation must be one of update, erase, amplify; found 'forget'"),
        ({"threshold": 0.0}, r"method.threshold must be in \(0, 1\]"),
        ({"share": 1.5}, r"method.share must be in \(0, 1\]"),
        ({"fewest": 6}, "method.fewest must be 1 or more, and not above method.most; found 6"),
        ({"lambda_new": -1.0}, "method.lambda_new must be 0 or more"),
        ({"steps": 0}, "method.steps must be positive"),
        ({"layers": []}, "method.layers must be one block or more"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            KnSettings(**options)
    lm = tiny_lm("gpt2")
    before = lm.digest
    with pytest.raises(ModelError, match="Layer 9 was asked for"):
        kn(lm, FACT, replace(SETTINGS, layers=[9]), contexts=CONTEXTS, progress=False)
    nothing = {1: units_of([[-1.0] * 64] * 3)}
    with monkeypatch.context() as patch, pytest.raises(EditkitError, match=r"No unit of blocks \[1\] makes"):
        patch.setattr("editkit.methods.kn.attributed", lambda *_, **__: nothing)
        kn(lm, FACT, replace(SETTINGS, layers=[1]), contexts=CONTEXTS, progress=False)
    assert lm.digest == before


def test_a_dense_block_of_a_mixture_is_one_of_the_blocks() -> None:
    lm = tiny_lm("qwen2_moe")
    assert not has_experts(lm, 0) and has_experts(lm, 1)
    units = found(lm, [0, 1])
    assert units[0].values.shape[1] == 64 and units[1].values.shape[1] == 4 * 24
    chosen = units[1].values.view(3, 4, 24).any(-1).sum(1)
    assert chosen.tolist() == [2, 2, 2] and not units[1].scores[units[1].values == 0].any()
