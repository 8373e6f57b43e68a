"""What `make test` leaves out, so that it ends in minutes; `make test-whole` (`pytest --whole`) runs everything.

- `@pytest.mark.slow`: a test of something that seldom breaks and takes long, as a kill in the middle of a training.
- `@pytest.mark.cells`: one question asked of each combination of parameters. A covering part of the combinations runs:
  every family, every method and every option is in some cell, but not every pair of them.
- `spread(values, step)`: parameters of which each step-th alone is asked.

A test that is named runs always: `pytest "tests/test_x.py::test_y[llama-rome]"`.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def spread(values: Iterable[Any], step: int) -> list[Any]:
    """`values` as parameters of a test; all but each `step`-th carry the mark slow. A tuple is one set of arguments."""
    found = []
    for n, value in enumerate(values):
        arguments = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*arguments, marks=pytest.mark.slow if n % step else ()))
    return found


def left_out(items: Sequence[pytest.Item], named: Sequence[str]) -> set[pytest.Item]:
    """The tests that are not run each time. `named`: what the command line asks for; FILE::TEST is never left out."""
    asked = tuple(name for name in named if "::" in name)
    out, groups = set[pytest.Item](), dict[str, list[pytest.Function]]()
    for item in items:
        if asked and item.nodeid.startswith(asked):
            continue
        if item.get_closest_marker("slow"):
            out.add(item)
        elif isinstance(item, pytest.Function) and item.get_closest_marker("cells"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return out.union(*(set(group) - set(cover(name, group)) for name, group in groups.items()))


def cover(name: str, group: list[pytest.Function]) -> list[pytest.Function]:
    """Cells that together have each value.

    Taken is the cell with the most values that none has yet, and of such cells that of the least used values. Where to
    begin comes from the test's name, so that two tests over one product take different cells.
    """
    start = zlib.crc32(name.encode()) % len(group)
    cells = {item: _values(item) for item in group[start:] + group[:start]}
    missing, used, taken = set[tuple[str, str]]().union(*cells.values()), Counter[tuple[str, str]](), []
    while missing:
        best = max(cells, key=lambda item: (len(cells[item] & missing), -sum(used[value] for value in cells[item])))
        taken.append(best)
        missing -= cells[best]
        used.update(cells.pop(best))
    return taken


def _values(item: pytest.Function) -> set[tuple[str, str]]:
    """(parameter, value) of a cell. A parameter that is a tuple is one parameter for each of its places."""
    found = set[tuple[str, str]]()
    for name, value in item.callspec.params.items():
        parts = value if isinstance(value, tuple) else (value,)
        found |= {(f"{name}.{place}", repr(part)) for place, part in enumerate(parts)}
    return found
