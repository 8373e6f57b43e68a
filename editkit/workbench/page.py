"""The state of a tab as one HTML page, which needs no network and no workbench."""

from typing import TYPE_CHECKING, Any

from editkit.numbers import number
from editkit.report.heat import heat_map
from editkit.report.html import Charts, Code, Page, Pairs, Section, Table, Text, Tiles
from editkit.shown import SHORT

if TYPE_CHECKING:
    from editkit.workbench.desk import Desk

NAMES = {"state": "the residual stream put back", "mlp": "MLP outputs put back", "attention": "attention put back"}
SHOWN = 40  # facts of the audit


def page_of(desk: "Desk", texts: dict[str, Any]) -> Page:
    """The page. `texts`: the Python and the command that make the state."""
    total, base = desk.total(), desk.bench.base
    tiles = [("edits in force", str(sum(place.on for place in desk.stack)), f"{len(desk.stack)} on the stack")]
    if total is not None:
        view = desk.view(whole=True)
        tiles += [("‖ΔW‖ / ‖W‖", number(view["size"], 3), "of all edits together")]
    if desk.audited is not None:
        tiles += [("facts that changed", str(len(desk.audited.changed)), f"of {len(desk.audited.facts):,} others")]
    sections = [
        Section("stack", "The stack", [_stack(desk)]),
        Section("compared", "Before and after", _compared(desk)),
        Section("where", "Where the answer comes from", _where(desk)),
        Section("audit", "Every fact of the atlas asked again", _audit(desk)),
        Section("again", "Make it again", [
            Text("This Python makes the edit with this very digest, on the same machine and versions."),
            Code(texts["python"]), Text("The same on the command line:"), Code(texts["command"]),
        ]),
    ]  # fmt: skip
    digests = [("model", f"{base.name}, {base.dtype}"), ("unedited weights", base.digest)]
    digests += [("edit", total.digest)] if total is not None else []
    foot = [Pairs(digests)]
    title = "; ".join(f"{p.step.made.fact.subject} → {p.step.made.fact.target_new}" for p in desk.stack if p.on)
    title, shown = title or "Nothing in force", [section for section in sections if section.blocks]
    return Page(title, f"workbench · model {base.name}", [Tiles(tiles)], shown, foot)


def _stack(desk: "Desk") -> Table:
    rows = [
        (i, f"{p.step.made.fact.text} … {p.step.made.fact.target_new}", p.step.made.method, f"{p.strength:g}",
         "on" if p.on else "off", p.step.digest[:SHORT])
        for i, p in enumerate(desk.stack, 1)
    ]  # fmt: skip
    return Table(("", "fact", "method", "strength", "", "digest"), rows, stacked=True)


def _compared(desk: "Desk") -> list[Any]:
    if desk.compared is None:
        return []
    rows = [
        (row["heading"], row["prompt"], row["before"]["said"], row["after"]["said"], _signed(row["happened"]),
         _signed(row.get("predicted")))
        for row in desk.compared["rows"]
    ]  # fmt: skip
    columns = ("kind", "prompt", "before", "after", "log p of the wanted answer", "predicted")
    return [Table(columns, rows, stacked=True)]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _where(desk: "Desk") -> list[Any]:
    found = desk.traced
    if found is None:
        return []
    first, last = found.subject
    charts = [
        heat_map(
            NAMES.get(kind, kind), table.tolist(), found.tokens, [str(i) for i in range(table.shape[1])], "block",
            f"P({found.answer.strip()})", starred=range(first, last + 1), low=found.corrupted, high=found.clean,
        )
        for kind, table in found.probability.items()
    ]  # fmt: skip
    text = (
        f"The prompt: {found.how['prompt'].replace('{}', found.how['subject'])}. P is {number(found.clean, 3)} as it "
    )
    text += f"is, and {number(found.corrupted, 3)} with the subject (*) corrupted."
    return [Text(text), Charts(charts)]


def _audit(desk: "Desk") -> list[Any]:
    if desk.audited is None:
        return []
    changed = desk.audited.changed
    rows = [
        (f.relation.replace("_", " "), f.subject, f.before, f.after, number(f.pull, 2), number(f.cosine, 2))
        for f in changed[:SHOWN]
    ]
    told = f"{len(changed)} of {len(desk.audited.facts):,} have another answer than the unedited model's"
    told += f"; the {SHOWN} nearest to the edit:" if len(changed) > SHOWN else "."
    note = "Pull and cosine are predicted from the unedited model: how much of the edit reaches the fact's own key."
    table = Table(("relation", "subject", "before", "after", "pull", "cosine"), rows, stacked=True)
    return [Text(told), *([table, Text(note, "note")] if rows else [])]
