"""What each step of a long run costs, a line a step in costs.jsonl: seconds, and memory of the process behind it.

    {"step": 17, "seconds": 0.0412, "cpu": 0.0398, "rss": 612352000, "anonymous": 401211392}

`step` counts from 0; `seconds` are those of the step with its save, without measurements, `cpu` those that the process
computed meanwhile, on all its threads; `rss` is the resident memory in bytes, `anonymous` the part of it that is no
mapped file. Lines are only appended, and one that a kill has cut short
is removed: a run that was resumed has some steps twice, of which the later lines count.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from editkit.errors import OutputError, RecordError
from editkit.models.memory import own_bytes, resident_bytes


@dataclass(frozen=True)
class Cost:
    """One line."""

    step: int
    seconds: float
    cpu: float
    rss: int
    anonymous: int


class Costs:
    """`with Costs(path) as costs: ... with costs.of(step): ...`. Raises OutputError when it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _cut(path)
        self._file = path.open("a", encoding="ascii")

    def __enter__(self) -> "Costs":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._file.close()

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Time the body, and append the line of this step, unless the body fails."""
        began, computed = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - began, time.process_time() - computed
        line = {"step": step, "seconds": round(seconds, 6), "cpu": round(cpu, 6), "rss": resident_bytes()}
        line["anonymous"] = own_bytes()
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"'{self.path}' could not be written: {error.strerror}. Free some space.") from error


def read_costs(path: Path) -> list[Cost]:
    """The costs of all steps in their order, the latest line of each. Raises RecordError for a damaged file."""
    found: dict[int, Cost] = {}
    try:
        for line in path.read_text(encoding="ascii").splitlines():
            cost = Cost(**json.loads(line))
            found[cost.step] = cost
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"'{path}' cannot be read as costs of steps: {error}. Run it again.") from error
    return [found[step] for step in sorted(found)]


def _cut(path: Path) -> None:
    """Remove a last line that is not whole."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
