"""AnyEdit against the paper at full depth in float64; its windows, its session, and a long answer that is said."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from editkit import Fact, Session
from editkit.errors import ConfigError, FactError
from editkit.methods import get_method
from editkit.methods.anyedit import AnyEditSettings, anyedit
from editkit.methods.shared.passages import Passages
from editkit.metrics.scoring import score_targets
from editkit.models.experts import down_of, site_of
from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.moments import second_moments
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import tokens_of, untouched
from tests.conftest import Near
from tests.expert_oracle import memory_of
from tests.oracles import adam, logits_of
from tests.present import present
from tests.test_experts import blocks_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),  # on tiny random models it is large
    pytest.mark.filterwarnings("ignore:The second moment at"),  # and few tokens are read
]

LONG = Fact("{} is located in the city of", "The Eiffel Tower", "Rome and of Berlin and Madrid", "Paris")
FACTS = [LONG, Fact("The capital of {} is", "France", "Madrid", "Paris")]
CONTEXTS = ["{}", "The old town. {}"]
MOMENTS = MomentSettings(tokens=2000)
SETTINGS = AnyEditSettings(
    window=3, steps=4, lr=0.1, clamp=2.0, weight_decay=0.01, mom2_update_weight=30.0, l2=0.5, fraction=0.5
)
ALPHA = replace(SETTINGS, solve="alphaedit")
CELLS = [(family, "memit", "last", 1) for family in SITES]
CELLS += [(family, "alphaedit", "last", 1) for family in ("gpt2", "llama", "opt", "gemma2", "mixtral", "qwen3_moe")]
CELLS += [(family, "memit", "subject_last", 1) for family in ("gpt2", "llama", "falcon", "mixtral")]
CELLS += [(family, "memit", token, 2) for family in ("gpt2", "llama") for token in ("last", "subject_last")]


# The oracle


def passed(
    model: nn.Module, ids: Sequence[int], name: str, added: dict[int, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [tokens, vocabulary], and input and output [tokens, d] of module `name`, with `added` at its output."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = whole.reshape(len(ids), -1).clone()
        given = args[0].reshape(len(ids), -1).clone() if args else flat
        rows = [flat[at] + added[at] if added and at in added else flat[at] for at in range(len(ids))]
        changed = torch.stack(rows)
        seen.extend((given, changed))
        return (
            (changed.reshape(whole.shape), *output[1:]) if isinstance(output, tuple) else changed.reshape(whole.shape)
        )

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        logits = logits_of(model, ids, use_cache=False)
    finally:
        handle.remove()
    return logits, seen[0], seen[1]


class Text:
    """A fact's rows in each template, and the places of its windows."""

    def __init__(self, lm: LanguageModel, fact: Fact, templates: Sequence[str], window: int, token: str) -> None:
        self.rows: list[list[int]] = []
        self.places: list[list[int]] = []  # [template][window]
        self.windows: list[list[list[int]]] = []  # [template][window]: positions
        for template in templates:
            prompt = template.replace("{}", fact.prompt)
            ids, count = tokens_of(lm, fact.filled(prompt), fact.target_new)
            answer = list(range(len(ids) - count, len(ids)))
            windows = [answer[i : i + window] for i in range(0, count, window)]
            places = [each[0] - 1 for each in windows]
            if token != "last":
                places[0] = lookup_position(tokenise(lm, [fact.filled(prompt)]), 0, prompt, fact.subject, token)
            self.rows.append(ids)
            self.places.append(places)
            self.windows.append(windows)


def window_values(model: nn.Module, site: str, text: Text, settings: Any) -> list[Tensor]:
    """z of each window at `site`: one after the other, earlier δ in place, one row at a time at full depth."""
    deltas, targets = list[Tensor](), list[Tensor]()
    for number in range(len(text.windows[0])):
        with torch.no_grad():
            v0 = passed(model, text.rows[0], site)[2][text.places[0][number]]

        def loss_of(delta: Tensor, number: int = number) -> Tensor:
            total = torch.zeros((), dtype=delta.dtype)
            for ids, places, windows in zip(text.rows, text.places, text.windows, strict=True):
                added = dict(zip(places, [*deltas, delta], strict=False))
                log_p = F.log_softmax(passed(model, ids, site, added)[0], -1)
                said = torch.stack([log_p[at - 1, ids[at]] for at in windows[number]])
                total = total - said.mean() / len(text.rows)
            return total

        delta, _ = adam(
            loss_of, v0, settings.steps, settings.lr, settings.weight_decay, settings.clamp, settings.stop_loss
        )
        deltas.append(delta)
        targets.append(v0 + delta)
    return targets


def updates(
    lm: LanguageModel, facts: Sequence[Fact], templates: Sequence[str], settings: Any, moments: Sequence[Tensor]
) -> list[Tensor]:
    """ΔW [d_model, d_ff] of each layer, by direct solves, written into a copy one after the other."""
    model: nn.Module = copy.deepcopy(lm.model).double().requires_grad_(False)
    layers, last = settings.layers, settings.layers[-1]
    norm_after = lm.architecture.mlp_norm is not None
    site = site_of(lm, last) if norm_after else lm.architecture.block.format(last)
    texts = [Text(lm, fact, templates, settings.window, settings.fact_token) for fact in facts]
    z = [value for text in texts for value in window_values(model, site, text, settings)]
    found = []
    for number, (layer, C) in enumerate(zip(layers, moments, strict=True)):
        memory = memory_of(model, site_of(lm, layer))
        keys, others, now = list[Tensor](), list[Tensor](), list[Tensor]()
        for text in texts:
            per_row = []
            for row, (ids, places) in enumerate(zip(text.rows, text.places, strict=True)):
                given = memory.keys(passed(model, ids, site_of(lm, layer))[1])
                per_row.append(given[places])
                if row == 0:
                    output = passed(model, ids, site)[2]
                    now += [output[at] for at in places]
                    others += [given[at] for at in range(len(ids)) if at not in places]
            bare, rest = per_row[0], per_row[1:]
            keys += list((bare + torch.stack(rest).mean(0)) / 2 if rest else bare)
        K, Ko, R = torch.stack(keys, 1), torch.stack(others, 1), torch.stack(z, 1) - torch.stack(now, 1)
        R = R / (len(layers) - number)
        if settings.solve == "memit":
            update = R @ K.T @ torch.linalg.inv(settings.mom2_update_weight * C + Ko @ Ko.T + K @ K.T)
        else:
            _, vectors = torch.linalg.eigh(C)
            low = vectors[:, : round(settings.fraction * len(C))]
            P, eye = low @ low.T, torch.eye(len(C), dtype=C.dtype)
            update = torch.linalg.solve(P @ (K @ K.T + Ko @ Ko.T) + settings.l2 * eye, P @ K @ R.T).T
        found.append(update)
        memory.add(update)
    return found


@pytest.mark.cells
@pytest.mark.parametrize(("family", "solve", "token", "templates"), CELLS)
def test_the_edit_is_the_papers(family: str, solve: str, token: str, templates: int, near: Near) -> None:
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    layers = [1] if lm.architecture.mlp_norm is not None else [0, 1]
    settings = replace(SETTINGS, layers=layers, solve=solve, fact_token=token).resolved("tiny", lm.layers)
    moments = second_moments(lm, layers, MOMENTS, progress=False)
    blocks = [blocks_of(moments[layer], 0.0 if solve == "alphaedit" else MOMENTS.ridge) for layer in layers]
    expected = updates(lm, FACTS, CONTEXTS[:templates], settings, blocks)
    with untouched(lm, down_of(lm, 1)):
        edit = anyedit(lm, FACTS, settings, moments=moments, contexts=CONTEXTS[:templates], progress=False)
    for delta, update in zip(edit.deltas, expected, strict=True):
        near("anyedit", family, delta.change(), update, 1e-4)
    long, short = edit.provenance["reports"]
    assert len(long["windows"]) > 1 and "windows" not in short


@pytest.mark.cells
@pytest.mark.parametrize("token", ["last", "subject_last"])
@pytest.mark.parametrize("family", SITES)
@pytest.mark.filterwarnings("error:.*full depth")
def test_replay_equals_full_depth(family: str, token: str) -> None:
    lm = tiny_lm(family, dtype=torch.float32 if family in ("gemma2", "bloom") else torch.float64)
    settings = replace(SETTINGS, layers=[1], fact_token=token)
    options: dict[str, Any] = {"moments": MomentSettings(enabled=False), "contexts": CONTEXTS, "progress": False}
    fast, slow = (anyedit(lm, FACTS, replace(settings, engine=engine), **options) for engine in ("replay", "full"))
    a, b = (edit.deltas[0].change() for edit in (fast, slow))
    assert (a - b).norm() <= 2e-3 * b.norm()
    for one, other in zip(fast.provenance["reports"], slow.provenance["reports"], strict=True):
        curves = [[step["loss"] for step in report["steps"]] for report in (one, other)]
        assert curves[0] == pytest.approx(curves[1], rel=2e-3)


# Windows


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_windows_cut_the_answer_and_nothing_is_lost(family: str) -> None:
    lm = tiny_lm(family)
    target = lm.architecture.target_site(1)
    ids, count = tokens_of(lm, LONG.text, LONG.target_new)
    assert count > 6
    for window in (1, 2, 3, count - 1, count, 40):
        passages = Passages(lm, FACTS, CONTEXTS, window, "last", [1], target)
        assert passages.windows[0] == -(-count // window)
        jobs = [passages.rows(0, number, []) for number in range(passages.windows[0])]
        cut = [job.scored.positions[0] for job in jobs]
        assert [at for each in cut for at in each] == list(range(len(ids) - count, len(ids)))
        assert [job.lookup[0] for job in jobs] == [each[0] - 1 for each in cut]
        assert all(len(each) == window for each in cut[:-1])
        assert passages.keys(1).shape[:2] == (sum(passages.windows), len(CONTEXTS))
        tokens = sum(len(tokens_of(lm, fact.text, fact.target_new)[0]) for fact in FACTS)
        assert passages.others(1).shape[1] == tokens - sum(passages.windows)


def test_a_later_window_is_computed_with_the_earlier_values_in_place() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float64)
    passages = Passages(lm, [LONG], ["{}"], 3, "last", [1], lm.architecture.target_site(1))
    deltas = [torch.randn(32, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1)]
    job = passages.rows(0, 2, deltas)
    assert [(one.row, one.position) for one in job.fixed] == [(0, at) for at in (job.lookup[0] - 6, job.lookup[0] - 3)]
    assert job.first == [job.lookup[0] - 6]
    assert all(torch.equal(one.vector, delta) for one, delta in zip(job.fixed, deltas, strict=True))


def test_a_batch_has_the_values_of_each_fact_alone() -> None:
    lm = tiny_lm("llama", dtype=torch.float64)
    settings = replace(SETTINGS, layers=[1])
    options: dict[str, Any] = {"moments": MomentSettings(enabled=False), "progress": False}
    together = anyedit(lm, FACTS, settings, **options).provenance["reports"]
    for fact, report in zip(FACTS, together, strict=True):
        (alone,) = anyedit(lm, fact, settings, **options).provenance["reports"]
        assert [s["loss"] for s in alone["steps"]] == pytest.approx([s["loss"] for s in report["steps"]], rel=1e-9)


def test_a_long_answer_is_said_freely_where_one_value_cannot_say_it(atlas_lm: LanguageModel) -> None:
    """16 tokens in windows of two; R-ROME's one value ends far from it."""
    answer = "Athens, which is said to be near the sea"
    fact = Fact("{} is located in the city of", "The Eiffel Tower", answer, "Paris")
    tokens = len(atlas_lm.tokenizer(f" {answer}")["input_ids"])
    assert tokens >= 12
    told = {}
    asked: dict[str, dict[str, Any]] = {"anyedit": {"fact_token": "subject_last"}, "r_rome": {}}
    for name, options in asked.items():
        method = get_method(name)
        edit = method(atlas_lm, fact, method.settings(**options), progress=False)
        with edit.applied(atlas_lm):
            (said,) = generate(atlas_lm, [fact.text], tokens, top_k=1, seed=0)
            (score,) = score_targets(atlas_lm, [fact.text], [answer])
            told[name] = said.strip() == answer, score.nll
        assert len(edit.provenance["reports"][0].get("windows", [0])) == (-(-tokens // 2) if name == "anyedit" else 1)
    assert told["anyedit"][0] and not told["r_rome"][0]
    assert told["anyedit"][1] < 0.5 and told["r_rome"][1] > 2.0


# Sessions, refusals


@pytest.mark.parametrize("solve", ["memit", "alphaedit"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_undone_and_resumed(family: str, solve: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    settings = replace(SETTINGS, layers=[0, 1], solve=solve)
    start, more = lm.digest, Fact("{} lies in", "Big Ben", "Oslo and in Bergen", "London")
    with Session(lm, "anyedit", settings, moments=MOMENTS, progress=False) as session:
        first = session.edit(FACTS[0])
        session.edit(FACTS[1])
        session.undo(1)
        session.save(tmp_path)
        kept = lm.digest
        after = session.edit(more)
        assert first.memory[down_of(lm, 0)].shape[1] == len(first.provenance["reports"][0]["windows"])
    assert lm.digest == start
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as again:
        assert lm.digest == kept
        step = again.edit(more)
        assert all(torch.equal(step.memory[name], after.memory[name]) for name in after.memory)
        for one, other in zip(step.deltas, after.deltas, strict=True):
            assert torch.equal(present(one.right), present(other.right)) and torch.equal(one.left, other.left)
        if family != "mixtral":  # whose recorded condition is that of the experts that were needed so far
            assert step.to_bytes() == after.to_bytes()
    with Session(lm, "anyedit", replace(settings, keep_earlier=False), moments=MOMENTS, progress=False) as session:
        assert not session.edit(FACTS[0]).memory
        forgets = session.edit(more)
    assert lm.digest == start
    assert (forgets.deltas[0].change() - after.deltas[0].change()).norm() > 1e-3 * after.deltas[0].norm()


def test_what_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"window": 0}, "method.window must be positive; found 0"),
        ({"solve": "rome"}, "method.solve must be one of memit, alphaedit; found 'rome'"),
        ({"kl_factor": 0.1}, "method.kl_factor must be 0, since AnyEdit has no KL term; found 0.1"),
        ({"l2": 0.0}, "method.l2 must be positive"),
        ({"fraction": 0.0}, "method.fraction must be in"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            AnyEditSettings(**options)
    lm = tiny_lm("gpt2")
    before = lm.digest
    behind = replace(SETTINGS, layers=[1], fact_token="subject_first_after_last")
    with pytest.raises(FactError, match="'subject_first_after_last' of 'The city of France' lies in the answer"):
        anyedit(lm, Fact("The city of {}", "France", "Rome"), behind, moments=MOMENTS, progress=False)
    assert lm.digest == before


def test_random_contexts_may_be_asked_for() -> None:
    lm = tiny_lm("gpt2")
    settings = replace(SETTINGS, layers=[1], contexts=ContextSettings(lengths=(3,), counts=(2,)))
    edit = anyedit(lm, FACTS, settings, moments=MOMENTS, progress=False)
    assert len(edit.provenance["contexts"]) == 3
    plain = anyedit(lm, FACTS, replace(SETTINGS, layers=[1]), moments=MOMENTS, progress=False)
    assert plain.provenance["contexts"] == ["{}"]
