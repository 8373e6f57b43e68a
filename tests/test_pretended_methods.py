"""Each method, family and dtype on the pretended accelerator: the edit is the CPU's, bit for bit, and comes off.

    python -m tests.test_pretended_methods          # every method × family × dtype, and a line with the counts

`make test-whole` runs a covering set: every family in every dtype, every method in every dtype and on both devices, and
every method on every mixture of experts; `make test` runs a part of it (tests/covering.py). Their last lines say how
many cells ran, how many failed, and how long they took.
"""

import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from editkit.methods import names
from editkit.models.snapshot import digests, tensors_of
from editkit.testing.tiny import DENSE, EXPERTS, tiny_lm
from tests import pretended
from tests.conftest import CELL
from tests.editing import edited

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys

FAMILIES = [*DENSE, *EXPERTS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Cell(NamedTuple):
    """One edit on the accelerator."""

    family: str
    dtype: torch.dtype
    method: str
    device: str

    def __str__(self) -> str:
        return f"{self.family}-{str(self.dtype).removeprefix('torch.')}-{self.method}-{self.device}"


def covering() -> list[Cell]:
    """Every dense family and every method in every dtype; every mixture with every method, dtypes in turn."""
    methods = names()
    cells = []
    for n, (shift, dtype) in product(range(max(len(methods), len(DENSE))), enumerate(DTYPES)):
        method = methods[(n + shift) % len(methods)]
        cells.append(Cell(DENSE[n % len(DENSE)], dtype, method, f"pretended:{shift % 2}"))
    for (f, family), (m, method) in product(enumerate(EXPERTS), enumerate(methods)):
        cells.append(Cell(family, DTYPES[(f + m) % len(DTYPES)], method, f"pretended:{(f + m) % 2}"))
    return cells


def every() -> list[Cell]:
    """Every method × family × dtype."""
    methods = names()
    return [
        Cell(*each, f"pretended:{n // len(methods) % 2}") for n, each in enumerate(product(FAMILIES, DTYPES, methods))
    ]


def failures(cell: Cell, folder: Path) -> list[str]:
    """What is wrong with a cell; run inside `pretended.accelerator()`."""
    found = []
    cpu = tiny_lm(cell.family, dtype=cell.dtype)
    with pretended.same_kernels():
        wanted = edited(cpu, cell.method, folder)
    there = tiny_lm(cell.family, dtype=cell.dtype)
    there.model.to(cell.device)  # pyright: ignore[reportArgumentType]
    before, clean = digests(tensors_of(there.model)), there.digest
    edit = edited(there, cell.method, folder)
    if edit.digest != wanted.digest:
        found.append("the edit is not the CPU's")
    if digests(tensors_of(there.model)) != before:
        found.append("computing the edit changed the model")
    with edit.applied(there, everything=True), edit.applied(cpu, everything=True):
        if there.digest != cpu.digest or there.digest == clean:
            found.append("the edited model is not the CPU's")
    if digests(tensors_of(there.model)) != before:
        found.append("not every bit is back")
    if there.digest != clean:
        found.append("something is left on the model")
    return found


@pytest.mark.cells
@pytest.mark.parametrize("cell", covering(), ids=str)
def test_an_edit_is_the_cpus(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record_property(CELL, str(cell))
    with pretended.accelerator():
        assert failures(cell, tmp_path) == []


def test_the_covering_set_covers() -> None:
    cells = covering()
    assert {(c.family, c.dtype) for c in cells} == set(product(FAMILIES, DTYPES))
    assert {(c.method, c.dtype) for c in cells} == set(product(names(), DTYPES))
    assert {(c.method, c.device) for c in cells} == set(product(names(), ("pretended:0", "pretended:1")))
    assert {(c.method, c.family) for c in cells if c.family in EXPERTS} == set(product(names(), EXPERTS))


def report(cells: Sequence[Cell]) -> int:
    """Run them all, and print what fails and the counts. The number of failures."""
    began, failed = time.monotonic(), 0
    with pretended.accelerator(), tempfile.TemporaryDirectory() as folder:
        for cell in cells:
            try:
                wrong = failures(cell, Path(folder))
            except Exception as error:
                wrong = [f"{type(error).__name__}: {error}"]
            failed += bool(wrong)
            for line in wrong:
                print(f"FAILED {cell}: {line}", flush=True)
    print(f"{len(cells)} cells (method × family × dtype × device), {failed} failed, {time.monotonic() - began:.0f} s")
    return failed


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    raise SystemExit(report(every()) > 0)
