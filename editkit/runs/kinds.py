"""The kinds of run: for each task its function, the dataclass of its settings, and the page of its results.

The registry names modules and imports them when they are first needed, so the command line and the report are quick,
and a page is made without torch. Another package registers its own task with the same call, before the run, or in a
module that it names in the entry point group `editkit.tasks`.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from editkit.errors import ConfigError, did_you_mean
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


_TASKS: dict[str, Task] = {}


def register(name: str, target: str | Function, settings: type, *, page: str | Function | None = None) -> Task:
    """Add a task: `task=NAME` runs it.

    - `target`: the function `(config, folder) -> Record`, or "module:function".
    - `settings`: a frozen dataclass with a field `name`; its fields are the keys below `task.`.
    - `page`: the function `(editkit.runs.read.Run) -> editkit.report.html.Body`, or "module:function"; None: the page
      shows the scores.

    Raises ConfigError for a name that is taken.
    """
    if name in _TASKS:
        raise ConfigError(f"A task '{name}' is registered already. Give the new one another name.")
    _TASKS[name] = Task(target, settings, page)
    return _TASKS[name]


def unregister(name: str) -> None:
    """Take a task out again, as a test does."""
    _TASKS.pop(name, None)


register("edit", "editkit.tasks.edit:run", EditTaskSettings, page="editkit.tasks.edit_page:body")
register("benchmark", "editkit.tasks.benchmark:run", BenchmarkSettings, page="editkit.tasks.benchmark_page:body")
register("batch", "editkit.tasks.benchmark:run", BatchSettings, page="editkit.tasks.benchmark_page:body")
register("lifelong", "editkit.tasks.lifelong:run", LifelongSettings, page="editkit.tasks.lifelong_page:body")
register("trace", "editkit.tasks.trace:run", TraceTaskSettings, page="editkit.tasks.trace_page:body")


def tasks() -> Mapping[str, Task]:
    """All tasks by name, those of installed packages too."""
    _load()
    return dict(_TASKS)


def get_task(name: str) -> Task:
    """The registered task. Raises ConfigError with the near match."""
    known = tasks()
    if name not in known:
        raise ConfigError(f"No task '{name}': {did_you_mean(name, known)}")
    return known[name]


@cache
def _load() -> None:
    for point in entry_points(group="editkit.tasks"):
        try:
            point.load()
        except Exception as error:  # another package's module may raise anything
            raise ConfigError(f"The tasks of '{point.value}' cannot be imported: {error}") from error


def _function(target: str | Function) -> Function:
    if not isinstance(target, str):
        return target
    module, function = target.split(":")
    found: Function = getattr(importlib.import_module(module), function)
    return found
