"""Metric: what a figure means. Score: one figure of a metric. The registry that every metric is in, ours too.

A metric is declared once, in the file that holds its formula:

    ES = register(Metric(COUNTERFACT, "ES", "share of rewrite prompts …"), formula)

where `formula(rows, when)` computes one case's value from the rows of the case (`measure.rows_of`). From there a Score
travels to journal, tables, record and page, and carries its metric along: no stage reads meaning out of a name.

Another package registers its own metric with the same call, and names the module in the entry point group
`editkit.metrics`, or imports it before the run. No torch here.
"""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from editkit.errors import ConfigError
from editkit.metrics.row_stats import Row
from editkit.numbers import finite
from editkit.numbers import mean as written

BEFORE, AFTER = "before", "after"
WHEN = (BEFORE, AFTER)

SHARE, DIFFERENCE, PROBABILITY, COSINE = "share", "difference", "probability", "cosine"
BITS, NATS, COUNT, RATIO, OTHER = "bits", "nats", "count", "ratio", ""

# Which cases a lifelong run asks at each point, and how a page calls them.
RETENTION, RECENT, UNTOUCHED = "retention", "recent", "untouched"
ASKED = {
    RETENTION: "all edits so far",
    RECENT: "edits since the last point",
    UNTOUCHED: "facts never edited",
}

ABILITY = "ability"  # the protocol of general ability, whose figures are no means over cases

OVER_CASES = "mean over cases of a case's mean"

Formula = Callable[[Sequence[Row], str], float | None]


@dataclass(frozen=True)
class Protocol:
    """Metrics that belong together: `name` in files, `title` on pages."""

    name: str
    title: str = field(default="", compare=False)


@dataclass(frozen=True)
class Metric:
    """What a figure means. Two metrics are the same when protocol, short name and part are.

    - `protocol`, `short`: its name, as in counterfact.ES.
    - `meaning`: one sentence for a reader of a table.
    - `better`: +1 more is better, -1 less is better, 0 neither.
    - `unit`: share, difference, probability, cosine, bits, nats, count, ratio, or "" for none.
    - `range`: least and greatest value; None where there is no bound.
    - `averaged`: how values become one figure, in words.
    - `both`: asked before and after the edit; False: only after it.
    - `headline`: among the few that a page shows first.
    - `combines`: names of metrics whose averages this one combines by their harmonic mean; it has no value of a case.
    - `part`: the part of a metric that the data divides, such as KnowEdit's Subject_Aliasing; "" for all of it.
    """

    protocol: Protocol
    short: str
    meaning: str = field(default="", compare=False)
    better: int = field(default=1, compare=False)
    unit: str = field(default=SHARE, compare=False)
    range: tuple[float | None, float | None] = field(default=(0.0, 1.0), compare=False)
    averaged: str = field(default=OVER_CASES, compare=False)
    both: bool = field(default=True, compare=False)
    headline: bool = field(default=False, compare=False)
    combines: tuple[str, ...] = field(default=(), compare=False)
    part: str = ""

    @property
    def name(self) -> str:
        """PROTOCOL.SHORT, as in counterfact.ES; parts of a metric share it."""
        return f"{self.protocol.name}.{self.short}"

    @property
    def label(self) -> str:
        """What a table of one protocol calls it."""
        return f"{self.short}: {self.part.replace('_', ' ')}" if self.part else self.short

    def column(self, when: str = AFTER) -> str:
        """Its column in edits.parquet, as in counterfact.ES_after."""
        return "_".join(part for part in (self.name, self.part, when) if part)

    def to_json(self) -> dict[str, Any]:
        """The declaration, for a record: a reader without this metric's module knows it from there."""
        return {"name": self.name, "protocol": asdict(self.protocol)} | {
            name: getattr(self, name) for name in _DECLARED
        }

    @classmethod
    def of(cls, declared: Mapping[str, Any]) -> "Metric":
        """From `to_json`; whatever is missing or of another type takes its default."""
        protocol = declared.get("protocol")
        named = protocol if isinstance(protocol, dict) else {}
        kinds = {"meaning": str, "better": int, "unit": str, "both": bool, "headline": bool, "averaged": str}
        kept = {name: declared[name] for name, kind in kinds.items() if isinstance(declared.get(name), kind)}
        bounds = declared.get("range")
        if isinstance(bounds, list) and len(bounds) == 2:
            kept["range"] = (finite(bounds[0]), finite(bounds[1]))
        owner = Protocol(str(named.get("name") or ""), str(named.get("title") or ""))
        return cls(owner, str(declared.get("short") or declared.get("name") or "?"), **kept)


_DECLARED = ("short", "meaning", "better", "unit", "range", "averaged", "both", "headline")


@dataclass(frozen=True)
class Average:
    """A mean over `n` cases, with the bounds of its 95 % interval; None where a file or a paper does not say."""

    mean: float
    n: int | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, found: object) -> "Average | None":
        """From JSON: an object with `mean`; None where that is no finite number."""
        mean = finite(found.get("mean")) if isinstance(found, dict) else None
        if mean is None or not isinstance(found, dict):
            return None
        n = found.get("n")
        return cls(mean, n if isinstance(n, int) else None, finite(found.get("low")), finite(found.get("high")))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The bounds, where there are any; one value has no interval."""
        return None if self.low is None or self.high is None or self.n == 1 else (self.low, self.high)

    def __str__(self) -> str:
        text = written(self.mean)
        if self.interval:
            text += f" [{written(self.low)}, {written(self.high)}]"
        return text + (f", n = {self.n:,}" if self.n is not None else "")


@dataclass(frozen=True)
class Score:
    """One figure: of which metric, when, of which cases (`asked`: "", retention, recent, untouched), and its value.

    The value is a float for one case (None where the metric does not apply to it), an Average for many. `control`: the
    null control (`settings.CONTROLS`) that was in force in place of the edit; "": the edit itself.
    """

    metric: Metric
    when: str
    value: float | Average | None
    asked: str = ""
    control: str = ""

    @property
    def average(self) -> Average | None:
        """The value where it is an average."""
        return self.value if isinstance(self.value, Average) else None

    def to_json(self) -> dict[str, Any]:
        """One object of a journal line or a record."""
        found: dict[str, Any] = {"metric": self.metric.name}
        found |= {"part": self.metric.part} if self.metric.part else {}
        found |= {"when": self.when} | ({"asked": self.asked} if self.asked else {})
        found |= {"control": self.control} if self.control else {}
        return found | (asdict(self.value) if isinstance(self.value, Average) else {"value": self.value})

    @classmethod
    def of(cls, found: Mapping[str, Any], declared: Mapping[str, Metric] | None = None) -> "Score":
        """From `to_json`. `declared`: metrics by name, for those that are not registered here."""
        name = str(found.get("metric") or "?")
        metric = get(name) or (declared or {}).get(name) or Metric(Protocol(""), name, better=0, unit=OTHER)
        if found.get("part"):
            metric = replace(metric, part=str(found["part"]))
        value = finite(found["value"]) if "value" in found else Average.of(found)
        asked, control = str(found.get("asked") or ""), str(found.get("control") or "")
        return cls(metric, str(found.get("when") or AFTER), value, asked, control)


# --- the registry ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registered:
    """A metric, its formula, and the kinds of rows whose groups are its parts."""

    metric: Metric
    formula: Formula | None
    parts_of: tuple[str, ...] = ()


_REGISTERED: dict[str, Registered] = {}
# Our own files, in the order of their protocols in tables.
OWN = (
    "counterfact",
    "zsre",
    "easyedit",
    "generation",
    "natural",
    "judged",
    "probes",
    "longform",
    "mquake",
    "ripple",
    "fluency",
    "drift",
)


def register(metric: Metric, formula: Formula | None = None, *, parts_of: Sequence[str] = ()) -> Metric:
    """Declare a metric; from here on every run measures it, and every table and page shows it. Returns the metric.

    - `formula(rows, when)`: one case's value from its rows, None where the metric does not apply; `when` is before or
      after. None: the metric has no value of a case (`combines`, or a task computes it).
    - `parts_of`: kinds of rows; where such a row names a group, the group's rows have a figure of their own too.

    Raises ConfigError for a name that is taken.
    """
    if metric.name in _REGISTERED:
        raise ConfigError(f"A metric '{metric.name}' is registered already. Give the new one another name.")
    _REGISTERED[metric.name] = Registered(metric, formula, tuple(parts_of))
    return metric


def unregister(metric: Metric) -> None:
    """Take a metric out again, as a test does."""
    _REGISTERED.pop(metric.name, None)


@cache
def _load() -> None:
    """Import our own declarations and those of installed packages, once; one that fails is named in a warning."""
    for name in OWN:
        importlib.import_module(f"editkit.metrics.{name}")
    for point in entry_points(group="editkit.metrics"):
        try:
            point.load()
        except Exception as error:  # the code is not ours and may raise anything
            what = f"The metrics of '{point.value}' cannot be imported: {error}."
            warnings.warn(f"{what} Correct or uninstall that package.", stacklevel=2)


def registered() -> list[Registered]:
    """All metrics in the order of tables: our own protocols, then others as they were registered."""
    _load()
    order = {name: place for place, name in enumerate(OWN)}
    return sorted(_REGISTERED.values(), key=lambda entry: order.get(entry.metric.protocol.name, len(OWN)))


def get(name: str) -> Metric | None:
    """The registered metric of a name such as counterfact.ES."""
    _load()
    found = _REGISTERED.get(name)
    return found.metric if found else None


def declarations(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The metrics of scores, each once, as a record keeps them."""
    return [metric.to_json() for metric in dict.fromkeys(replace(score.metric, part="") for score in scores)]
