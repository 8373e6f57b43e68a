"""The covering part of a product of parameters, and what a run leaves out."""

import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.covering import cover, spread


class Item:
    """Of a collected test, what `cover` reads."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.callspec = SimpleNamespace(params={f"p{i}": value for i, value in enumerate(values)})


def cells(*values: list[Any]) -> list[Any]:
    return [Item(each) for each in product(*values)]


@pytest.mark.parametrize("sizes", [(23, 11), (4, 13, 5), (3,), (1, 1), (6, 6, 2)])
def test_each_value_is_there_and_no_cell_too_many(sizes: tuple[int, ...]) -> None:
    values = [[f"{place}-{n}" for n in range(size)] for place, size in enumerate(sizes)]
    for name in ("tests/test_x.py::test_a", "tests/test_x.py::test_b"):
        taken = cover(name, cells(*values))
        assert len(taken) == max(sizes)
        for place, wanted in enumerate(values):
            assert {item.callspec.params[f"p{place}"] for item in taken} == set(wanted)


def test_values_are_used_alike() -> None:
    taken = cover("a test", cells(list(range(24)), list(range(6))))
    second = [item.callspec.params["p1"] for item in taken]
    assert {second.count(value) for value in range(6)} == {4}


def test_a_tuple_is_a_parameter_for_each_place() -> None:
    group = cells([*product("abc", "xyz")])
    assert len(cover("a test", group)) == 3


def test_two_tests_take_other_cells() -> None:
    group = cells(list(range(9)), list(range(9)))
    one, other = ({tuple(item.callspec.params.values()) for item in cover(name, group)} for name in ("first", "second"))
    assert one != other


def test_tests_with_an_oracle_are_found_by_their_mark() -> None:
    """scripts/oracles.py asks for them so."""
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "oracle", "tests/test_ft_bf.py"]
    done = subprocess.run(asked, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert "::" in done.stdout and "deselected" in done.stdout, done.stdout + done.stderr


def test_all_but_each_third_are_slow() -> None:
    found = spread([("a", 1), ("b", 2), ("c", 3), ("d", 4)], 3)
    assert [bool(parameters.marks) for parameters in found] == [False, True, True, False]
    assert [parameters.values for parameters in found] == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
