"""Doctor: is this edit fit to be used? What it changes, what rounding leaves of it, what moves, and what is wrong.

    python -m editkit.edits doctor FILE --model M

Each finding is good, a note, or bad; one bad finding is enough not to use the edit. Limits are stated here:

    base        the weights that it was computed for
    size        ‖ΔW‖/‖W‖ of each weight; over ENORMOUS edits of one fact usually break a model
    rounding    ‖round(W + ΔW) − round(W) − ΔW‖/‖ΔW‖ in bfloat16, and in 8 and 4 bits (blocks of 64 entries, each with
                its own scale, to the nearest); over LOST little is left of the edit there
    facts       log p of each target before and after, and whether it is the likeliest
    neighbors   facts of the atlas with another answer, where the model knows the atlas; else the prompts that are given
    degenerate  perplexity on prose in multiples of the unedited model's (over BROKEN it is), and text that repeats
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.data.cases import Probe
from editkit.data.kinds import REWRITE
from editkit.edits.edit import Edit
from editkit.edits.requantized import kept_and_error, sums_of
from editkit.edits.spectra import Spectrum, spectra
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.lenses import side_effects
from editkit.metrics.audit import audit, written_by
from editkit.metrics.running_text import PROSE, perplexity, text_blocks
from editkit.metrics.scoring import score_probes
from editkit.models.generate import generate
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.report.html import Page, Section, Table, Text, Tiles, save
from editkit.shown import Rows, Shown

GOOD, NOTE, BAD = "good", "note", "bad"
ENORMOUS = 1.0  # ‖ΔW‖/‖W‖
LOST = 0.5  # of ΔW, by rounding
BROKEN, HURT = 10.0, 1.5  # perplexity, in multiples of the unedited model's
REPEATS = 0.5  # share of a text's three-word pieces that were said before in it
TOKENS, TEXT = 1024, 60  # of prose for perplexity; said freely after each fact
BLOCK = 64  # entries that share a scale, of a quantiser


@dataclass(frozen=True)
class Finding:
    """One thing that was found: about what, how bad, in one sentence."""

    about: str
    kind: str
    text: str


@dataclass(repr=False)
class Examination(Shown):
    """What was found about one edit; `tables` hold the figures behind it, by title: columns, and rows."""

    edit: Edit
    model: str
    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, tuple[list[str], list[list[Any]]]] = field(default_factory=dict)

    def shown(self) -> tuple[str, Rows]:
        """Whether the edit is fit to be used, and each finding."""
        verdict = "fit to be used" if self.fit else "do not use it as it is"
        return f"Examination: {verdict}", [(each.about, f"{each.kind}: {each.text}") for each in self.findings]

    @property
    def fit(self) -> bool:
        """Whether nothing bad was found."""
        return all(finding.kind != BAD for finding in self.findings)

    def add(self, about: str, kind: str, text: str) -> None:
        self.findings.append(Finding(about, kind, text))

    def __str__(self) -> str:
        marks = {GOOD: " ", NOTE: "·", BAD: "!"}
        lines = [f"{marks[f.kind]} {f.about:<11}{f.text}" for f in self.findings]
        return "\n".join([*lines, "", "fit to be used" if self.fit else "do not use it as it is"])

    def write(self, path: Path) -> Path:
        """One HTML page of it. Raises OutputError where it cannot be written."""
        title, rows = self.edit.shown()
        worst = [f.about for f in self.findings if f.kind == BAD]
        told = "Fit to be used." if self.fit else f"Do not use it as it is: {', '.join(worst)}."
        tiles = Tiles([(f.about, f.kind, f.text) for f in self.findings])
        sections = [Section("edit", "The edit", [Table(("", ""), rows, stacked=True)])]
        sections += [Section(f"t{i}", name, [Table(*table)]) for i, (name, table) in enumerate(self.tables.items())]
        head = [Text(told, GOOD if self.fit else BAD), tiles]
        return save(Page(f"{title} on {self.model}", "examined by editkit", head, sections), path)


def examine(lm: LanguageModel, edit: Edit, prompts: Sequence[str] = (), *, progress: bool = True) -> Examination:
    """Examine an edit on a model, which is as it was afterwards, bit for bit.

    - `lm`: the base of the edit, or a model that may be it. `prompts`: what else is asked before and after.

    An edit of another base ends the examination there. Raises EditkitError for prompts the model cannot take.
    """
    found = Examination(edit, lm.name)
    # 1) Of this base?
    try:
        edit.check_base(lm)
    except EditkitError as error:
        found.add("base", BAD, str(error))
        return found
    found.add("base", GOOD, f"made for '{lm.name}' as it is, {edit.base.dtype}")
    # 2) As numbers.
    if edit.deltas:
        _size(found, spectra(edit, lm))
        _rounding(found, lm)
    # 3) As a change of behaviour.
    facts = written_by(edit)
    blocks = text_blocks(lm, PROSE, tokens=TOKENS)
    asked = [*(fact.text for fact in facts), *prompts]
    before = _facts(lm, facts), perplexity(lm, blocks), generate(lm, asked, TEXT)
    with edit.applied(lm):
        after = _facts(lm, facts), perplexity(lm, blocks), generate(lm, asked, TEXT)
    _written(found, facts, before[0], after[0])
    _neighbors(found, lm, progress=progress)
    _degenerate(found, after[1] / before[1], asked, before[2], after[2])
    if prompts and not edit.installed:
        predicted = side_effects(lm, edit, prompts).relative.tolist()
        rows = [[p, f"{size:.3g}"] for p, size in zip(prompts, predicted, strict=True)]
        found.tables["Predicted change of what the edited weights put out"] = (["prompt", "relative"], rows)
    return found


def _size(found: Examination, each: Sequence[Spectrum]) -> None:
    largest = max(each, key=lambda one: one.relative_norm or 0.0)
    size = largest.relative_norm or 0.0
    text = f"‖ΔW‖/‖W‖ is {size:.3g} at {largest.parameter}"
    found.add("size", BAD if size > ENORMOUS else GOOD, text + (f", over {ENORMOUS:g}" if size > ENORMOUS else ""))
    rows = [[one.parameter, f"{one.norm:.4g}", f"{one.relative_norm:.3g}", f"{one.effective_rank:.3g}"] for one in each]
    found.tables["Weights"] = (["weight", "‖ΔW‖", "‖ΔW‖/‖W‖", "effective rank"], rows)


def _rounding(found: Examination, lm: LanguageModel) -> None:
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ROUNDINGS}
    for delta in found.edit.deltas:  # one weight at a time: a copy in float64 is large
        weight = values_of(lm.model, delta.parameter).double().cpu()
        change = delta.matrix().double().cpu()
        for name, rounded in ROUNDINGS.items():
            sums[name] += sums_of(rounded(weight + change) - rounded(weight), change)
    rows, lost = [], {}
    for name, each in sums.items():
        shares = kept_and_error(each)
        if shares is None:
            return  # an edit of nothing
        lost[name] = shares[1]
        rows.append([name, f"{shares[0]:.3f}", f"{shares[1]:.3f}"])
    found.tables["What rounding leaves"] = (["as", "kept, ⟨left, ΔW⟩/‖ΔW‖²", "error, ‖left − ΔW‖/‖ΔW‖"], rows)
    gone = [f"{name} ({share:.2f})" for name, share in lost.items() if share > LOST]
    if gone:
        found.add("rounding", NOTE, f"its error is over {LOST:g} of ‖ΔW‖ in {', '.join(gone)}: measure the edit there")
    else:
        found.add("rounding", GOOD, f"its error is under {LOST:g} of ‖ΔW‖ in {', '.join(lost)}")


def _facts(lm: LanguageModel, facts: Sequence[Fact]) -> list[tuple[float, bool]]:
    """Of each fact: mean log p of the target's tokens, and whether each is the likeliest."""
    scored = score_probes(lm, [Probe(REWRITE, fact.text, fact.target_true, fact.target_new) for fact in facts])
    return [(-each.new.nll, each.new.greedy) for each in scored]


def _written(
    found: Examination, facts: Sequence[Fact], before: list[tuple[float, bool]], after: list[tuple[float, bool]]
) -> None:
    if not facts:
        found.add("facts", NOTE, "the file does not name any")
        return
    landed = sum(likeliest for _, likeliest in after)
    kind = GOOD if landed == len(facts) else BAD if landed < len(facts) / 2 else NOTE
    were = sum(likeliest for _, likeliest in before)
    found.add("facts", kind, f"{landed} of {len(facts)} are the likeliest answer after it, {were} before")
    rows = [[f.text, f.target_new, f"{b:.2f}", f"{a:.2f}", "yes" if ok else "no"]
            for f, (b, _), (a, ok) in zip(facts, before, after, strict=True)]  # fmt: skip
    found.tables["Facts"] = (["prompt", "target_new", "log p before", "after", "likeliest"], rows)


def _neighbors(found: Examination, lm: LanguageModel, *, progress: bool) -> None:
    try:
        asked = audit(lm, found.edit, progress=progress)
    except EditkitError:
        return  # the model does not know the atlas, or the edit has no weights to be near to
    moved = asked.changed
    share = len(moved) / len(asked.facts)
    kind = GOOD if share < 0.01 else NOTE if share < 0.05 else BAD
    found.add("neighbors", kind, f"{len(moved)} of {len(asked.facts):,} other facts of the atlas have another answer")
    rows = [[f"{each.subject}, {each.relation}", each.before, each.after, f"{each.pull:.2f}", f"{each.cosine:.2f}"]
            for each in moved[:30]]  # fmt: skip
    found.tables["Other facts that moved, with the pull that was predicted"] = (
        ["fact", "before", "after", "pull", "cosine"], rows
    )  # fmt: skip


def _degenerate(
    found: Examination, times: float, asked: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    kind = BAD if not math.isfinite(times) or times > BROKEN else NOTE if times > HURT else GOOD
    found.add("prose", kind, f"perplexity is {times:.2f} × the unedited model's")
    fresh = [text for was, text in zip(before, after, strict=True) if repeated(text) > max(REPEATS, repeated(was))]
    if fresh:
        found.add("repeats", BAD, f"{len(fresh)} of {len(after)} free texts repeat themselves, as {fresh[0][:60]!r}")
    rows = [[p, was, now] for p, was, now in zip(asked, before, after, strict=True)]
    found.tables["What the model says"] = (["prompt", "before", "after"], rows[:30])


def repeated(text: str) -> float:
    """The share of a text's pieces of three words that it had said before.

    >>> repeated("Rome Rome Rome Rome Rome"), repeated("the city of Rome is in Italy")
    (0.6666666666666666, 0.0)
    """
    words = text.split()
    pieces = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def _in_bits(bits: int) -> Any:
    """Round to the nearest of 2^bits − 1 levels about 0, with a scale for each BLOCK entries of a row."""
    most = 2 ** (bits - 1) - 1

    def rounded(weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % BLOCK)]).view(-1, BLOCK)
        scale = (padded.abs().amax(1, keepdim=True) / most).clamp_min(1e-30)
        levels: Tensor = (padded / scale).round().clamp(-most, most) * scale
        return levels.reshape(-1)[: len(flat)].view_as(weight)

    return rounded


ROUNDINGS: dict[str, Any] = {
    "bfloat16": lambda weight: weight.bfloat16().double(),
    "8 bits": _in_bits(8),
    "4 bits": _in_bits(4),
}
