"""What must be there, for the type checkers and for the reader of a failure."""

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """The value; the test fails where it is None."""
    assert value is not None
    return value
