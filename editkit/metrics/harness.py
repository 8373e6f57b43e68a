"""General ability through lm-evaluation-harness (`pip install "editkit[harness]"`), on the model in memory.

    with edit.applied(lm):
        scores = general_ability(lm, ["my_task"], include="tasks/")     # tasks/my_task.yaml reads local files

Tasks that come with the harness take their data from the Hub; a YAML file of your own may name local files.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

from editkit.errors import EditkitError
from editkit.models.load import LanguageModel


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

    Raises EditkitError where the harness is not installed, or has no such task or data.
    """
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
    tokenizer = copy.deepcopy(lm.tokenizer)  # the harness gives it a padding token
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=lm.model, tokenizer=tokenizer, batch_size=batch),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(include) if include is not None else None),
            limit=limit,
            bootstrap_iters=0,
        )
    except Exception as error:  # the harness and `datasets` raise many kinds
        raise EditkitError(f"lm-evaluation-harness could not run {', '.join(tasks)}: {error}") from error
    counts: dict[str, dict[str, float]]
    counts = {task: {"n": n["effective"]} for task, n in found.get("n-samples", {}).items()}
    figures: dict[str, dict[str, float]] = {}
    for task, values in found["results"].items():
        figures[task] = {k.split(",")[0]: value for k, value in values.items() if isinstance(value, int | float)}
        figures[task] |= counts.get(task, {})
    return figures
