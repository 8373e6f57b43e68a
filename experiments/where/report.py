"""The study's tables and pictures, from what where.py measured."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from marked import between

from editkit import propose_layers
from editkit.files import whole, write_text
from editkit.metrics.correlation import rank_correlation, ranks, spearman
from editkit.tracing import PARTS, AverageTrace

RESAMPLES = 2000
OF_PAIRS = 300  # resamples of edits with all their pairs
BOUNDS = torch.tensor([0.025, 0.975], dtype=torch.float64)
LAST = PARTS.index("last subject token")
METRICS = {
    "ES": "counterfact.ES_after",
    "PS": "counterfact.PS_after",
    "unseen PS": "counterfact.unseen_PS_after",
    "NS": "counterfact.NS_after",
    "same subject": "counterfact.same_subject_after",
    "EM": "counterfact.EM_after",
    "PM": "counterfact.PM_after",
    "NM": "counterfact.NM_after",
}
PREDICTORS = {
    "drop": "drop",
    "change": "change",
    "relative": "relative",
    "cosine": "cos(k′, u)",
    "cosine_key": "cos(k′, k)",
}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = "osD^v"
Interval = tuple[float, float, float]  # value, and its 95 % bootstrap interval over facts or edits


def report(work: Path, here: Path) -> None:
    """Write results.json and the pictures, and fill the tables of README.md in `here`."""
    found: dict[str, Any] = {}
    tables: dict[str, str] = {}
    average = AverageTrace.load(work / "trace")
    found["trace"], tables["trace"] = _trace(average, work)
    tables["settings"] = _settings(average, work)
    edits = _lines(work / "edits.jsonl")
    found["edits"], tables["edits"], tables["blocks"], tables["facts"] = _edits(average, edits)
    side = _lines(work / "side.jsonl")
    found["side"], tables["side"] = _side(side)
    write_text(here / "results.json", json.dumps(_rounded(found), indent=1, ensure_ascii=False) + "\n")
    for name, table in tables.items():
        between(here / "README.md", name, [table])
    _draw_where(average, found["edits"]["by_block"], here / "where.png")
    _draw_side(side, found["side"], here / "side_effects.png")


def _settings(average: AverageTrace, work: Path) -> str:
    environment = json.loads((work / "trace_seconds.json").read_text(encoding="utf-8"))
    with (work / "side.jsonl").open(encoding="utf-8") as file:
        header = json.loads(next(file))
    how = average.how
    return (
        f"The bundled model (digest {header['model'][:16]}), float32, one thread of a shared core, commit "
        f"{environment['commit'][:7]}. Facts: the first {len(average.texts) + len(average.skipped)} of data=atlas "
        f"(seed 0). Traces: noise of {how['noise']:g} · σ, σ {how['sigma']:.4f} over the subjects' tokens, "
        f"{how['samples']} samples, engine {how['engine']}. R-ROME at its constants for this model, contexts and "
        "moments drawn with seed 0 and shared by all edits."
    )


# 1. Where facts are recalled


def _trace(average: AverageTrace, work: Path) -> tuple[dict[str, Any], str]:
    traces = {"trace": average}
    if (work / "severed.npz").exists():
        traces["severed"] = AverageTrace.load(work / "severed")
    rows = [["put back", "at", *(f"block {b}" for b in range(average.layers))]]
    for one in traces.values():
        for kind in one.effect:
            mean, (low, high) = one.mean(kind), one.interval(kind)
            for part in ("first subject token", "last subject token", "first subsequent token", "last token"):
                p = PARTS.index(part)
                rows.append([kind.replace("_", " "), part, *map(_pm, mean[p], low[p], high[p])])
    proposals = [propose_layers(average, n) for n in (1, 2)]
    drawn = _drawn(len(average.texts))
    gone = average.clean - average.corrupted
    low, high = gone[drawn].mean(1).quantile(BOUNDS).tolist()
    seconds = {step: json.loads((work / f"{step}_seconds.json").read_text(encoding="utf-8")) for step in traces}
    said = {
        "facts": len(average.texts),
        "skipped": average.skipped,
        "clean": average.clean.mean().item(),
        "corrupted": average.corrupted.mean().item(),
        "total_effect": [average.total_effect, low, high],
        "window": average.window,
        "how": average.how,
        "seconds": {step: {key: each[key] for key in ("wall", "processor")} for step, each in seconds.items()},
        "commit": seconds["trace"]["commit"],
        "proposals": [{"layers": each.layers, "support": each.support, "text": str(each)} for each in proposals],
        "effect": [row for one in traces.values() for row in one.to_frame().to_dict("records")],
    }
    notes = [
        f"{len(average.texts)} facts, {len(average.skipped)} skipped; P(answer) {said['clean']:.3f} clean, "
        f"{said['corrupted']:.3f} corrupted, total effect {_interval(said['total_effect'])}; window {average.window}."
    ]
    notes += [
        f"- {', '.join(one.effect)}: {seconds[step]['wall']:.0f} s wall, {seconds[step]['processor']:.0f} s processor"
        for step, one in traces.items()
    ]
    notes += [f"- `propose_layers(average, {n})`: {each}" for n, each in enumerate(proposals, 1)]
    return said, _table(rows) + "\n\n" + "\n".join(notes)


# 2. Where an edit succeeds


def _edits(average: AverageTrace, lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str, str, str]:
    texts = list(dict.fromkeys(line["text"] for line in lines))
    blocks = 1 + max(line["job"][1] for line in lines)
    values = {
        name: torch.full((len(texts), blocks), torch.nan, dtype=torch.float64) for name in [*METRICS, "norm", "seconds"]
    }
    for line in lines:
        at = texts.index(line["text"]), line["job"][1]
        for name, key in METRICS.items():
            if line["values"].get(key) is not None:
                values[name][at] = line["values"][key]
        values["norm"][at], values["seconds"][at] = line["norm"], line["seconds"]
    # Facts that were edited at every block and traced.
    keep = [i for i, text in enumerate(texts) if text in average.texts and not values["norm"][i].isnan().any()]
    values = {name: table[keep] for name, table in values.items()}
    rows = [average.texts.index(texts[i]) for i in keep]
    traces = {kind: effect[rows, LAST, :blocks] for kind, effect in average.effect.items()}
    drawn = _drawn(len(keep))

    by_block: dict[str, list[list[float]]] = {}
    for name in (*METRICS, "norm"):
        means = values[name][drawn].nanmean(1)  # [resamples, blocks]
        low, high = means.nanquantile(BOUNDS, 0)
        by_block[name] = [
            [m, a, b] for m, a, b in zip(values[name].nanmean(0).tolist(), low.tolist(), high.tolist(), strict=True)
        ]
    own = {f"AIE {kind}": table for kind, table in traces.items()}
    for name, effect in own.items():
        low, high = effect[drawn].mean(1).quantile(BOUNDS, 0)
        by_block[name] = [
            [m, a, b] for m, a, b in zip(effect.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
        ]
    table: list[list[Any]] = [["block", *range(blocks)]]
    table += [[name, *(_pm(*each) for each in by_block[name])] for name in by_block]

    across = {}
    for kind, effect in traces.items():
        for name in METRICS:
            each = [spearman(effect[d].mean(0), values[name][d].nanmean(0)) for d in drawn[:1000]]
            low, high = torch.tensor(each).double().nanquantile(BOUNDS).tolist()
            across[f"{kind}, {name}"] = [spearman(effect.mean(0), values[name].nanmean(0)), low, high]
    blocks_table = [["", *METRICS]] + [
        [kind, *(_interval(across[f"{kind}, {name}"], 2) for name in METRICS)] for kind in traces
    ]

    within = {
        f"{kind}, {name}": _explained(effect, values[name])
        for kind, effect in traces.items()
        for name in ("EM", "PM", "NM")
    }
    heads = (
        "trace",
        "outcome",
        "R² block",
        "R² trace",
        "R² both",
        "extra",
        "95 % of shuffled below",
        "slope",
        "ρ over facts at a block",
    )
    facts_table: list[list[Any]] = [list(heads)]
    for name, explained in within.items():
        kind, outcome = name.split(", ")
        shares = (f"{explained[which][0]:.3f}" for which in ("block", "trace", "both"))
        more = (
            _interval(explained["extra"]),
            f"{explained['shuffled']:.3f}",
            _interval(explained["slope"], 2),
            _interval(explained["rho"], 2),
        )
        facts_table.append([kind, outcome, *shares, *more])
    said = {
        "facts": len(keep),
        "edits": len(keep) * blocks,
        "by_block": by_block,
        "across_blocks": across,
        "within": within,
    }
    said["seconds_an_edit"] = values["seconds"].mean().item()
    seconds = said["seconds_an_edit"]
    lead = f"{len(keep)} facts, {len(keep) * blocks} edits, {seconds:.1f} s each with its measuring.\n\n"
    return said, lead + _table(table), _table(blocks_table), _table(facts_table)


def _explained(effect: Tensor, outcome: Tensor) -> dict[str, Any]:
    """How much of the outcome's variance over facts and blocks is explained by the block, by the trace, by both.

    `slope`: of the outcome on the trace, blocks held; `rho`: at one block over facts, averaged over blocks; `shuffled`:
    what the trace adds in 95 % of shuffles of the facts' traces at each block.
    """
    n, blocks = effect.shape

    def fit(x: Tensor, y: Tensor) -> dict[str, float]:
        dummies = torch.eye(blocks, dtype=torch.float64).repeat(len(x), 1)
        trace, flat = x.reshape(-1, 1), y.reshape(-1)
        total = (flat - flat.mean()).square().sum()

        def r2(design: Tensor) -> tuple[float, float]:
            # By the Gram matrix with a trace of ridge: a resample may hold a constant trace.
            gram = design.T @ design + 1e-10 * torch.eye(design.shape[1], dtype=torch.float64)
            weights = torch.linalg.solve(gram, design.T @ flat)
            return 1 - ((flat - design @ weights).square().sum() / total).item(), weights[-1].item()

        block, _ = r2(dummies)
        alone, _ = r2(torch.cat([torch.ones_like(trace), trace], 1))
        both, slope = r2(torch.cat([dummies, trace], 1))
        rho = torch.tensor([spearman(x[:, b], y[:, b]) for b in range(blocks)]).nanmean().item()
        return {"block": block, "trace": alone, "both": both, "extra": both - block, "slope": slope, "rho": rho}

    whole_ = fit(effect, outcome)
    each = [fit(effect[d], outcome[d]) for d in _drawn(n)[:1000]]
    bounds = {name: torch.tensor([e[name] for e in each]).double().nanquantile(BOUNDS).tolist() for name in whole_}
    generator = torch.Generator().manual_seed(1)
    shuffled = []
    for _ in range(500):
        mixed = torch.stack([effect[torch.randperm(n, generator=generator), b] for b in range(blocks)], 1)
        shuffled.append(fit(mixed, outcome)["extra"])
    at = torch.tensor(shuffled).double().quantile(0.95).item()
    return {name: [whole_[name], *bounds[name]] for name in whole_} | {"shuffled": at}


# 3. Side effects


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Every pair of an edit and a fact that was known before it: [pairs] each."""
    names = lines[0]["columns"]
    found = {n: torch.cat([torch.tensor(line["columns"][n], dtype=torch.float64) for line in lines]) for n in names}
    found["edit"] = torch.cat([torch.full((len(line["columns"]["lost"]),), float(line["job"])) for line in lines])
    for name in ("cosine", "cosine_key"):
        found[name] = found[name].abs()
    known = found["known"] == 1
    return {name: column[known] for name, column in found.items()}


def _side(lines: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    every = _columns(lines)
    said: dict[str, Any] = {
        "edits": len(lines),
        "seconds_of_predicting": sum(x["predicting"] for x in lines) / len(lines),
    }
    said["seconds_an_edit"] = sum(x["seconds"] for x in lines) / len(lines)
    rows: list[list[Any]] = [
        ["asked", "predictor", "ρ with what is lost", "ρ with its size", "the same within an edit", "AUC of flips"]
    ]
    subsets = {
        "all": every["sibling"] >= 0,
        "other subjects": every["sibling"] == 0,
        "same subject": every["sibling"] == 1,
    }
    notes = []
    for subset, chosen in tqdm(subsets.items(), desc="side effects"):
        part = {name: column[chosen] for name, column in every.items()}
        flips = 1 - part["kept"]
        edits = part["edit"].tolist()
        low, high = _over_edits(part, lambda p: (1 - p["kept"]).mean().item())
        share = [flips.mean().item(), low, high]
        said[subset] = {"pairs": len(flips), "flips": int(flips.sum()), "flip_share": share}
        notes.append(f"{subset}: {len(flips)} pairs, {int(flips.sum())} flips ({_interval(share, 4)})")
        for name, title in PREDICTORS.items():
            signed = rank_correlation(part[name].tolist(), part["lost"].tolist(), edits, resamples=OF_PAIRS)
            size = part[name].abs()
            absolute = rank_correlation(size.tolist(), part["lost"].abs().tolist(), edits, resamples=OF_PAIRS)
            inside = _inside(part, size) if subset != "same subject" else None
            bounds = _over_edits(part, lambda p, n=name: _auc(p[n], 1 - p["kept"]))
            auc = [_auc(part[name], flips), *bounds]
            said[subset][name] = {"rho_lost": signed, "rho_size": absolute, "rho_size_within": inside, "auc": auc}
            rows.append([subset, title, *(_interval(each) if each else "" for each in (signed, absolute, inside, auc))])
    lead = f"{len(lines)} edits; pairs of an edit and a fact that the unedited model says: {'; '.join(notes)}.\n"
    seconds = said["seconds_of_predicting"], said["seconds_an_edit"]
    lead += "Seconds an edit: {:.2f} to predict, {:.1f} to compute, predict and measure.\n\n".format(*seconds)
    return said, lead + _table(rows)


def _inside(part: dict[str, Tensor], size: Tensor) -> list[float]:
    """ρ of size and |lost| over the facts of one edit, averaged over edits."""
    each = []
    for edit in part["edit"].unique():
        mine = part["edit"] == edit
        each.append(spearman(size[mine], part["lost"][mine].abs()))
    found = torch.tensor(each, dtype=torch.float64)
    return [found.nanmean().item(), *found[_drawn(len(found))].nanmean(1).quantile(BOUNDS).tolist()]


def _over_edits(part: dict[str, Tensor], value: Any) -> list[float]:
    """The bounds of `value(pairs)`, edits drawn with all their pairs."""
    members = [torch.nonzero(part["edit"] == edit)[:, 0] for edit in part["edit"].unique()]
    each = []
    for d in _drawn(len(members))[:OF_PAIRS]:
        at = torch.cat([members[i] for i in d.tolist()])
        each.append(value({name: column[at] for name, column in part.items()}))
    return torch.tensor(each, dtype=torch.float64).nanquantile(BOUNDS).tolist()


def _auc(score: Tensor, label: Tensor) -> float:
    """The chance that a pair that flipped has the higher score than one that did not; ties count half."""
    rank, positive = ranks(score), label == 1
    n, m = int(positive.sum()), int((~positive).sum())
    return ((rank[positive].sum() - n * (n - 1) / 2) / (n * m)).item() if n and m else float("nan")


# Arithmetic and text


def _drawn(n: int) -> Tensor:
    """[resamples, n]: bootstrap samples, the same for every quantity over as many."""
    return torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][1:]


def _pm(mean: Any, low: Any, high: Any) -> str:
    """A mean with half of its interval."""
    return f"{float(mean):.3f} ±{(float(high) - float(low)) / 2:.2f}"


def _interval(value: Sequence[float], digits: int = 3) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _rounded(value: Any) -> Any:
    """Five significant digits, and null for what is not finite."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    return value


# Pictures


def _saved(figure: Figure, path: Path) -> None:
    with whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def _curve(axes: Any, number: int, name: str, each: Sequence[Sequence[float]]) -> None:
    mean, low, high = ([row[i] for row in each] for i in range(3))
    blocks = range(len(each))
    axes.plot(blocks, mean, color=COLORS[number], marker=MARKERS[number], markersize=4, label=name)
    axes.fill_between(blocks, low, high, color=COLORS[number], alpha=0.15, linewidth=0)


def _draw_where(average: AverageTrace, by_block: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, kind in enumerate(("state", "mlp", "attention")):
        mean, (low, high) = average.mean(kind)[LAST], average.interval(kind)
        _curve(left, number, kind, list(zip(mean.tolist(), low[LAST].tolist(), high[LAST].tolist(), strict=True)))
    left.set(
        title="Put back at the subject's last token", xlabel="block", ylabel="average indirect effect on P(answer)"
    )
    for number, name in enumerate(("ES", "PS", "unseen PS", "NS", "same subject")):
        _curve(right, number, name, by_block[name])
    right.set(title="One R-ROME edit at the block", xlabel="block", ylabel="share", ylim=(-0.03, 1.05))
    right.set_xlim(left.get_xlim())
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=5, fontsize=9)
    _saved(figure, path)


def _draw_side(lines: Sequence[dict[str, Any]], found: dict[str, Any], path: Path) -> None:
    part = _columns(lines)
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, sibling) in enumerate((("other subjects", 0), ("same subject", 1))):
        mine = part["sibling"] == sibling
        left.scatter(
            part["drop"][mine], part["lost"][mine], s=5, alpha=0.5, color=COLORS[number], label=name, linewidth=0
        )
    left.set_xscale("symlog", linthresh=1e-3)
    left.set_yscale("symlog", linthresh=1e-3)
    left.axline((0, 0), (1, 1), color="0.6", linewidth=0.8)
    left.set(
        title="Each pair of an edit and another fact",
        xlabel="predicted drop of log p (nats a token)",
        ylabel="measured",
    )
    left.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, markerscale=3)
    flips = 1 - part["kept"]
    for number, (name, title) in enumerate(PREDICTORS.items()):
        order = part[name].argsort()
        shares = [flips[some].mean().item() for some in order.tensor_split(20)]
        label = f"{title}, AUC {found['all'][name]['auc'][0]:.2f}"
        right.plot(range(1, 21), shares, color=COLORS[number], marker=MARKERS[number], markersize=4, label=label)
    right.set(title="Answers that flip", xlabel="twentieth of the pairs, by the prediction", ylabel="share")
    right.set_xticks([1, 5, 10, 15, 20])
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    _saved(figure, path)
