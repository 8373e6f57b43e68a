"""What a run prints, readable at 80 columns."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.data.kinds import NEIGHBORHOOD, OWN_ANSWERS, PARAPHRASE, PORTABILITY, REWRITE
from editkit.edits.edit import Edit
from editkit.edits.requantized import Requantized
from editkit.facts import Fact
from editkit.metrics.audit import Audit
from editkit.metrics.counterfact import ES, NS, PORTABLE, PS
from editkit.metrics.drift import KL, PERPLEXITY
from editkit.metrics.metric import AFTER, RETENTION, UNTOUCHED, Average, Metric, Score
from editkit.metrics.probes import OF_TEMPLATES
from editkit.metrics.verdict import Verdict
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal
from editkit.runs.read import Sides, sides_of
from editkit.settings import KEYS_PER_DIMENSION, Config

if TYPE_CHECKING:  # an edit needs no tracing
    from editkit.tracing import AverageTrace, Traced

WIDTH = 80
AUDITED = 10  # changed facts shown
# What each kind of prompt is called, and its score.
NAMES = {
    REWRITE: ("rewrite", ES),
    PARAPHRASE: ("paraphrases", PS),
    NEIGHBORHOOD: ("neighborhood", NS),
    PORTABILITY: ("what follows", PORTABLE),
    **{kind: ("by template", metric) for kind, metric in OF_TEMPLATES.items()},
}


def heading(lm: LanguageModel, config: Config, fact: Fact) -> str:
    """The fact and the model."""
    arrow = f"{fact.target_true or '?'} → {fact.target_new}"
    return "\n".join(
        [
            *_wrapped("fact    ", f"{fact.text} … {arrow}"),
            *_wrapped("model   ", _about(lm)),
            *_wrapped("method  ", f"{config.method_name}, seed {config.seed}"),
        ]
    )


def cases_heading(lm: LanguageModel, config: Config, cases: str, notes: Sequence[str], done: int) -> str:
    """What a benchmark or a lifelong run is about to do."""
    lines = [
        *_wrapped("cases   ", cases),
        *_wrapped("model   ", _about(lm)),
        *_wrapped("method  ", f"{config.method_name}, seed {config.seed}"),
    ]
    for note in notes:
        lines += _wrapped("note    ", note)
    if done:
        lines += _wrapped("resumed ", f"{done} results of a former run are kept")
    return "\n".join(lines)


def summary(scores: Sequence[Score]) -> str:
    """Each metric before and after the edits: mean over cases, 95 % interval, number of cases."""
    lines = ["", f"{'mean over cases':34}{'before':>9}{'after':>9}{'95 % interval':>18}{'n':>6}"]
    for metric, sides in sides_of(scores).items():
        if sides.shown is None:
            continue
        bounds = sides.shown.interval
        interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "–"
        cells = ["–" if each is None else f"{each.mean:.3f}" for each in (sides.before, sides.after)]
        name = _clip(f"{metric.protocol.name}.{metric.label}", 34)
        lines.append(f"{name:34}{cells[0]:>9}{cells[1]:>9}{interval:>18}{sides.shown.n or 0:>6}")
    return "\n".join(lines)


def point(edits: int, scores: Sequence[Score], relative_norm: float, *, collapsed: bool) -> str:
    """One line of a lifelong run."""
    found = {(s.metric, s.asked): s.average for s in scores if s.when == AFTER}

    def mean(metric: Metric, asked: str) -> str:
        average = found.get((metric, asked))
        return "–" if average is None else f"{average.mean:.2f}"

    def drift(metric: Metric, digits: int) -> str:
        average = found.get((metric, ""))
        return "–" if average is None else f"{average.mean:.{digits}g}"

    parts = [f"{metric.short} {mean(metric, RETENTION)}" for metric in (ES, PS, NS)]
    parts.append(f"untouched {mean(NS, UNTOUCHED)}")
    parts += [f"KL {drift(KL, 3)}", f"perplexity {drift(PERPLEXITY, 4)}", f"‖ΔW‖/‖W‖ {relative_norm:.2f}"]
    return "\n".join(_wrapped(f"{edits:6}  ", "  ".join(parts) + ("  collapsed" if collapsed else "")))


def alarm(line: str) -> str:
    """What an alarm says, indented as the line of a point."""
    return "\n".join(_wrapped("     !  ", line))


def probes(fact: Fact, rows: Sequence[Mapping[str, Any]], scores: Sequence[Score]) -> str:
    """Probabilities of the true and the new object after every prompt of the fact, before and after the edit."""
    true, new = fact.target_true.strip() or "(true)", fact.target_new.strip()
    lines = ["", f"{'probability of':44}{_clip(true, 17):>18}{_clip(new, 17):>18}"]
    lines.append(f"{'':44}{'before   after':>18}{'before   after':>18}")
    sides, kind = sides_of(scores), ""
    for row in rows:
        if row["kind"] not in NAMES:
            continue
        if row["kind"] != kind:
            kind = row["kind"]
            name, metric = NAMES[kind]
            found = sides.get(metric, Sides(metric))
            lines.append(f"{name}   {metric.short} {_two(found.before)} → {_two(found.after)}")
        prompt = row["prompt"]
        if kind in OWN_ANSWERS:
            prompt += f" {row['target_true']} → {row['target_new']}"
        lines.append(f"  {_clip(prompt, 41):42}{_pair(row, 'true'):>18}{_pair(row, 'new'):>18}")
    return "\n".join(lines)


def texts(fact: Fact, before: dict[str, Any], after: dict[str, Any]) -> str:
    """Most likely next tokens and the continuation, before and after."""
    lines = ["", f"next tokens after {_clip(repr(fact.text), 60)}"]
    for name, found in (("before", before), ("after", after)):
        top = "  ".join(f"{token.strip() or repr(token)} {p:.3f}" for token, p in found["top"])
        lines += _wrapped(f"  {name:8}", top)
    lines.append("continuation")
    for name, found in (("before", before), ("after", after)):
        lines += _wrapped(f"  {name:8}", "…" + " ".join(found["continuation"].split()))
    return "\n".join(lines)


def update(edit: Edit, relative_norm: float, lost: float, left: Requantized | None = None) -> str:
    """Size and rank of the update, and its health."""
    lines = ["", "update"]
    for delta in edit.deltas:
        lines += _wrapped("  ", f"{delta.parameter} {list(delta.shape)}: rank {delta.rank}, ‖ΔW‖ {delta.norm():.4g}")
    for each in edit.installed:
        lines += _wrapped("  ", str(each))
    size = f"‖ΔW‖/‖W‖ {relative_norm:.4f}" if edit.deltas else "no weight is changed"
    lines += _wrapped("  ", f"{size}; {len(edit.to_bytes()) / 1024:.0f} KiB as a file")
    if lost > 1e-4:  # float32 loses less
        lines += _wrapped("  ", f"rounding to {edit.base.dtype} changes ΔW by {lost:.1%} of its norm")
    if left is not None:
        text = f"quantised again, {left.kept:.0%} of ΔW is left along it, with an error of {left.error:.0%} of ‖ΔW‖"
        lines += _wrapped("  ", f"{text} ({left.codes_changed:.1%} of the codes differ)")
    for report in edit.provenance.get("reports", []):
        first, last = report["steps"][0]["loss"], report["steps"][-1]["loss"]
        parts = [f"{len(report['steps'])} steps, loss {first:.3f} → {last:.3f}"]
        if report.get("clamp_hit"):
            parts.append("clamp hit")
        if "k_dot_u" in report:
            parts.append(f"k·u {report['k_dot_u']:.3g}")
        if "cos_bare_mean" in report:
            parts.append(f"cos(bare key, mean key) {report['cos_bare_mean']:.3f}")
        lines += _wrapped("  ", ("value: " if "v0_norm" in report else "tuning: ") + ", ".join(parts))
    for report in edit.provenance.get("layers", []):
        text = f"block {report['layer']}: {report['written']:.0%} of the residual written, ‖R‖ {report['missing']:.3g}"
        if "null_space" in report:
            text += f", null space of {report['null_space']} directions"
        lines += _wrapped("  ", text)
    moments = edit.provenance.get("moments", {})
    if "keys" in moments:
        text = f"second moment: {moments['keys']} keys ({moments['keys_per_dimension']:.0f} a dimension)"
        if "condition" in moments:
            text += f", condition {moments['condition']:.2g}"
        if moments["keys_per_dimension"] < KEYS_PER_DIMENSION:
            text += f"; few: {KEYS_PER_DIMENSION} a dimension or more are advised (moments.tokens)"
        lines += _wrapped("  ", text)
    return "\n".join(lines)


def routing(found: dict[str, dict[str, Any]]) -> str:
    """Of a mixture of experts: how many tokens the edit sends to other experts, by kind of prompt and block."""
    lines = ["", "routing: tokens sent to other experts, by block"]
    for kind, change in found.items():
        shares = "  ".join(f"{i}: {share:.0%}" for i, share in zip(change["layers"], change["changed"], strict=True))
        lines += _wrapped(f"  {kind:14}", shares)
    return "\n".join(lines)


def verdict(found: Verdict) -> str:
    """Whether the edit landed; if not, why and what to try."""
    return "\n".join(["", *(line for text in found.lines() for line in textwrap.wrap(text, WIDTH))])


def judge(found: Mapping[str, Any]) -> str:
    """Who judged the free answers, how many, and what it cost."""
    judged = found["asked"] - found["unjudged"]
    parts = [f"{judged:,} of {found['asked']:,} answers judged by {found['name']}"]
    parts += [f"{found['kept']:,} of them asked before"] if found["kept"] else []
    parts += [f"{found['unclear']:,} unclear"] if found["unclear"] else []
    parts += [f"{found['tokens']:,} tokens"] if found["tokens"] else []
    return "\n".join(["", *_wrapped("judge   ", ", ".join([*parts, f"{found['seconds']:.1f} s"]))])


def trace_heading(lm: LanguageModel, what: str) -> str:
    """What is about to be traced."""
    return "\n".join([*_wrapped("trace   ", what), *_wrapped("model   ", _about(lm))])


def traced(found: "Traced") -> str:
    """One prompt: what the corruption takes, and where most of it comes back."""
    lines = [
        *_wrapped("answer  ", f"{found.answer.strip()!r}: P {found.clean:.4f}, {found.corrupted:.4f} corrupted"),
        "",
    ]
    lines.append(f"{'put back':24}{'at':14}{'most comes back at':24}{'P':>8}{'share':>8}")
    first, last = found.subject
    for kind, table in found.probability.items():
        label = _put_back(kind, found.window)
        for where, begin, end in (("the subject", first, last + 1), ("later tokens", last + 1, len(table))):
            if begin == end:
                continue
            row, block = divmod(int(table[begin:end].argmax()), table.shape[1])
            p = table[begin + row, block].item()
            share = (p - found.corrupted) / found.total_effect if found.total_effect else float("nan")
            place = f"{_clip(repr(found.tokens[begin + row].strip()), 14)}, block {block}"
            lines.append(f"{label:24}{where:14}{place:24}{p:8.4f}{share:8.0%}")
            label = ""
    return "\n".join(lines)


def average(found: "AverageTrace", proposal: str) -> str:
    """Many facts: for each kind of token the block at which most comes back; and the proposal."""
    from editkit.tracing import PARTS

    text = f"P {found.clean.mean():.4f}, {found.corrupted.mean():.4f} corrupted; {len(found.texts)} facts"
    lines = [*_wrapped("answers ", text + (f", {len(found.skipped)} left out" if found.skipped else "")), ""]
    lines.append(f"{'average indirect effect':24}{'at':24}{'block':>6}{'AIE':>7}{'95 % interval':>19}")
    for kind in found.effect:
        mean, (low, high) = found.mean(kind), found.interval(kind)
        for p, part in enumerate(PARTS):
            if mean[p].isnan().all():
                continue
            b = int(mean[p].argmax())
            label = _put_back(kind, found.window) if p == 0 else ""
            cells = f"{b:6}{mean[p, b]:7.3f}{f'{low[p, b]:.3f} to {high[p, b]:.3f}':>19}"
            lines.append(f"{label:24}{part:24}{cells}")
    return "\n".join([*lines, "", *_wrapped("", proposal)])


def _put_back(kind: str, window: int) -> str:
    blocks = f", {window} block{'s' * (window > 1)}" if kind in ("mlp", "attention") else ""
    return kind.replace("_", " ") + blocks


def audit(found: Audit) -> str:
    """The facts of the atlas that have another answer now, those nearest to the edit first."""
    others = len(found.facts) - sum(fact.edited for fact in found.facts)
    lines = ["", f"audit: {len(found.changed)} of {others} other facts of the atlas have another answer"]
    for fact in found.changed[:AUDITED]:
        told = f"{fact.relation} of {fact.subject}: {fact.before} → {fact.after}"
        lines += _wrapped("  ", f"{told} (cosine {fact.cosine:.2f}, pull {fact.pull:.2f})")
    if len(found.changed) > AUDITED:
        lines.append(f"  and {len(found.changed) - AUDITED} more in audit.parquet")
    return "\n".join(lines)


def reversal(found: Reversal) -> str:
    """What was compared after restoring."""
    return "\n".join(["", *_wrapped("", f"restored: {found}")])


def written(folder: Path, seconds: float) -> str:
    """The last line: where everything is, its report too, relative to the current folder where that is shorter."""
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    return f"\n{seconds:.1f} s; open report.html in\n{folder}"


def _about(lm: LanguageModel) -> str:
    millions = lm.model.num_parameters() / 1e6  # transformers counts what packed weights stand for
    dtype = str(lm.dtype).split(".")[-1]
    if (scheme := lm.quantization) is not None:
        dtype += f", {scheme}, edited {'beside the weights' if lm.edited == 'adapter' else 'in wide weights'}"
    return f"{lm.name} ({lm.architecture.family}, {millions:.1f} M parameters, {dtype}) on {lm.device}"


def _pair(row: Mapping[str, Any], which: str) -> str:
    """The probability of one target before and after, – where it is unknown."""
    before, after = row[f"probability_{which}_before"], row[f"probability_{which}_after"]
    return "–      –" if before is None or after is None else f"{before:6.4f}  {after:6.4f}"


def _two(average: Average | None) -> str:
    return "–" if average is None else f"{average.mean:.2f}"


def _clip(text: str, width: int) -> str:
    """The text, its beginning cut where it is too long: prompts differ at their ends."""
    return text if len(text) <= width else "…" + text[-(width - 1) :]


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)) or [label]
