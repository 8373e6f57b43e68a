"""General ability before and after edits: presets of lm-evaluation-harness tasks, and two small ones of our own.

    quick     on the bundled model our own two, which need no network; on others also SST-2, RTE and ARC-easy, of each
              the first 100 examples
    papers    what editing papers ask (AlphaEdit, arXiv 2410.02355; Gupta et al. 2024, arXiv 2401.07453): SST-2, MRPC,
              CoLA, RTE, MMLU and natural language inference (MultiNLI), all examples
    A+B       tasks and groups by the names that the harness has for them

Our own are made of what the package ships, with four answers to choose from: `editkit_facts`, 200 facts of the atlas,
and `editkit_prose`, the last word of each paragraph of its prose behind the rest of its sentence. The atlas model has
read both in training: what they show of it is damage. An edited fact may be among the 200.

Prompts, metrics and standard errors are the harness's own, without examples in front; papers often show some, and
report F1. An interval is the value ± 1.96 standard errors.
"""

import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editkit.corpora import atlas_prose, load_atlas
from editkit.errors import EditkitError
from editkit.metrics.harness import Figure, figures
from editkit.metrics.metric import ABILITY, OTHER, SHARE, Average, Metric, Protocol, Score
from editkit.models.load import BUNDLED, LanguageModel
from editkit.settings import PAPERS, QUICK

GENERAL = Protocol(ABILITY, "General ability (lm-evaluation-harness)")
FACTS, PROSE = "editkit_facts", "editkit_prose"
OWN = (FACTS, PROSE)
SMALL = ("sst2", "rte", "arc_easy")
OF_PAPERS = ("sst2", "mrpc", "cola", "rte", "mmlu", "mnli")
QUICK_LIMIT = 100  # examples of each of SMALL
FACTS_ASKED, CHOICES = 200, 4
NORMAL = 1.96  # standard errors to each side of a 95 % interval
SHARES = ("acc", "acc_norm", "exact_match", "f1")
MEANING = {
    FACTS: f"share of {FACTS_ASKED} facts of the atlas whose object is the likeliest of {CHOICES} of its relation",
    PROSE: f"share of paragraphs of the bundled prose whose last word is the likeliest of {CHOICES}",
}
_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def tasks_of(preset: str, model_name: str, limit: int | None = None) -> list[tuple[tuple[str, ...], int | None]]:
    """What a preset, or names joined by "+", asks of a model: tasks of the harness, with a limit of their examples.

    `limit`: of every task; None: the preset's own.
    """
    if preset == PAPERS:
        return [(OF_PAPERS, limit)]
    if preset != QUICK:
        return [(tuple(preset.split("+")), limit)]
    more = [] if model_name in BUNDLED else [(SMALL, limit or QUICK_LIMIT)]
    return [(OWN, limit), *more]


def ability(lm: LanguageModel, preset: str, limit: int | None = None) -> list[Figure]:
    """What the harness says of `lm` as it is now. No copy of the model is made.

    - `preset`: quick, papers, or names of tasks joined by "+". `limit`: examples of each task; None: the preset's.

    Raises EditkitError where the harness is not installed, or a task or its data cannot be had.
    """
    found: list[Figure] = []
    for tasks, most in tasks_of(preset, lm.name, limit):
        with own_tasks() as folder:
            try:
                found += figures(lm, tasks, include=folder, limit=most)
            except EditkitError as error:
                if {*tasks} <= {*OWN} or isinstance(error.__cause__, ImportError):
                    raise
                raise EditkitError(
                    f"{str(error).rstrip('.')}. The harness's own tasks take their data from the Hub; "
                    f"task.ability={'+'.join(OWN)} needs no network."
                ) from error
    return found


def scores_of(found: Sequence[Figure], when: str) -> list[Score]:
    """The figures as scores of a record."""
    scores = []
    for each in found:
        share = each.metric.partition(" ")[0] in SHARES
        metric = Metric(
            GENERAL,
            f"{each.task} {each.metric}",
            MEANING.get(each.task, f"{each.metric} of the harness's task {each.task}"),
            better=1 if each.more_is_better else -1,
            unit=SHARE if share else OTHER,
            range=(0.0, 1.0) if share else (None, None),
            averaged=f"over the task's examples; interval: ± {NORMAL} standard errors of the harness",
        )
        wide = None if each.stderr is None else NORMAL * each.stderr
        bounds = (None, None) if wide is None else (each.value - wide, each.value + wide)
        scores.append(Score(metric, when, Average(each.value, each.n, *bounds)))
    return scores


@contextmanager
def own_tasks() -> Iterator[Path]:
    """A folder with the task files and data of OWN, for the time of the body."""
    with tempfile.TemporaryDirectory(prefix="editkit-tasks-") as name:
        folder = Path(name)
        for task, rows in ((FACTS, fact_rows()), (PROSE, prose_rows())):
            data = folder / f"{task}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            text = _TASK.format(name=task, data=data, cache=folder / "cache")
            (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
        yield folder


def fact_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Facts of the atlas: prompt, four choices, and the place of the true one."""
    atlas, rng = load_atlas(), random.Random(seed)
    facts = rng.sample(atlas.facts, FACTS_ASKED)
    prompts = [atlas.trained_pairs(fact)[0].format(fact.subject) for fact in facts]
    return [_row(p, fact.object, atlas.other_objects(fact), rng) for p, fact in zip(prompts, facts, strict=True)]


def prose_rows(seed: int = 0) -> list[dict[str, Any]]:
    """The last sentence of each paragraph of the bundled prose without its last word, and four words to choose from."""
    rng = random.Random(seed)
    sentences = [re.split(r"(?<=[.!?]) ", text.strip())[-1].rstrip(".!?") for text in atlas_prose() if text.strip()]
    pairs = [(begun, word) for begun, _, word in (sentence.rpartition(" ") for sentence in sentences) if begun]
    words = sorted({word for _, word in pairs})
    return [_row(begun, word, [other for other in words if other != word], rng) for begun, word in pairs]


def _row(prompt: str, right: str, others: Sequence[str], rng: random.Random) -> dict[str, Any]:
    choices = [right, *rng.sample(others, min(CHOICES - 1, len(others)))]
    rng.shuffle(choices)
    return {"prompt": prompt, "choices": choices, "target": choices.index(right)}
