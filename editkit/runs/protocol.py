"""The protocol of a run: how it edits, when it asks, and how an answer is read. No torch.

The same method reads 99 or 66 by it (WILD, arXiv 2502.11177), so every record states it, and a page puts two figures
into one column only where it is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from editkit.metrics.natural import STOPS
from editkit.settings import Config, LifelongSettings

SINGLE, BATCH, STREAM = "single", "batch", "stream"
NOT_STATED = "not stated"
# What pages call each field.
LABELS = {
    "edits": "edits",
    "together": "cases in one edit",
    "total": "cases edited when measured",
    "measured": "measured",
    "answers": "answers",
    "stop": "free answers end",
    "form": "prompt form of free answers",
    "judge": "judge of free answers",
}


@dataclass(frozen=True)
class RunProtocol:
    """How a run edits and asks.

    - `edits`: single, each case alone on the unedited model; batch, several cases in one edit; stream, one edit after
      the other on one model.
    - `together`: cases in one edit. `total`: cases whose edits are in force when the last of them is measured.
    - `measured`: when, in words.
    - `answers`: teacher-forced, or teacher-forced and free.
    - `stop`: what ends a free answer. `form`: of the prompts of free answers. `judge`: what says whether one is right.
      "" without free answers.
    """

    edits: str
    together: int
    total: int
    measured: str
    answers: str
    stop: str = ""
    form: str = ""
    judge: str = ""

    @classmethod
    def of(cls, config: Config, cases: int = 1) -> Self:
        """The protocol of a run of `config` that edits so many cases."""
        task = config.task
        size = getattr(task, "size", 1)
        together = min(cases, cases if size is None else size)
        if isinstance(task, LifelongSettings):
            edits, together, total, measured = STREAM, min(task.step, cases), cases, "after all edits"
        elif together > 1:
            edits, total, measured = BATCH, together, "after the one edit of all its cases"
        else:
            edits, total, measured = SINGLE, 1, "after each edit, which is then taken back"
        measure = task.measure
        if not measure.generate:
            return cls(edits, together, total, measured, "teacher-forced")
        ends = [f"{measure.generate} tokens behind the longest answer (prefix match)"]
        if measure.natural:
            marks = " or ".join(repr(stop) for stop in STOPS)
            ends.append(f"the model's end of text, {marks}, {measure.natural} tokens at most (natural stop)")
        judge = getattr(task, "judge", None) or "exact"  # normalised exact match, of tasks without the setting
        free = "; ".join(ends), measure.form, str(judge)
        return cls(edits, together, total, measured, "teacher-forced and free", *free)

    def to_json(self) -> dict[str, Any]:
        """What a record says of it."""
        return asdict(self)


Protocol = Mapping[str, Any]  # as a record states it


def told(protocol: Protocol, fields: Sequence[str] = tuple(LABELS)) -> list[tuple[str, Any]]:
    """(label, value) of the fields that say something."""
    return [(LABELS[name], protocol[name]) for name in fields if protocol.get(name) not in (None, "")]


def differing(protocols: Sequence[Protocol]) -> list[str]:
    """The fields in which several protocols are not the same."""
    return [name for name in LABELS if len({repr(protocol.get(name)) for protocol in protocols}) > 1]


def named(protocol: Protocol, fields: Sequence[str]) -> str:
    """A protocol by some of its fields, in one line."""
    if not protocol:
        return f"protocol {NOT_STATED}"
    return "; ".join(f"{label}: {value}" for label, value in told(protocol, fields))


def difference(protocols: Sequence[Protocol]) -> str:
    """What a reader is told above figures of several protocols; "" for one."""
    different = list({repr(sorted(protocol.items())): protocol for protocol in protocols}.values())
    if len(different) < 2:
        return ""
    parts = []
    for name in differing(different):
        values = dict.fromkeys(str(protocol.get(name) or NOT_STATED) for protocol in different)
        parts.append(f"{LABELS[name]} ({' | '.join(values)})")
    return (
        f"These runs follow {len(different)} protocols, and their figures cannot be compared with each other. They "
        f"differ in: {'; '.join(parts)}."
    )
