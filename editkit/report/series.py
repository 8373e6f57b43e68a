"""The points of lifelong runs as curves: chosen metrics, drift, growth of the weights, and where a run collapsed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from editkit.data.kinds import REWRITE
from editkit.metrics.counterfact import ES, NS, PS
from editkit.metrics.drift import KL, PERPLEXITY
from editkit.metrics.metric import ASKED, RECENT, RETENTION, UNTOUCHED, Average, Metric
from editkit.metrics.natural import RIGHT
from editkit.report import charts
from editkit.runs.read import Point, Run


@dataclass(frozen=True)
class Curve:
    """What one line of a chart shows: a value of each point, under a name."""

    name: str
    value: Callable[[Point], Average | None]


@dataclass(frozen=True)
class Chosen:
    """A chart of lifelong runs: its title, a short name for tables, the axis, and its curves.

    Several runs side by side are drawn with the first curve alone.
    """

    title: str
    short: str
    axis: str
    curves: Sequence[Curve]
    share: bool = False


def of(metric: Metric, asked: str, name: str) -> Curve:
    """The average of a metric over those asked."""
    return Curve(name, lambda point: point.average(metric, asked))


def growth(point: Point) -> Average | None:
    """‖ΔW‖ / ‖W‖ of all edits so far."""
    return None if point.relative_norm is None else Average(point.relative_norm)


def drawn(run: Run, chosen: Chosen) -> charts.Chart | None:
    """One chart of a run; None where no point has a value."""
    return _chart(chosen, [line for curve in chosen.curves if (line := _line(run, curve, curve.name))])


def overlaid(runs: Sequence[Run], names: Sequence[str], chosen: Chosen) -> charts.Chart | None:
    """The chart's first curve for each of several runs."""
    curve = chosen.curves[0]
    return _chart(chosen, [line for run, name in zip(runs, names, strict=True) if (line := _line(run, curve, name))])


def collapses(run: Run) -> list[float]:
    """The first number of edits at which the run is called collapsed; empty where it is not."""
    return [point.edits for point in run.series if point.collapsed][:1]


def _line(run: Run, curve: Curve, name: str) -> charts.Line | None:
    found = [curve.value(point) for point in run.series]
    if not any(found):
        return None
    return charts.Line(
        name,
        [point.edits for point in run.series],
        [a.mean if a else None for a in found],
        [a.low if a else None for a in found],
        [a.high if a else None for a in found],
        collapses(run),
    )


def _chart(chosen: Chosen, lines: Sequence[charts.Line]) -> charts.Chart | None:
    if not lines:
        return None
    ys = [y for line in lines for y in line.y if y is not None and y > 0]
    log = not chosen.share and len(ys) > 1 and max(ys) > 50 * min(ys)
    axis = chosen.axis + (" (log scale)" if log else "")
    return charts.lines(chosen.title, lines, "edits", axis, log=log, share=chosen.share)


def _edited(metric: Metric) -> list[Curve]:
    return [of(metric, RETENTION, ASKED[RETENTION]), of(metric, RECENT, ASKED[RECENT])]


# The charts of a lifelong run, all there are: at most eight, each a sentence.
LIFELONG = (
    Chosen("Efficacy: the new object is likelier after the rewrite prompt", "ES", "share of rewrite prompts (ES)",
           _edited(ES), share=True),
    Chosen("Paraphrases: the new object is likelier in other words too", "PS", "share of paraphrases (PS)",
           _edited(PS), share=True),
    Chosen("Neighborhood: similar subjects keep their object", "NS", "share of neighborhood prompts (NS)",
           _edited(NS), share=True),
    Chosen("Free answers: all that the model says up to its natural stop is the new object", "natural stop",
           "share of rewrite prompts", _edited(RIGHT[REWRITE]), share=True),
    Chosen("Facts never edited: the true object is still likelier", "untouched", "share of prompts",
           [of(NS, UNTOUCHED, ASKED[UNTOUCHED])], share=True),
    Chosen("Drift: how far predictions on other text have moved", "KL", "KL(unedited ‖ edited), nats per token",
           [of(KL, "", "KL")]),
    Chosen("Perplexity of other text", "perplexity", "perplexity", [of(PERPLEXITY, "", "perplexity")]),
    Chosen("Growth of the weights: size of all edits together", "‖ΔW‖ / ‖W‖", "‖ΔW‖ / ‖W‖",
           [Curve("‖ΔW‖ / ‖W‖", growth)]),
)  # fmt: skip
