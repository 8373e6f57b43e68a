"""What a session carries from step to step for its method: always what the steps in force give, in their order.

A method that depends on its earlier edits starts from a state and adds one edit after the other to it:

    state = start();  for edit in earlier: state = add(state, edit)

Everything that it adds is in the edits themselves (`Edit.memory`, in float32). So a session that is saved and loaded
has the same state bit for bit, and one in which a step is undone has that of the other steps. `Carried` keeps the
latest state, so that the next step adds one edit to it and not all of them again.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from editkit.edits.edit import Edit

T = TypeVar("T")


class Carried:
    """The states that the methods of one session have come to. Without a session each call has one of its own."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[tuple[Edit, ...], Any]] = {}

    def state(self, name: Hashable, earlier: Sequence[Edit], start: Callable[[], T], add: Callable[[T, Edit], T]) -> T:
        """The state after `earlier`.

        - `name`: of the state, one for each that the method has.
        - `start`: the state without any edit.
        - `add`: the state with one edit more. It must leave the state that it is given as it is.

        Where the edits begin with those of the call before, only the others are added.
        """
        done, state = self._kept.get(name) or ((), start())
        if done != tuple(earlier[: len(done)]):  # edits are equal where they are the same object
            done, state = (), start()
        for edit in earlier[len(done) :]:
            state = add(state, edit)
        self._kept[name] = tuple(earlier), state
        found: T = state
        return found
