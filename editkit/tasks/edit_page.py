"""The page of task=edit: the fact, its prompts before and after, what the model says, what was written. No torch."""

from typing import Any

from editkit.data.kinds import OWN_ANSWERS, heading
from editkit.numbers import finite
from editkit.report import charts
from editkit.report.html import Body, Charts, Fold, Pairs, Section, Table, Text, cell
from editkit.report.parts import judge, plain_title, probe_table, score_tiles, scores, spectra
from editkit.runs.read import Run
from editkit.settings import KEYS_PER_DIMENSION

HEALTH = {
    "k_dot_u": "k · u",
    "k_norm": "‖k‖",
    "cos_bare_mean": "cos(bare key, mean key)",
    "v0_norm": "‖v₀‖",
    "delta_norm": "‖δ‖",
    "clamp_hit": "clamp hit",
}


def body(run: Run) -> Body:
    """What a page shows of one edit. Raises RecordError for a table that cannot be read."""
    edit = run.record["config"].get("edit")
    named = isinstance(edit, dict) and edit.get("subject")
    title = f"{edit['subject']} → {edit.get('target_new', '?')}" if isinstance(edit, dict) and named else None
    sections = [
        Section("fact", "The fact", [*_fact(run), *_verdict(run)]),
        Section("probabilities", "Before and after", _probes(run)),
        Section("says", "What the model says", _says(run)),
        Section("update", "The update", _update(run)),
    ]
    return Body(title or plain_title(run), score_tiles(run), sections)


def _fact(run: Run) -> list[Any]:
    edit = run.record["config"].get("edit")
    if not isinstance(edit, dict):
        return []
    prompt = str(edit.get("prompt") or "").replace("{}", str(edit.get("subject") or "{}"))
    answers = f"{edit.get('target_true') or '?'} → {edit.get('target_new') or '?'}"
    return [Text(f"{prompt} … {answers}", "lead")]


def _verdict(run: Run) -> list[Any]:
    """Whether the edit landed; if not, why and what to try."""
    found = run.record["verdict"]
    if not found.get("summary"):
        return []
    listed = {name: found[name] if isinstance(found.get(name), list) else [] for name in ("reasons", "try_")}
    rows = [("why", str(text)) for text in listed["reasons"]] + [("try", str(text)) for text in listed["try_"]]
    told = Text(str(found["summary"]), "good" if found.get("landed") else "bad")
    return [told, *([Table(("", "what the run shows"), rows, stacked=True)] if rows else [])]


def _probes(run: Run) -> list[Any]:
    drawn = []
    for which, title, series in (("new", "The new answer", 1), ("true", "The old answer", 0)):
        pairs, last = [], ""
        for row in run.cases:
            sides = [finite(row.get(f"probability_{which}_{when}")) for when in ("before", "after")]
            if sides == [None, None]:
                continue
            kind = str(row.get("kind") or "?")
            answer = f" … {row.get(f'target_{which}')}" if kind in OWN_ANSWERS else ""
            above = heading(kind) if kind != last else ""
            pairs.append(charts.Pair(f"{row.get('prompt')}{answer}", sides[0], sides[1], series, above))
            last = kind
        if pairs:
            drawn.append(charts.dumbbells(title, pairs))
    measured = [*scores(run, drawn=False), *judge(run)]
    table = [Fold("Every metric", measured)] if measured else []
    probes = [Fold("Every prompt as a table", [probe_table(run.cases)])] if run.cases else []
    return [*([Charts(drawn)] if drawn else []), *table, *probes]


def _says(run: Run) -> list[Any]:
    texts = run.record["texts"]
    looks = [(when, texts[when]) for when in ("before", "after") if isinstance(texts.get(when), dict)]
    if not looks:
        return []
    drawn, spoken = [], []
    for when, look in looks:
        top = [pair for pair in look.get("top") or [] if isinstance(pair, (list, tuple)) and len(pair) == 2]
        items = [(_token(token), finite(p)) for token, p in top]
        if items:
            drawn.append(charts.bars(f"Next tokens {when}", items, "probability", series=1 if when == "after" else 7))
        if look.get("continuation") is not None:
            spoken.append((when, str(look["continuation"])))
    blocks: list[Any] = [Charts(drawn)] if drawn else []
    return blocks + ([Table(("when", "continuation (greedy)"), spoken, stacked=True)] if spoken else [])


def _token(token: object) -> str:
    text = str(token)
    return text.strip() if text.strip() else repr(text)


def _update(run: Run) -> list[Any]:
    """Size, rank and health of the update."""
    edit = run.record["edit"]
    items = [(label, cell(edit[name])) for name, label in (("rank", "rank"), ("norm", "‖ΔW‖ (Frobenius)"),
             ("relative_norm", "‖ΔW‖ / ‖W‖")) if edit.get(name) is not None]  # fmt: skip
    provenance = edit.get("provenance") if isinstance(edit.get("provenance"), dict) else {}
    moments = provenance.get("moments")
    if isinstance(moments, dict):
        for name, label in (
            ("keys", "keys in C"),
            ("keys_per_dimension", "keys a dimension"),
            ("condition", "condition of C"),
        ):
            items += [(label, cell(moments[name]))] if moments.get(name) is not None else []
        each = moments.get("keys_per_dimension")
        if isinstance(each, int | float) and each < KEYS_PER_DIMENSION:
            items.append(("warning", f"few keys in C: {KEYS_PER_DIMENSION} a dimension or more are advised"))
    lost = edit.get("lost_in_rounding") if isinstance(edit.get("lost_in_rounding"), dict) else {}
    rows = [(name, finite(lost.get(name))) for name in edit.get("parameters") or []]
    blocks: list[Any] = [Pairs(items)]
    if rows:
        blocks.append(Table(("weight changed", "lost in rounding, of ‖ΔW‖"), rows, stacked=True))
    reports = [r for r in provenance.get("reports") or [] if isinstance(r, dict)]
    drawn = [chart for i, report in enumerate(reports[:6]) if (chart := _loss(report, i, len(reports)))]
    health = [(f"{HEALTH[n]}" + (f", fact {i + 1}" if len(reports) > 1 else ""), cell(r[n]))
              for i, r in enumerate(reports[:6]) for n in HEALTH if r.get(n) is not None]  # fmt: skip
    if health:
        blocks.append(Pairs(health))
    layers = [x for x in provenance.get("layers") or [] if isinstance(x, dict)]
    if layers:
        written = [
            (x.get("layer"), finite(x.get("written")), finite(x.get("missing")), x.get("null_space")) for x in layers
        ]
        blocks.append(Table(("block", "share of the residual written", "‖residual‖", "null space"), written))
    drawn += spectra(run)
    return blocks + ([Charts(drawn)] if drawn else [])


def _loss(report: dict[str, Any], number_of: int, count: int) -> charts.Chart | None:
    steps = [s for s in report.get("steps") or [] if isinstance(s, dict)]
    if len(steps) < 2:
        return None
    names = {"loss": "loss", "nll": "−log p(new answer)", "kl": "KL", "weight_decay": "weight decay"}
    curves = [
        charts.Line(label, range(len(steps)), [finite(s.get(name)) for s in steps])
        for name, label in names.items()
        if any(finite(s.get(name)) for s in steps)
    ]
    title = "How the value was optimised" + (f", fact {number_of + 1} of {count}" if count > 1 else "")
    return charts.lines(title, curves, "step", "nats (log scale)", log=True) if curves else None
