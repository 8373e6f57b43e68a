"""History: the stack of one tab over time. Any change can be undone, and done again."""

from dataclasses import replace

from editkit.errors import EditkitError
from editkit.workbench.recipe import Place, Stack, Step

MOST = 200  # changes that can be undone


class History:
    """A stack, what it was before, and which of its steps is looked at."""

    def __init__(self) -> None:
        self.stack: Stack = ()
        self.known: dict[str, Step] = {}  # every step that was ever on it or on the draft, by digest
        self.looked_at: str | None = None  # digest of a step
        self._undo: list[Stack] = []
        self._redo: list[Stack] = []
        self._sliding: int | None = None  # whose strength the latest change set

    @property
    def undoable(self) -> bool:
        return bool(self._undo)

    @property
    def redoable(self) -> bool:
        return bool(self._redo)

    @property
    def place(self) -> Place | None:
        """The place that is looked at."""
        return next((place for place in self.stack if place.step.digest == self.looked_at), None)

    def change(self, stack: Stack) -> None:
        """Another stack, which can be undone."""
        self._undo, self._redo, self._sliding = [*self._undo[-MOST:], self.stack], [], None
        self.stack = stack
        if self.place is None:
            self.looked_at = stack[-1].step.digest if stack else None

    def push(self, step: Step, strength: float) -> None:
        """A step on top, which is looked at now."""
        self.known[step.digest] = step
        if any(place.step.digest == step.digest for place in self.stack):
            raise EditkitError("This very edit is on the stack already. Give it another strength there.")
        self.change((*self.stack, Place(step, True, strength)))
        self.looked_at = step.digest

    def put(self, number: int, place: Place) -> None:
        """Another place at `number`."""
        self.change((*self.stack[:number], place, *self.stack[number + 1 :]))

    def slide(self, number: int, strength: float) -> None:
        """Another strength. Of several such changes in a row, undo goes back to before the first."""
        place = replace(self.stack[number], strength=strength)
        if self._sliding == number:
            self.stack = (*self.stack[:number], place, *self.stack[number + 1 :])
        else:
            self.put(number, place)
            self._sliding = number
        self.looked_at = place.step.digest

    def move(self, number: int, to: int) -> None:
        """The place at `number` moves to `to`."""
        rest = list(self.stack)
        rest.insert(to, rest.pop(number))
        self.change(tuple(rest))

    def remove(self, number: int) -> None:
        """Take a step off; the others stay as they are."""
        self.change((*self.stack[:number], *self.stack[number + 1 :]))

    def undo(self) -> None:
        """Take back the latest change. Raises EditkitError for none."""
        self._back(self._undo, self._redo, "undo")

    def redo(self) -> None:
        """Do again what was undone. Raises EditkitError for none."""
        self._back(self._redo, self._undo, "do again")

    def _back(self, one: list[Stack], other: list[Stack], what: str) -> None:
        if not one:
            raise EditkitError(f"There is nothing to {what}.")
        other.append(self.stack)
        self.stack, self._sliding = one.pop(), None
        if self.place is None:
            self.looked_at = self.stack[-1].step.digest if self.stack else None
