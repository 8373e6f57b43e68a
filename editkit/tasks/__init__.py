"""Tasks: what `editkit.run` does, one file each, each a short story told with the nouns of the other rooms.

The registry names each task's function and settings without importing torch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from editkit.errors import ConfigError, did_you_mean
from editkit.settings import BatchSettings, BenchmarkSettings, EditTaskSettings, LifelongSettings, TraceTaskSettings


@dataclass(frozen=True)
class Task:
    """A registered task: where its function `(config, folder) -> Record` is, and the dataclass of its settings."""

    target: str  # "module:function", imported when first called
    settings: type

    def load(self) -> Callable[..., Any]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


TASKS = {
    "edit": Task("editkit.tasks.edit:run", EditTaskSettings),
    "benchmark": Task("editkit.tasks.benchmark:run", BenchmarkSettings),
    "batch": Task("editkit.tasks.benchmark:run", BatchSettings),
    "lifelong": Task("editkit.tasks.lifelong:run", LifelongSettings),
    "trace": Task("editkit.tasks.trace:run", TraceTaskSettings),
}


def get_task(name: str) -> Task:
    """The registered task. Raises ConfigError with the near match."""
    if name not in TASKS:
        raise ConfigError(f"No task '{name}': {did_you_mean(name, TASKS)}")
    return TASKS[name]
