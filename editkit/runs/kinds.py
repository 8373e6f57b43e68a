"""The kinds of run: for each task its function, the dataclass of its settings, and the page of its results.

The registry names modules and imports them when they are first needed, so the command line and the report are quick,
and a page is made without torch. Another package registers its own task with the same call: before the run, or in the
module of an entry point NAME in the group `editkit.tasks`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from editkit.registry import Registry
from editkit.settings import BatchSettings, BenchmarkSettings, EditTaskSettings, LifelongSettings, TraceTaskSettings

Function = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """A registered task. `target` and `page`: a function, or where it is, as "module:function"."""

    target: str | Function
    settings: type
    page: str | Function | None = None

    def load(self) -> Function:
        """The function `(config, folder) -> Record`."""
        return _function(self.target)

    def load_page(self) -> Function | None:
        """The function `(run) -> Body` that a page is made with; None: the page that any run can have."""
        return None if self.page is None else _function(self.page)


_TASKS: Registry[Task] = Registry("task", group="editkit.tasks")


def register(name: str, target: str | Function, settings: type, *, page: str | Function | None = None) -> Task:
    """Add a task: `task=NAME` runs it.

    - `target`: the function `(config, folder) -> Record`, or "module:function".
    - `settings`: a frozen dataclass with a field `name`; its fields are the keys below `task.`.
    - `page`: the function `(editkit.runs.read.Run) -> editkit.report.html.Body`, or "module:function"; None: the page
      shows the scores.

    Raises ConfigError for a name that is taken.
    """
    return _TASKS.register(name, Task(target, settings, page))


def unregister(name: str) -> None:
    """Take a task out again, as a test does."""
    _TASKS.unregister(name)


register("edit", "editkit.tasks.edit:run", EditTaskSettings, page="editkit.tasks.edit_page:body")
register("benchmark", "editkit.tasks.benchmark:run", BenchmarkSettings, page="editkit.tasks.benchmark_page:body")
register("batch", "editkit.tasks.benchmark:run", BatchSettings, page="editkit.tasks.benchmark_page:body")
register("lifelong", "editkit.tasks.lifelong:run", LifelongSettings, page="editkit.tasks.lifelong_page:body")
register("trace", "editkit.tasks.trace:run", TraceTaskSettings, page="editkit.tasks.trace_page:body")


def names() -> list[str]:
    """The names of all tasks, those of installed packages too."""
    return _TASKS.names()


def get_task(name: str) -> Task:
    """The registered task. Raises ConfigError with the near match."""
    return _TASKS.get(name)


def _function(target: str | Function) -> Function:
    if not isinstance(target, str):
        return target
    module, function = target.split(":")
    found: Function = getattr(importlib.import_module(module), function)
    return found
