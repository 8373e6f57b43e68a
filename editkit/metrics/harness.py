"""General ability through lm-evaluation-harness (`pip install "editkit[harness]"`), on the model in memory.

    with edit.applied(lm):
        scores = general_ability(lm, ["my_task"], include="tasks/")     # tasks/my_task.yaml reads local files

Tasks that come with the harness take their data from the Hub; a YAML file of your own may name local files. The harness
calls the model itself: no copy of it is made, and a prefix in front of texts (models/prefix.py) is not seen.
"""

import copy
import logging
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from editkit.errors import EditkitError
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel

BOOTSTRAP = 1000  # resamples for the standard error of what is no mean (F1, Matthews' correlation)
NO_POOL = "DISABLE_MULTIPROC"  # the harness draws them in this process, which holds the model, and forks none


@dataclass(frozen=True)
class Figure:
    """What the harness says of one metric of one task or group of tasks."""

    task: str
    metric: str  # as the harness names it; with a filter's name behind it where it has one
    value: float
    stderr: float | None  # standard error
    n: int | None  # examples
    more_is_better: bool = True


def general_ability(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch: int = 16,
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} as the harness names them ("acc", "acc_stderr", …), for `lm` as it is now; "n" examples.

    - `include`: a folder with task files of your own.
    - `limit`: examples of each task, from the first; None: all.
    - `batch`: rows that are run together.

    Raises EditkitError where the harness is not installed, or has no such task or data.
    """
    found: dict[str, dict[str, float]] = {}
    for figure in figures(lm, tasks, include=include, limit=limit, batch=batch):
        own = found.setdefault(figure.task, {})
        own[figure.metric] = figure.value
        own |= {} if figure.stderr is None else {f"{figure.metric}_stderr": figure.stderr}
        own |= {} if figure.n is None else {"n": figure.n}
    return found


@in_eval_mode
def figures(
    lm: LanguageModel,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch: int = 16,
) -> list[Figure]:
    """Every metric of every task in `tasks`; of a group that has figures of its own, those in place of its parts'.

    Arguments and errors as for `general_ability`.
    """
    with _quiet():
        try:
            # An optional extra.
            import lm_eval  # pyright: ignore[reportMissingImports]
            from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise EditkitError(
                f"General ability is measured by lm-evaluation-harness, and there is no module '{error.name}': "
                'pip install "editkit[harness]".'
            ) from error
        folder = None if include is None else str(include)
        tokenizer = copy.deepcopy(lm.tokenizer)  # the harness gives it a padding token
        try:
            known = TaskManager(include_path=folder, include_defaults=False)
            if not {*tasks} <= {*known.all_tasks}:
                known = TaskManager(include_path=folder)  # which reads thousands of files
            found = lm_eval.simple_evaluate(
                model=HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=batch),
                tasks=list(tasks),
                task_manager=known,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
            )
        except Exception as error:  # the harness and `datasets` raise many kinds
            raise EditkitError(f"lm-evaluation-harness could not run {', '.join(tasks)}: {error}") from error
    return list(_figures(found, tasks))


def _figures(found: Mapping[str, Any], asked: Iterable[str]) -> Iterator[Figure]:
    """From what the harness returns: results[task] = {"acc,none": 0.5, "acc_stderr,none": 0.1, …}."""
    parts: Mapping[str, Sequence[str]] = found.get("group_subtasks", {})
    counts: Mapping[str, Mapping[str, int]] = found.get("n-samples", {})
    better: Mapping[str, Mapping[str, bool | None]] = found.get("higher_is_better", {})

    def inside(name: str) -> set[str]:
        return {each for part in parts.get(name, ()) if part != name for each in {part} | inside(part)}

    results: Mapping[str, Mapping[str, Any]] = found["results"]
    whole = [name for name in asked if any("," in key for key in results.get(name, {}))]
    hidden = {part for name in whole for part in inside(name)}
    for task, values in results.items():
        leaves = [counts[each]["effective"] for each in inside(task) | {task} if each in counts]
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if task in hidden or not comma or metric.endswith("_stderr") or not _number(value):
                continue
            name = metric if which == "none" else f"{metric} ({which})"
            error = values.get(f"{metric}_stderr,{which}")
            more = better.get(task, {}).get(metric) is not False
            yield Figure(task, name, value, error if _number(error) else None, sum(leaves) or None, more)


def _number(value: object) -> bool:
    return isinstance(value, int | float)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness says errors only, beside its bars, and draws its bootstraps in this process; the environment and the
    random states, which it sets for the whole process, are put back."""
    import datasets

    environment, states = dict(os.environ), (random.getstate(), numpy.random.get_state())
    logger = logging.getLogger("lm_eval")
    level, without_bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    os.environ[NO_POOL] = "1"
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in {*os.environ} - {*environment}:
            del os.environ[name]
        os.environ.update(environment)
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        logger.setLevel(level)
        if not without_bars:
            datasets.enable_progress_bars()
