"""Step: one part of a run, with what it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Step:
    """One step of a run. `device`, `host`: bytes beside the weights while it runs, there and in the CPU's memory."""

    name: str
    operations: float = 0.0
    seconds: float = 0.0
    device: float = 0.0
    host: float = 0.0
    note: str = ""

    def times(self, count: float) -> "Step":
        """The same done so many times, one after the other."""
        return replace(self, operations=self.operations * count, seconds=self.seconds * count)


def together(name: str, steps: Sequence[Step]) -> Step:
    """Steps as one, with the most memory that any of them takes."""
    return Step(
        name,
        sum(step.operations for step in steps),
        sum(step.seconds for step in steps),
        max((step.device for step in steps), default=0.0),
        max((step.host for step in steps), default=0.0),
        "; ".join(dict.fromkeys(step.note for step in steps if step.note)),
    )
