"""Progress: the bar of all long work. A program that shows it elsewhere listens, and stops the work by an exception.

    with listening(tell):                 # tell(Step): called at each step, whether a bar is shown or not
        edit = r_rome(lm, fact, progress=False)

A listener that raises Stopped ends the work as Ctrl-C does: weights are restored on its way.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from tqdm import tqdm


class Step(NamedTuple):
    """How far a piece of work is; `total` is None where nobody knows."""

    what: str
    done: float
    total: float | None


Listener = Callable[[Step], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """In the body, `listener` is told of every step of every bar of this thread."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Stopped(KeyboardInterrupt):
    """What a listener raises to stop the work: to the library it is a Ctrl-C."""


class Bar(tqdm):  # type: ignore[misc]
    """tqdm's bar, with the same arguments, which also tells the listener of its steps. `done`: how many there were."""

    def __init__(self, iterable: Any = None, desc: str = "", total: float | None = None, **options: Any) -> None:
        super().__init__(iterable, desc=desc, total=total, **options)
        self.done: float = options.get("initial", 0)
        self._what, self._of = desc, len(iterable) if total is None and hasattr(iterable, "__len__") else total

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item
            self._tell(1)

    def update(self, n: float | None = 1) -> bool | None:
        self._tell(n or 0)
        shown: bool | None = super().update(n)
        return shown

    def _tell(self, n: float) -> None:
        self.done += n
        listener = _listener.get()
        if listener is not None:
            listener(Step(self._what, self.done, self._of))
