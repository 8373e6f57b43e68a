"""The frame of one run's page: what the task shows, and what every run has: restored, settings, time, run it again."""

from typing import Any

from editkit.errors import ConfigError
from editkit.numbers import finite, number
from editkit.report import reproduce
from editkit.report.compare import published_blocks
from editkit.report.html import Body, Fold, Page, Pairs, Section, Table, Text, Tiles, cell
from editkit.report.parts import ability, plain_body
from editkit.runs.kinds import get_task
from editkit.runs.protocol import told
from editkit.runs.read import Run


def page_of(run: Run) -> Page:
    """The page. Raises RecordError for a file that cannot be read."""
    body = _body(run)
    sections = [
        *body.sections,
        Section("ability", "General ability", ability(run)),
        Section("protocol", "Protocol", _protocol(run)),
        Section("published", "Beside published numbers", published_blocks([run], [run.method])),
        Section("restored", "Restored", _restored(run) if run.record["reversal"] else []),
        Section("settings", "Settings", [*_data(run), *reproduce.settings(run)]),
        Section("time", "Time", [_timings(run)]),
    ]
    tiles = Tiles([*body.tiles, *_tiles(run)])
    return Page(body.title, _subtitle(run), [tiles], [s for s in sections if s.blocks], reproduce.footer(run))


def _body(run: Run) -> Body:
    """What the run's task shows of it; its scores where the task brings no page, or is not known here."""
    try:
        page = get_task(run.task).load_page()
    except ConfigError:
        page = None
    body: Body = page(run) if page else plain_body(run)
    return body


def _subtitle(run: Run) -> str:
    seed = run.record["config"].get("seed")
    parts = [
        f"task {run.task}",
        f"method {run.method}" if run.task != "trace" else "",
        f"model {run.model}",
        str(run.record["model"].get("dtype", "")),
        str(run.record["model"].get("quantization", "")),
    ]
    alone = run.task == "trace" and run.record["trace"].get("kind") == "one"
    parts += [f"data {run.data}"] if run.data and not alone else []
    parts += [] if seed is None else [f"seed {seed}"]
    return " · ".join(part for part in parts if part)


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """What every run has: the size of the change, whether all was put back, the time."""
    tiles = []
    relative = finite(run.record["edit"].get("relative_norm"))
    if relative is not None:
        tiles.append(("‖ΔW‖ / ‖W‖", number(relative), "size of the update"))
    if "exact" in run.record["reversal"]:
        exact = bool(run.record["reversal"]["exact"])
        tiles.append(("restored", "exactly" if exact else "NOT EQUAL", "compared bit for bit"))
    total = finite(run.record["timings"].get("total"))
    if total is not None:
        tiles.append(("time", f"{number(total, 3)} s", "in all"))
    return tiles


def _protocol(run: Run) -> list[Any]:
    """How the run edited and asked."""
    return [Table(("", "this run"), told(run.record["protocol"]), stacked=True)] if run.record["protocol"] else []


def _restored(run: Run) -> list[Any]:
    found = run.record["reversal"]
    exact = found.get("exact")
    verdict = "Every compared bit is what it was before." if exact else "NOT EQUAL to what it was before."
    items = [(name, cell(found[name])) for name in ("tensors", "bytes", "digested", "touched") if found.get(name)]
    unequal = found.get("unequal") or []
    blocks: list[Any] = [Text(verdict, "good" if exact else "bad"), Pairs(items)]
    return blocks + ([Table(("not equal",), [(str(name),) for name in unequal])] if unequal else [])


def _data(run: Run) -> list[Any]:
    found = run.record["data"]
    items = [
        (name, cell(found[name])) for name in ("source", "found", "shard", "digest") if found.get(name) is not None
    ]
    return [Fold("data as read", [Pairs(items)], open=True)] if items else []


def _timings(run: Run) -> Any:
    found = {name: finite(value) for name, value in run.record["timings"].items()}
    total = found.get("total")
    rows = [(n.replace("_", " "), v, f"{v / total:.0%}" if v is not None and total else "–") for n, v in found.items()]
    return Table(("stretch", "seconds", "of the total"), rows)
