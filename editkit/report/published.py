"""Numbers that papers printed, to be put beside a run of the same model, method and data, or one that reproduces them.

As printed: ES, PS, NS, S in percent, GE and RS times 100; here divided by 100. None of them was measured here.
"""

from dataclasses import dataclass
from typing import Any

from editkit.metrics.counterfact import ES, NS, PS, S
from editkit.metrics.fluency import GE, RS
from editkit.metrics.metric import RETENTION, Average, Metric
from editkit.numbers import mean as written
from editkit.runs.read import Run

STEP = 100  # facts of one edit in AlphaEdit's sequences
ROME, MEMIT, ALPHAEDIT = "arXiv 2202.05262", "arXiv 2210.07229", "arXiv 2410.02355"
_COLUMNS = (S, ES, PS, NS, GE, RS)

# Names under which a model goes, to the one used here.
_MODELS = {
    "gpt2-medium": "gpt2-medium",
    "gpt2-large": "gpt2-large",
    "gpt2-xl": "gpt2-xl",
    "gpt-j-6b": "gpt-j-6b",
    "gptj": "gpt-j-6b",
}


@dataclass(frozen=True, eq=False)
class Published:
    """One row of a paper's table; `method` "" is the unedited model."""

    model: str
    method: str
    values: dict[Metric, float]  # shares and bits
    source: str
    records: int | None  # None: not given beside the table
    task: str = "benchmark"  # each record alone; batch: all in one edit; lifelong: one after the other
    table: str = ""  # of conf/reproduce, where there is one for it


def _row(
    model: str, method: str, printed: tuple[float, ...], where: str, records: int | None, **more: str
) -> Published:
    values = {metric: round(value / 100, 6) for metric, value in zip(_COLUMNS, printed, strict=True)}
    return Published(model, method, values, where, records, **more)


def _sequence(method: str, es: float, ps: float, ns: float) -> Published:
    values = {ES: round(es / 100, 6), PS: round(ps / 100, 6), NS: round(ns / 100, 6)}
    return Published("gpt2-xl", method, values, f"{ALPHAEDIT}, table 1", 2000, "lifelong", "alphaedit_2000")


_FOUR = {"where": f"{ROME}, table 4", "table": "rome_table4"}
_MASS = {"where": f"{MEMIT}, table 2", "task": "batch", "table": "memit_counterfact"}
TABLE = (
    _row("gpt2-xl", "", (30.5, 22.2, 24.7, 78.1, 626.6, 31.9), records=7500, **_FOUR),
    _row("gpt2-xl", "ft_l", (66.9, 99.1, 48.7, 70.3, 621.4, 37.4), records=7500, **_FOUR),
    _row("gpt2-xl", "rome", (89.2, 100.0, 96.4, 75.4, 621.9, 41.9), records=7500, **_FOUR),
    _row("gpt2-medium", "rome", (87.4, 100.0, 96.4, 71.8, 625.0, 41.7), f"{ROME}, table 5", None),
    _row("gpt2-large", "rome", (88.2, 99.9, 96.3, 73.4, 622.5, 41.9), f"{ROME}, table 5", None),
    _row("gpt-j-6b", "rome", (91.5, 99.9, 99.1, 78.9, 620.1, 43.0), f"{ROME}, table 4", 2000),
    _row("gpt-j-6b", "memit", (85.8, 98.9, 88.6, 73.7, 619.9, 40.1), records=10_000, **_MASS),
    _row("gpt-j-6b", "rome", (50.3, 50.2, 50.4, 50.2, 589.6, 3.3), records=10_000, **_MASS),
    _sequence("memit", 94.70, 85.82, 60.50),
    _sequence("rect", 92.15, 81.15, 65.13),
    _sequence("alphaedit", 99.50, 93.95, 66.39),
)


def matching(run: Run) -> list[Published]:
    """The rows of the table that the run is made after; else those of the same model, method, data and task.

    The unedited model's row comes along with any method.
    """
    transform = run.settings.get("method.transform")
    method = str(transform) if transform == "rect" else run.method
    table = run.settings.get("reproduces.name")
    rows = [row for row in TABLE if row.task == run.task and row.method in ("", method)]
    if table:
        return [row for row in rows if row.table == table]
    model = _MODELS.get(run.model.rstrip("/").rpartition("/")[2].lower())
    return [row for row in rows if row.model == model and run.data == "counterfact"]


def own(run: Run, row: Published) -> dict[Metric, Average]:
    """The run's values of the row's metrics: before the edit for the unedited model, else after it."""
    sides = run.sides(RETENTION if row.task == "lifelong" else "")
    found = {
        metric: sides[metric].after if row.method else sides[metric].before for metric in row.values if metric in sides
    }
    return {metric: average for metric, average in found.items() if average is not None}


def differences(run: Run, row: Published) -> list[str]:
    """What is known to differ between the run and the paper's setting: a reason for another number."""
    if run.settings.get("reproduces.name"):
        named: list[str] = list(run.record["config"]["reproduces"]["differs"])
        return [*named, "C: there from 100,000 Wikipedia documents of an older dump"] if row.method else named
    differ: list[str] = []
    if row.task == "lifelong":
        edits = run.series[-1].edits if run.series else 0
        if edits != row.records:
            differ.append(f"{edits:.0f} edits, there {row.records:,}")
        if run.settings.get("task.step") != STEP:
            differ.append(f"{run.settings.get('task.step')} facts at a time, there {STEP}")
    else:
        n = max((sides.after.n or 0 for sides in run.sides().values() if sides.after), default=0)
        differ.append(f"{n:,} records, there {row.records:,}" if row.records else f"{n:,} records, there not stated")
    data: dict[str, Any] = run.record["config"].get("data") or {}
    if data.get("limit") is not None:
        differ.append(f"the first {data['limit']:,} records")
    if str(data.get("shard") or "0/1") != "0/1":
        differ.append(f"shard {data['shard']} of the data")
    moments: dict[str, Any] = run.record["config"].get("moments") or {}
    if moments and row.method:
        tokens = moments.get("tokens")
        amount = f"{tokens:,} tokens" if tokens else "the default number of tokens"
        differ.append(f"C from {amount} of '{moments.get('source')}', there 100,000 Wikipedia documents")
    dtype = run.record["model"].get("dtype")
    if dtype not in (None, "float32"):
        differ.append(f"{dtype}, there float32")
    return differ


def lines(run: Run) -> list[str]:
    """A run beside the table that it is made after, for the terminal; nothing for one that is made after none."""
    name = run.settings.get("reproduces.name")
    if not name:
        return []
    rows = [(row, own(run, row)) for row in matching(run)]
    found = [
        f"after {name}: " + ("a stand-in, another model or other data" if _stand_in(run) else "its model and data")
    ]
    for row, mine in rows:
        what = f"{row.method or 'unedited'}, {row.source}"
        both = ((metric.short, average.mean, row.values[metric]) for metric, average in mine.items())
        figures = "  ".join(f"{short} {written(ours)} ({written(printed)})" for short, ours, printed in both)
        found.append(f"  {what}, here (printed): {figures}")
    if not rows:
        found.append(f"  the table has no row for method={run.method}")
    differ = dict.fromkeys(each for row, _ in rows for each in differences(run, row))
    return [*found, *(f"  differs: {each}" for each in differ)]


def _stand_in(run: Run) -> bool:
    """Whether the model or the data is another one than the paper's."""
    differs = (run.record["config"].get("reproduces") or {}).get("differs") or []
    return any(each.startswith(("model.name:", "data.name:")) for each in differs)
