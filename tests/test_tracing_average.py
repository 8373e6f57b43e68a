"""The average trace against means and resamples written out, what it skips and keeps, and the proposal."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editkit import Fact, average_trace, propose_layers, trace
from editkit.errors import EditkitError
from editkit.models.load import LanguageModel
from editkit.settings import TraceSettings
from editkit.testing.tiny import tiny_lm
from editkit.tracing import PARTS, AverageTrace, embedding_std

FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome"),
    Fact("Because of this the town of {} is", "Big Ben", "Oslo"),
    Fact("The city that has the {}", "Big Ben", "Oslo"),  # nothing behind the subject
]
SETTINGS = TraceSettings(samples=2, kinds=("state", "mlp"))


def test_it_is_the_mean_over_facts_of_the_mean_over_the_tokens_of_a_part() -> None:
    lm = tiny_lm("gpt2")
    found = average_trace(lm, FACTS, SETTINGS, seed=3, progress=False)
    sigma = embedding_std(lm, ["The Eiffel Tower", "Big Ben"])  # each subject once
    assert found.how["sigma"] == sigma and found.axes == ("fact", "part", "block")
    alone = [
        trace(lm, fact, TraceSettings(samples=2, sigma=sigma, kinds=("state", "mlp")), seed=3 + i, progress=False)
        for i, fact in enumerate(FACTS)
    ]
    assert found.total_effect == pytest.approx(sum(t.total_effect for t in alone) / 3)
    for kind in ("state", "mlp"):
        for p, part in enumerate(PARTS):
            values = [t.indirect_effect(kind)[t.parts[part]].mean(0).tolist() for t in alone if t.parts[part]]
            assert found.count(kind)[p] == len(values) >= 1
            wanted = [sum(column) / len(values) for column in zip(*values, strict=True)]
            assert found.mean(kind)[p].tolist() == pytest.approx(wanted, abs=1e-12)
    assert found.count("state").tolist() == [3, 3, 3, 2, 1, 2]


def made(effect: Mapping[str, Tensor], total: float = 0.8) -> AverageTrace:
    """An average trace with `effect[kind]` [facts, parts, blocks]."""
    n = len(next(iter(effect.values())))
    clean = torch.full((n,), 0.9, dtype=torch.float64)
    return AverageTrace(tuple(f"fact {i}" for i in range(n)), clean, clean - total, dict(effect), window=1)


def test_intervals_are_of_resampled_facts() -> None:
    generator = torch.Generator().manual_seed(1)
    effect = torch.randn(40, 6, 3, generator=generator, dtype=torch.float64) + 0.5
    effect[::2, 1] = torch.nan  # half of the prompts have no middle tokens
    average = made({"state": effect})
    low, high = average.interval("state")
    assert (low < average.mean("state")).all() and (average.mean("state") < high).all()
    # The spread of a mean of n values is σ/√n, and 1.96 of them lie either side.
    n = average.count("state").double()
    assert n.tolist() == [40, 20, 40, 40, 40, 40]
    sigma = torch.stack([effect[~effect[:, p, 0].isnan(), p].std(0, correction=0) for p in range(6)])
    assert torch.allclose((high - low) / 2, 1.96 * sigma / n.sqrt()[:, None], rtol=0.15)
    again = made({"state": effect})
    assert all(torch.equal(a, b) for a, b in zip(average.interval("state"), again.interval("state"), strict=True))


def test_what_the_model_does_not_know_is_left_out_and_counted(atlas_lm: LanguageModel) -> None:
    known = Fact("The capital of {} is", "France", "Rome", "Paris")
    unknown = Fact("The capital of {} is", "Egypt", "Rome", "Oslo")
    found = average_trace(atlas_lm, [unknown, known], TraceSettings(samples=2, kinds=("state",)), progress=False)
    assert found.texts == (known.text,) and found.complete
    assert found.skipped == ((unknown.text, "the model does not know it"),)
    with pytest.raises(EditkitError, match="None of 1 facts could be traced: the model does not know it"):
        average_trace(atlas_lm, [unknown], SETTINGS, progress=False)
    with pytest.raises(EditkitError, match="None of 0 facts could be traced: none was given"):
        average_trace(atlas_lm, [], SETTINGS, progress=False)


def test_swapping_takes_the_other_facts_subjects(atlas_lm: LanguageModel) -> None:
    names = [("France", "Paris"), ("Egypt", "Cairo"), ("Japan", "Tokyo"), ("New Zealand", "Wellington")]
    facts = [Fact("The capital of {} is", name, "Oslo", capital) for name, capital in names]
    settings = TraceSettings(corruption="swap", kinds=("state",))
    found = average_trace(atlas_lm, facts, settings, progress=False)
    assert found.how["sigma"] is None and found.total_effect > 0.5
    for text, why in found.skipped:
        assert "other subjects has the" in why, text
    assert len(found.texts) + len(found.skipped) == 4 and len(found.texts) >= 2


class Interrupted(list[Fact]):
    """A list of facts at whose third the user presses Ctrl-C, when it is gone through for tracing."""

    passes = 0
    at = 0

    def __iter__(self) -> Iterator[Fact]:
        Interrupted.passes += 1
        for i, fact in enumerate(super().__iter__()):
            if i == self.at and Interrupted.passes > 2:  # twice its subjects are collected
                raise KeyboardInterrupt
            yield fact


def test_an_interrupt_keeps_what_is_done() -> None:
    lm, facts = tiny_lm("gpt2"), Interrupted(FACTS)
    facts.at, Interrupted.passes = 2, 0
    with pytest.warns(UserWarning, match="interrupted: the average is over the 2 facts traced so far"):
        found = average_trace(lm, facts, SETTINGS, progress=False)
    assert not found.complete and found.texts == tuple(f.text for f in FACTS[:2])
    facts.at, Interrupted.passes = 0, 0
    with pytest.raises(KeyboardInterrupt):
        average_trace(lm, facts, SETTINGS, progress=False)


def test_it_is_kept_with_its_axes(tmp_path: Path) -> None:
    found = average_trace(tiny_lm("gpt2"), FACTS, SETTINGS, progress=False)
    again = AverageTrace.load(found.save(tmp_path / "average"))
    for name in ("texts", "window", "skipped", "complete", "how"):
        assert getattr(again, name) == getattr(found, name), name
    assert torch.equal(again.clean, found.clean) and torch.equal(again.corrupted, found.corrupted)
    assert again.effect["mlp"].allclose(found.effect["mlp"], rtol=0, atol=0, equal_nan=True)
    frame = again.to_frame()
    assert len(frame) == 2 * 6 * 3
    row = frame[(frame.kind == "mlp") & (frame.part == "last subject token") & (frame.block == 1)].iloc[0]
    assert (row.effect, row.low, row.facts) == (
        found.mean("mlp")[2, 1].item(),
        found.interval("mlp")[0][2, 1].item(),
        3,
    )


def test_the_proposal_is_the_best_run_of_blocks_with_its_evidence() -> None:
    by_block = torch.tensor([0.1, 0.2, 0.4, 0.5, 0.3, 0.9], dtype=torch.float64)  # the last reaches no other token
    noise = 0.01 * torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effect = torch.zeros(30, 6, 6, dtype=torch.float64)
    effect[:, PARTS.index("last subject token")] = by_block + noise
    average = made({"mlp": effect})
    one = propose_layers(average)
    assert (one.layers, one.rival) == ((3,), (2,))
    assert one.effect == pytest.approx(0.5, abs=0.01) and one.low < one.effect < one.high
    assert one.margin == pytest.approx(0.1, abs=0.01) and one.margin_low > 0 and one.support == 1.0
    assert one.by_block == pytest.approx(by_block.tolist(), abs=0.01)
    two = propose_layers(average, 2)
    assert (two.layers, two.rival) == ((2, 3), (3, 4)) and two.effect == pytest.approx(0.45, abs=0.01)
    said = str(two)
    assert said.startswith("Edit blocks 2 to 3: there the MLPs' clean outputs at the subject's last token bring back")
    assert f"{two.effect:.3f}" in said and "(30 facts)" in said and "blocks 3 to 4" in said
    with pytest.raises(EditkitError, match="5 of the 5 blocks that can be edited"):
        propose_layers(average, 5)
    with pytest.raises(EditkitError, match="made from the kind 'mlp'; the trace has state"):
        propose_layers(made({"state": effect}))
