"""General ability through lm-evaluation-harness (`pip install "editkit[harness]"`), on the model in memory.

    with edit.applied(lm):
        scores = general_ability(lm, ["my_task"], include="tasks/")     # tasks/my_task.yaml reads local files

Tasks that come with the harness take their data from the Hub; a YAML file of your own may name local files.
"""

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
    """{task: {metric: value}} as the harness names them ("acc", "acc_stderr", …), for `lm` as it is now.

    - `include`: a folder with task files of your own.
    - `limit`: examples of each task, from the first; None: all.

    Raises EditkitError where the harness is not installed, or has no such task or data.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EditkitError(
            'General ability is measured by lm-evaluation-harness: pip install "editkit[harness]".'
        ) from error
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(include) if include is not None else None),
            limit=limit,
            bootstrap_iters=0,
        )
    except Exception as error:  # the harness and `datasets` raise many kinds
        raise EditkitError(f"lm-evaluation-harness could not run {', '.join(tasks)}: {error}") from error
    return {
        task: {name.split(",")[0]: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
