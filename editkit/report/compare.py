"""The page of several runs: side by side, what differs between them, and what papers printed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from editkit.metrics.metric import ASKED, SHARE, Average, Metric
from editkit.numbers import finite, number
from editkit.report import aggregate, chance, charts, published, reproduce, series
from editkit.report.html import Best, Charts, Code, Fold, Link, Page, Section, Table, Text, Tiles, cell
from editkit.report.series import LIFELONG
from editkit.runs.names import REPORT
from editkit.runs.protocol import difference, differing, named
from editkit.runs.read import Run, Sides, Unfinished, flat

CHARTED = 24  # runs in one chart


def page_of(runs: Sequence[Run], unfinished: Sequence[Unfinished], parent: Path, beside: Path) -> Page:
    """`parent`: what the runs' names are relative to. `beside`: the folder the page will be in, for its links."""
    names = _names(runs, parent)
    differing = _differing(runs)
    sections = [
        Section("runs", "Runs", _runs(runs, names, differing, beside)),
        Section("unfinished", "Unfinished", _unfinished(unfinished, parent)),
        Section("metrics", "Metrics side by side", _metrics(runs, names)),
        Section("paired", "Paired differences", chance.paired_blocks(runs, names)),
        Section("controls", "Null controls", chance.control_blocks(runs, names)),
        Section("curves", "Along the edits", _curves(runs, names)),
        Section("published", "Beside published numbers", published_blocks(runs, names)),
        Section("same", "What is the same", _same(runs, differing)),
        Section("again", "Run them again", _again(runs, names)),
    ]
    tasks = ", ".join(dict.fromkeys(run.task for run in runs))
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    tiles = [
        ("runs", f"{len(runs):,}", f"{len(unfinished)} unfinished" if unfinished else "all finished"),
        ("methods", str(len({run.method for run in runs})), ", ".join(dict.fromkeys(run.method for run in runs))),
        ("restored", _restored(runs), "runs whose weights came back bit for bit"),
    ]
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"1 run: {runs[0].method} on {runs[0].model}"
    return Page(title, f"{tasks} on {models} · {parent.name}", [Tiles(tiles)], [s for s in sections if s.blocks])


def _names(runs: Sequence[Run], parent: Path) -> list[str]:
    """A short name for each run: its method, which says more than a folder; the folder too where two are alike."""
    folders = [_relative(run.folder, parent) for run in runs]
    plain = [run.method for run in runs]
    if len({run.task for run in runs}) > 1:
        plain = [f"{run.task} {name}" for run, name in zip(runs, plain, strict=True)]
    if len({run.model for run in runs}) > 1:
        plain = [f"{name}, {run.model}" for run, name in zip(runs, plain, strict=True)]
    return [n if plain.count(n) == 1 else f"{n} ({f})" for n, f in zip(plain, folders, strict=True)]


def _relative(folder: Path, parent: Path) -> str:
    try:
        return str(folder.resolve().relative_to(parent.resolve()))
    except ValueError:
        return str(folder)


def _restored(runs: Sequence[Run]) -> str:
    known = [run for run in runs if "exact" in run.record["reversal"]]
    return f"{sum(bool(run.record['reversal']['exact']) for run in known)} of {len(known)}"


def _differing(runs: Sequence[Run]) -> list[str]:
    """Settings that differ; a method's own only where they differ among runs of that method."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = []
    for key in keys:
        among: dict[str, set[str]] = {}
        for run in runs:
            group = run.method if key.startswith("method.") and key != "method.name" else ""
            if group == "" or key in run.settings:
                among.setdefault(group, set()).add(repr(run.settings.get(key)))
        if any(len(values) > 1 for values in among.values()):
            found.append(key)
    return found


def _runs(runs: Sequence[Run], names: Sequence[str], differing: Sequence[str], beside: Path) -> list[Any]:
    columns = ["run", "task", *differing, "rank", "‖ΔW‖/‖W‖", "restored", "seconds"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        page = run.folder / REPORT
        first = Link(name, _href(page, beside)) if page.is_file() else name
        values = [cell(run.settings.get(key)) for key in differing]
        edit = run.record["edit"]
        rows.append([first, run.task, *values, edit.get("rank"), finite(edit.get("relative_norm")),
                     run.record["reversal"].get("exact"), finite(run.record["timings"].get("total"))])  # fmt: skip
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] is not None for row in rows)]
    shown = [[row[i] for i in kept] for row in rows]
    table = Table([columns[i] for i in kept], shown, "Settings that differ, and what each run came to")
    note = _also(runs)
    return [table, *([Text(note, "note")] if note else [])]


def _href(page: Path, beside: Path) -> str:
    return quote(Path(os.path.relpath(page.resolve(), beside.resolve())).as_posix())


def _also(runs: Sequence[Run]) -> str:
    """What differs beside the settings, which a reader of the numbers should know."""
    seen: dict[str, set[str]] = {}
    for run in runs:
        found = {"commit": run.record["environment"].get("commit"), "device": run.record["environment"].get("device")}
        found |= {
            "model's weights": run.record["model"].get("digest"),
            "data's digest": run.record["data"].get("digest"),
        }
        found |= flat({"package": run.record["environment"].get("packages") or {}})
        for name, value in found.items():
            if value is not None:
                seen.setdefault(name, set()).add(str(value))
    differ = [name for name, values in seen.items() if len(values) > 1]
    return f"Beside the settings these differ: {', '.join(differ)}." if differ else ""


def _unfinished(unfinished: Sequence[Unfinished], parent: Path) -> list[Any]:
    rows = [(_relative(u.folder, parent), u.why or "no record.json: interrupted, or still running") for u in unfinished]
    return [Table(("folder", "why"), rows, stacked=True)] if rows else []


def _metrics(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """The metrics of all runs. Those of one protocol stand together; where there are several, it is said."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        if run.scores:
            groups.setdefault(repr(sorted(run.record["protocol"].items())), []).append(place)
    protocols = [runs[places[0]].record["protocol"] for places in groups.values()]
    blocks: list[Any] = [Text(difference(protocols), "bad")] if len(groups) > 1 else []
    fields = differing(protocols)
    for protocol, places in zip(protocols, groups.values(), strict=True):
        own = _of_one_protocol([runs[i] for i in places], [names[i] for i in places])
        blocks += [Text(named(protocol, fields), "strong")] if len(groups) > 1 and own else []
        blocks += own
    if not blocks:
        return []
    note = "After the edit: means over cases, in brackets the 95 % bootstrap interval. Bold: the best mean of a "
    note += "column, and every run whose interval reaches it."
    return [Text(note, "note"), *blocks]


def _of_one_protocol(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Charts of the headline metrics, and a table for each group of metrics, runs as rows."""
    drawn, tables = [], []
    for asked in ("", *ASKED):
        sides = [run.sides(asked) for run in runs]
        known = [m for m, s in _first(sides).items() if s.shown is not None]
        for metric in aggregate.headline(m for m in known if m.unit == SHARE) if asked == "" else []:
            rows = [(n, (after,)) for own, n in zip(sides, names, strict=True) if (after := _after(own, metric))]
            drawn.append(charts.whiskers(f"{metric.label}: {metric.meaning}", rows[:CHARTED], ("after",)))
        for protocol in dict.fromkeys(metric.protocol for metric in known):
            own = [metric for metric in known if metric.protocol == protocol]
            title = protocol.title or protocol.name or "Others"
            title = f"{title} · {ASKED[asked]}" if asked else title
            tables.append(_side_by_side(runs, names, sides, own, title))
    return [*([Charts(drawn)] if drawn else []), *tables]


def _first(sides: Sequence[dict[Metric, Sides]]) -> dict[Metric, Sides]:
    """Every metric of several runs, from the first run that has a figure of it."""
    found: dict[Metric, Sides] = {}
    for own in sides:
        found |= {metric: each for metric, each in own.items() if metric not in found or found[metric].shown is None}
    return found


def _side_by_side(
    runs: Sequence[Run], names: Sequence[str], sides: Sequence[dict[Metric, Sides]], own: Sequence[Metric], title: str
) -> Table:
    """The metrics of a protocol as columns, the unedited models and the runs as rows.

    - `sides`: for each run its metrics before and after.
    - `own`: the metrics of the protocol.
    """
    best = {metric: _best([_after(each, metric) for each in sides], metric.better) for metric in own}
    rows: list[list[Any]] = [[label, _counts(found), *found] for label, found in _unedited(runs, sides, own)]
    for i, (each, name) in enumerate(zip(sides, names, strict=True)):
        values = [_after(each, metric) for metric in own]
        if any(values):
            cells = [Best(v) if i in best[m] else v for m, v in zip(own, values, strict=True)]
            rows.append([name, _counts(values), *cells])
    return Table(["run", "n", *(metric.label for metric in own)], rows, title)


def _counts(averages: Sequence[Average | None]) -> int | str | None:
    """n of a row; its least and greatest where its metrics have different ones."""
    found = sorted({a.n for a in averages if a is not None and a.n})
    return None if not found else found[0] if len(found) == 1 else f"{found[0]:,}–{found[-1]:,}"


def _after(sides: dict[Metric, Sides], metric: Metric) -> Average | None:
    return sides[metric].after if metric in sides else None


def _unedited(
    runs: Sequence[Run], sides: Sequence[dict[Metric, Sides]], own: Sequence[Metric]
) -> list[tuple[str, list[Average | None]]]:
    """What the unedited models came to: one row for each model and data set, as the first of its runs has it."""
    found: dict[tuple[str, ...], tuple[str, list[Average | None]]] = {}
    for run, each in zip(runs, sides, strict=True):
        values = [each[metric].before if metric in each else None for metric in own]
        key = (run.task, run.model, str(run.record["model"].get("digest")), str(run.record["data"].get("digest")))
        if any(values) and key not in found:
            found[key] = (f"unedited {run.model}", values)
    return list(found.values())


def _best(averages: Sequence[Average | None], better: int) -> set[int]:
    """Indices of the best mean and of those whose interval reaches it.

    None where all do, where no side is better, or where the best has no interval to say how sure it is.
    """
    known = {i: a for i, a in enumerate(averages) if a is not None}
    if not better or len(known) < 2:
        return set()
    top = max(better * a.mean for a in known.values())
    if not all(a.low is not None for a in known.values() if better * a.mean == top):
        return set()
    reach = {
        i
        for i, a in known.items()
        if better * a.mean == top
        or (a.low is not None and a.high is not None and better * (a.high if better > 0 else a.low) >= top)
    }
    return reach if len(reach) < len(known) else set()


def _curves(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """Lifelong runs overlaid."""
    long = [(run, name) for run, name in zip(runs, names, strict=True) if run.series][:CHARTED]
    if not long:
        return []
    several, called = [run for run, _ in long], [name for _, name in long]
    drawn = [chart for chosen in LIFELONG if (chart := series.overlaid(several, called, chosen))]
    rows = [(name, number(c[0]) if (c := series.collapses(run)) else "not collapsed") for run, name in long]
    return [Charts(drawn), Table(("run", "called collapsed first at … edits"), rows)]


def published_blocks(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    """The papers' rows for each run that matches one; the unedited model's once for each model and data."""
    blocks: list[Any] = []
    seen = set()
    for run, name in zip(runs, names, strict=True):
        for row in published.matching(run):
            mine = published.own(run, row)
            key = (row, run.record["model"].get("digest"), run.record["data"].get("digest")) if not row.method else None
            if not mine or key in seen:
                continue
            seen.update([key] if key else [])
            printed = [Average(value) for value in row.values.values()]
            rows = [("printed", *printed), ("this run", *(mine.get(metric) for metric in row.values))]
            title = f"{name} beside {row.method}" if row.method else f"unedited {run.model}"
            blocks.append(Table(("", *(metric.label for metric in row.values)), rows, f"{title}, {row.source}"))
            blocks.append(Text("Differs: " + "; ".join(published.differences(run, row)) + ".", "note"))
    if blocks:
        blocks.insert(0, Text("Printed numbers are the papers' own, divided by 100; none was measured here.", "note"))
    return blocks


def _same(runs: Sequence[Run], differing: Sequence[str]) -> list[Any]:
    common = [(k, cell(v)) for k, v in runs[0].settings.items()
              if k not in differing and all(k in run.settings for run in runs)]  # fmt: skip
    return [Fold(f"{len(common)} settings", [Table(("setting", "value"), common, stacked=True)])] if common else []


def _again(runs: Sequence[Run], names: Sequence[str]) -> list[Any]:
    commands = [(name, reproduce.command(run)) for run, name in zip(runs, names, strict=True)]
    lines = [text if alone else f"{text}   # with others" for name, (text, alone) in commands if text]
    commits = dict.fromkeys(str(run.record["environment"].get("commit")) for run in runs)
    return [Code("\n".join(dict.fromkeys(lines))), Text(f"Commit {', '.join(commits)}.", "note")] if lines else []
