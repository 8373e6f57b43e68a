"""Worker: one model, one thread, one job at a time. The others wait in order and are told their place.

A job is stopped through the progress of the library (editkit/progress.py), as Ctrl-C would. After every job the model's
weights are compared with those that were loaded; if they differ, nothing is answered any more.
"""

import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from editkit.errors import EditkitError, ReversalError
from editkit.progress import Step, Stopped, listening
from editkit.workbench.bench import Bench

Send = Callable[[dict[str, Any]], None]
Tell = Callable[[dict[str, Any]], None]
EVERY = 0.1  # seconds between two words about progress
IDLE = 1.0  # seconds without a job after which the weights of a large model are compared
MOST = 8  # jobs of a tab that wait


@dataclass
class Job:
    """One thing that a tab has asked for.

    - `tab`: whose. `number`: its own number of the message. `name`: what is done.
    - `work`: does it; given a function that tells the page what is there already. `send`: to the page.
    - `latest`: an older waiting one of the same name makes way for it, as with a slider.
    """

    tab: object
    number: int
    name: str
    work: Callable[[Tell], dict[str, Any]]
    send: Send
    latest: bool = False
    stopped: bool = False
    told: float = field(default=0.0)

    def say(self, kind: str, **more: Any) -> None:
        self.send({"id": self.number, "kind": kind, **more})


class Worker:
    """The thread. `close` ends it, after the job it is at."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._closed, self._broken = False, ""
        self._unverified: Send | None = None
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="workbench", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue. Raises EditkitError where the tab has too many there."""
        with self._change:
            own = [each for each in self._waiting if each.tab is job.tab]
            if job.latest:
                for each in own:
                    if each.latest and each.name == job.name:
                        self._waiting.remove(each)
                        each.say("skipped")
            elif len(own) >= MOST:
                raise EditkitError(f"{len(own)} requests of this page are waiting. Let them end, or press Esc.")
            self._waiting.append(job)
            self._change.notify()
            self._tell_places()

    def stop(self, tab: object) -> None:
        """Stop what the tab has running, and drop what it has waiting."""
        with self._change:
            if self._running is not None and self._running.tab is tab:
                self._running.stopped = True
            for job in [each for each in self._waiting if each.tab is tab]:
                self._waiting.remove(job)
                job.say("stopped")
            self._tell_places()

    def leave(self, tab: object, last: Callable[[], None]) -> None:
        """The tab is gone: stop what it has, then do its `last` in the thread. Nobody hears of it."""
        self.stop(tab)

        def work(tell: Tell) -> dict[str, Any]:
            last()
            return {}

        with self._change:
            self._waiting.append(Job(None, 0, "leave", work, lambda answer: None))
            self._change.notify()

    def close(self) -> None:
        """Stop everything and wait for the end of the thread."""
        with self._change:
            self._closed = True
            if self._running is not None:
                self._running.stopped = True
            self._change.notify()
        self._thread.join()

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            job = self._next()
            if job is not None:
                self._do(job)
                with self._change:
                    self._running = None
            elif self._unverified is not None and not self._closed:
                self._verify(self._unverified)

    def _next(self) -> Job | None:
        """The next job, waited for; None at the end, and in a pause in which a large model can be compared."""
        with self._change:
            while not self._waiting and not self._closed:
                if not self._change.wait(None if self._unverified is None else IDLE):
                    return None
            if self._closed:
                return None
            self._running = self._waiting.pop(0)
            self._tell_places()
            return self._running

    def _do(self, job: Job) -> None:
        if self._broken:
            job.say("error", text=self._broken)
            return
        job.say("started")
        notes: list[str] = []
        try:
            with warnings.catch_warnings(), listening(lambda step: _progress(job, step)):
                warnings.showwarning = lambda message, *_, **__: notes.append(str(message))
                value = job.work(lambda part: _part(job, part))
            job.say("done", value=value, notes=notes)
        except Stopped:
            job.say("stopped")
        except ReversalError as error:
            self._broken = str(error)
            job.say("error", text=self._broken)
        except EditkitError as error:
            job.say("error", text=str(error))
        except Exception as error:
            job.say("error", text=defect(error))
        if self.bench.small:
            self._verify(job.send)
        else:
            self._unverified = job.send
            job.send({"kind": "badge", "equal": None, "digest": self.bench.base.digest})

    def _verify(self, send: Send) -> None:
        """Compare all weights, and tell the page."""
        self._unverified, began = None, time.perf_counter()
        try:
            found = self.bench.verify()
        except ReversalError as error:
            self._broken = str(error)
            send({"kind": "badge", "equal": False, "text": self._broken})
            return
        about = {"digest": found.digest, "tensors": found.tensors, "bytes": found.bytes}
        send({"kind": "badge", "equal": True, "seconds": time.perf_counter() - began, **about})

    def _tell_places(self) -> None:
        """Tell each waiting job how many are before it. Called with the lock."""
        ahead = 0 if self._running is None else 1
        for place, job in enumerate(self._waiting):
            if place + ahead:
                other = self._running is not None and self._running.tab is not job.tab
                job.say("waiting", place=place + ahead, other=other)


def defect(error: Exception) -> str:
    """What a page says of an error that is none of the user's; the terminal gets where it came from."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__} inside the workbench; the terminal shows where. The model is as it was."


def _part(job: Job, part: dict[str, Any]) -> None:
    if job.stopped:
        raise Stopped
    job.say("part", value=part)


def _progress(job: Job, step: Step) -> None:
    if job.stopped:
        raise Stopped
    now = time.monotonic()
    if now - job.told >= EVERY or step.done == step.total:
        job.told = now
        job.say("progress", what=step.what, done=step.done, total=step.total)
