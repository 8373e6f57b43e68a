"""The processes of one collection, where `torchrun` or the like started several: they agree, count, and end together.

What they exchange is small: settings at the start, numbers of keys after each batch. The sums go through the shards'
files (shards.py). So gloo serves beside CUDA devices too, and nothing waits for them.

torch.distributed is imported where a group is joined, and in no other process.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from editkit.errors import EditkitError

TIMEOUT = 30.0  # minutes that one process waits for another's next batch
_PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of the environment that torchrun makes
T = TypeVar("T")


class LostProcessError(EditkitError):
    """Another process of the group has ended, or does not answer."""


def launched() -> bool:
    """Whether this process is one of several that `torchrun` or the like started."""
    return all(os.environ.get(name) for name in _PLACE) and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int:
    """The number of this process among those of its machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Group:
    """All processes that were started together. `rank`: this one's number; `size`: how many there are."""

    def __init__(self, *, timeout: float = TIMEOUT) -> None:
        """Join it, as the environment says. `timeout`: minutes to wait for another process.

        Raises EditkitError where that cannot be done.
        """
        import torch.distributed as distributed

        wait = timedelta(minutes=timeout)
        self._distributed, self._minutes = distributed, timeout
        self._own = not distributed.is_initialized()
        try:
            if self._own:
                distributed.init_process_group("gloo", timeout=wait)
                self._group = None
            else:  # of another program, which may have another backend
                self._group = distributed.new_group(backend="gloo", timeout=wait)
        except (RuntimeError, ValueError) as error:
            raise EditkitError(
                f"The processes cannot find each other: {error}. Start them all with torchrun, and look at RANK, "
                "WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
            ) from error
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def of_first(self, act: Callable[[], T]) -> T:
        """What process 0 gets from `act`, in all processes. An EditkitError of `act` is raised in all of them."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = act()
            except EditkitError as error:
                box[1] = error
        with self._answered():
            self._distributed.broadcast_object_list(box, 0, group=self._group)
        if box[1] is not None:
            raise box[1]
        found: T = box[0]
        return found

    def agree(self, what: object, act: Callable[[], T]) -> T:
        """What each process gets from its own `act`, once all have it.

        An EditkitError in one of them is raised in all, and so is one where `what` differs between them.
        """
        result: Any = None
        told: list[Any] = [what, None]
        try:
            result = act()
        except EditkitError as error:
            told[1] = error
        everyone: list[Any] = [None] * self.size
        with self._answered():
            self._distributed.all_gather_object(everyone, told, group=self._group)
        if errors := [error for _, error in everyone if error is not None]:
            raise told[1] or errors[0]
        if different := [rank for rank, (other, _) in enumerate(everyone) if other != everyone[0][0]]:
            raise EditkitError(
                f"Processes 0 and {different[0]} do not collect the same: {everyone[0][0]} and "
                f"{everyone[different[0]][0]}. Start all with one command, one model and one text."
            )
        found: T = result
        return found

    def total(self, count: int) -> int:
        """The sum of `count` over all processes: called by each after a batch, so that none waits longer than that."""
        return self._sum(count, finished=False)[0]

    def finish(self, count: int) -> None:
        """Wait until all processes have finished their shares."""
        while self._sum(count, finished=True)[1] < self.size:
            pass

    def leave(self) -> None:
        """Leave the group, once all are done."""
        if self._own:
            self._distributed.destroy_process_group()

    def _sum(self, count: int, *, finished: bool) -> tuple[int, int]:
        import torch

        told = torch.tensor([count, int(finished)])
        with self._answered():
            self._distributed.all_reduce(told, group=self._group)
        keys, ready = told.tolist()
        return keys, ready

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        """Turn what torch.distributed raises in the body into one LostProcessError."""
        try:
            yield
        except RuntimeError as error:
            raise LostProcessError(
                f"Another process of this collection has ended, or has not answered for {self._minutes:g} minutes. "
                "What each has collected is kept: start the same number of processes again to go on. "
                f"(torch.distributed: {str(error).splitlines()[0].partition('. ')[0]})"
            ) from error
