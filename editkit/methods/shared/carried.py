"""What a session carries from step to step for its method: always what the steps in force give, in their order.

A method that depends on its earlier edits starts from a state and adds one edit after the other to it:

    state = start();  for edit in earlier: state = add(state, edit)

Everything that it adds is in the edits themselves (`Edit.memory`, in float32). So a session that is saved and loaded
has the same state bit for bit, and one in which a step is undone has that of the other steps. `Carried` keeps the
latest state, so that the next step adds one edit to it and not all of them again.

A long session folds its oldest steps (editkit/folded.py). The states after the folded steps are then all that is left
of them: `fold` computes them, and `tensors` gives them to be saved, which takes a `Form` of each state.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import EditkitError

T = TypeVar("T")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Form(Generic[T]):
    """How a state becomes tensors by name, and comes back from them bit for bit."""

    write: Callable[[T], dict[str, Tensor]]
    read: Callable[[Tensors], T]
    strided: bool = True  # whether tensors in it may lie otherwise in memory than those that are read

    def as_read(self, state: T) -> T:
        """The state with its tensors as they lie in memory after reading: the order in which a product adds depends on
        it, and so do its last bits."""
        if not self.strided:
            return state
        return self.read({name: tensor.contiguous() for name, tensor in self.write(state).items()})


def json_form(read: Callable[[Any], T], write: Callable[[T], Any]) -> Form[T]:
    """The form of a state that is JSON: its UTF-8 bytes.

    - `write`: the state as JSON. `read`: the state from that.
    """

    def to_bytes(state: T) -> dict[str, Tensor]:
        return {"json": torch.frombuffer(bytearray(json.dumps(write(state)).encode()), dtype=torch.uint8)}

    return Form(to_bytes, lambda tensors: read(json.loads(tensors["json"].numpy().tobytes())), strided=False)


@dataclass(frozen=True)
class _Way:
    """How one state is computed."""

    plus: Callable[[Any, Edit], Any]
    form: Form[Any] | None

    def add(self, state: Any, edit: Edit) -> Any:
        return self.settled(self.plus(state, edit))

    def settled(self, state: Any) -> Any:
        return state if self.form is None else self.form.as_read(state)


class Carried:
    """The states that the methods of one session have come to. Without a session each call has one of its own.

    - `folded`: the states after the folded steps of a session that is loaded, as `tensors` gave them.
    """

    def __init__(self, folded: Mapping[str, Tensors] | None = None) -> None:
        self._ways: dict[str, _Way] = {}
        self._unread = dict(folded or {})
        self._begun: dict[str, Any] = {}  # states after the folded steps; without such, before the first step
        self._kept: dict[str, tuple[tuple[Edit, ...], Any]] = {}  # the steps after those, and the state after them
        self._folds = folded is not None

    def state(
        self,
        name: str,
        earlier: Sequence[Edit],
        start: Callable[[], T],
        add: Callable[[T, Edit], T],
        form: Form[T] | None = None,
    ) -> T:
        """The state after `earlier`.

        - `name`: of the state, one for each that the method has.
        - `start`: the state without any edit.
        - `add`: the state with one edit more. It must leave the state that it is given as it is.
        - `form`: how the state is saved; None: it cannot be, and a session that saves folded steps refuses it.

        Where the edits begin with those of the call before, only the others are added. Raises EditkitError for a state
        that nobody asked for before steps were folded.
        """
        way = self._ways[name] = _Way(add, form)
        if name not in self._begun:
            self._begun[name] = way.settled(self._first(name, start, form))
        done, state = self._kept.get(name, ((), self._begun[name]))
        if done != tuple(earlier[: len(done)]):  # edits are equal where they are the same object
            done, state = (), self._begun[name]
        for edit in earlier[len(done) :]:
            state = way.add(state, edit)
        self._kept[name] = tuple(earlier), state
        found: T = state
        return found

    def _first(self, name: str, start: Callable[[], T], form: Form[T] | None) -> T:
        if not self._folds:
            return start()
        if name not in self._unread or form is None:
            raise EditkitError(
                f"The state '{name}' of the method was not carried from the session's first step on, and older steps "
                "have been folded. Begin a new session, without keep."
            )
        return form.read(self._unread.pop(name))

    def fold(self, step: Edit) -> "Carried":
        """These states, with `step`, the oldest that is not folded yet, among the folded ones. Self stays as it is."""
        found = Carried({})  # states of a loaded session that no step has asked for are gone
        for name, state in self._begun.items():
            found._ways[name] = way = self._ways[name]
            found._begun[name] = way.add(state, step)
            done, latest = self._kept.get(name, ((), None))
            if done[:1] == (step,):
                found._kept[name] = done[1:], latest
        return found

    def copy(self) -> "Carried":
        """The same states; what is carried on in the one leaves the other as it is."""
        found = Carried()
        found._folds = self._folds
        for name in ("_ways", "_unread", "_begun", "_kept"):
            setattr(found, name, dict(getattr(self, name)))
        return found

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The states after the folded steps, by name. Raises EditkitError for one without a form."""
        found = {name: dict(tensors) for name, tensors in self._unread.items()}
        for name, state in self._begun.items():
            form = self._ways[name].form
            if form is None:
                raise EditkitError(
                    f"The method carries a state '{name}' that cannot be saved, so a session of it cannot fold its "
                    "older steps. Leave out keep (task.keep=null)."
                )
            found[name] = form.write(state)
        return dict(sorted(found.items()))
