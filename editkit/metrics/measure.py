"""One case before and after its edit: what is asked of the model, the rows kept of it, and every protocol's values.

`look` asks, `rows_of` keeps: plain data, one dict a prompt, the columns of cases.parquet. `scores_of_rows` computes
every registered metric from the rows alone, so any figure can be computed again, and disputed, from a run's folder.

    kind                  columns
    a probe's             target_true, target_new, aliases; for _before and _after: nll, probability, greedy, right
                          argmax (of _true and _new), said (the free greedy continuation), exact, answer (the free
                          answer to its natural stop), stop, natural, judged (only with a judge); kept; of an answer
                          that is a text long_answer, the free continuation as long as it, before and after
    distracted            as a neighborhood probe, with the new fact put in front of its prompt (CounterFact+)
    generation            text_before, text_after: the prompt with a sampled continuation
    reference             prompt: a text about something that is as the new fact says
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from editkit.data.cases import Case, Probe
from editkit.data.kinds import DISTRACTED, GENERATION, NEIGHBORHOOD, REFERENCE, TRUE_WANTED
from editkit.data.templates import templated
from editkit.metrics import generation, natural
from editkit.metrics.metric import AFTER, WHEN, Score, registered
from editkit.metrics.natural import Answer
from editkit.metrics.scoring import ProbeScore, TargetScore, score_probes
from editkit.models.columns import Below
from editkit.models.evalmode import in_eval_mode
from editkit.models.generate import end_tokens, generate_batch, generate_tokens, room_behind, text_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import in_form, spaced, token_counts
from editkit.settings import MeasureSettings

TOP_K = 5  # of sampled texts, as in ROME's code
Row = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What the model, as it was then, said on one case."""

    scores: tuple[ProbeScore, ...]  # of each of `probes_asked`
    said: tuple[str, ...]  # the free continuation of each, or none
    answers: tuple[Answer, ...]  # the free answer of each to its natural stop, or none
    texts: tuple[str, ...]  # a sampled text for each generation prompt, or none
    long: tuple[str | None, ...] = ()  # of each: what was said, as long as the answer, where that is a text; or none


@in_eval_mode
def look(lm: LanguageModel, case: Case, settings: MeasureSettings, seed: int = 0, below: Below | None = None) -> Look:
    """Ask `lm`, as it is now, everything about `case`.

    - `settings`: what is asked. `seed`: of the sampled texts.
    - `below`: of `lm`; a second look at the case runs its probes from that block on only.

    Raises FactError for a prompt that the model cannot take.
    """
    probes = probes_asked(case, settings)
    said, answers, long = _said(lm, probes, settings)
    texts = []
    if settings.fluency and case.generation:
        left = [max(0, settings.fluency - n) for n in token_counts(lm, case.generation)]
        more = generate_batch(lm, case.generation, left, top_k=TOP_K, seed=seed, past_end=True)
        texts = [prompt + text for prompt, text in zip(case.generation, more, strict=True)]
    return Look(tuple(score_probes(lm, probes, below)), tuple(said), tuple(answers), tuple(texts), tuple(long))


def probes_asked(case: Case, settings: MeasureSettings) -> list[Probe]:
    """The case's probes, the distracted ones, and those by template."""
    probes = list(case.probes)
    if settings.distracted:
        fact = case.fact
        told = f"{fact.text} {fact.target_new.strip()}. "
        near = [probe for probe in case.probes if probe.kind == NEIGHBORHOOD]
        probes += [replace(probe, kind=DISTRACTED, prompt=told + probe.prompt) for probe in near]
    return probes + templated(case, settings.probes)


def _said(
    lm: LanguageModel, probes: Sequence[Probe], settings: MeasureSettings
) -> tuple[list[str], list[Answer], list[str | None]]:
    """The free continuation of each probe's prompt, the free answer, from one run where both ask the same, and the
    continuation as long as the probe's own answer, where that is a text."""
    if not settings.generate:
        return [], [], []
    prompts = [probe.prompt for probe in probes]
    # As long as the longest answer, so that none is cut short.
    texts = [text for probe in probes for text in (probe.wanted, *probe.aliases) if text]
    least = max(token_counts(lm, [spaced(text) for text in texts]), default=0) + settings.generate
    asked = [in_form(lm, prompt, settings.form) for prompt in prompts]
    room = room_behind(lm, asked)
    most = settings.natural if room is None else max(0, min(settings.natural, room))
    own = [
        count + settings.generate if probe.long else 0
        for count, probe in zip(token_counts(lm, [spaced(probe.wanted) for probe in probes]), probes, strict=True)
    ]
    if asked == prompts:
        longest = max(least, most)
        rows = free = generate_tokens(lm, prompts, longest, stops=natural.STOPS if most else (), least=least)
    else:
        longest = max(own, default=0)
        rows = generate_tokens(lm, prompts, least)
        free = generate_tokens(lm, asked, max(longest, most), stops=natural.STOPS, least=longest)
    said = [text_of(lm, row[:least]) for row in rows]
    ends = end_tokens(lm)
    answers = [
        natural.answer_of(text_of(lm, row[:most]), ended=not ends.isdisjoint(row[:most]))
        for row in free
        if settings.natural
    ]
    long = [text_of(lm, row[:count]) if count else None for row, count in zip(free, own, strict=True) if any(own)]
    return said, answers, long


def rows_of(case: Case, before: Look, after: Look) -> list[Row]:
    """The rows of one case, from a look at the unedited and one at the edited model."""
    rows = []
    for number, (b, a) in enumerate(zip(before.scores, after.scores, strict=True)):
        row = asdict(b.probe) | {"aliases": list(b.probe.aliases)}
        for when, score, asked in (("before", b, before), ("after", a, after)):
            for which, target in (("true", score.true), ("new", score.new)):
                for key in ("nll", "probability", "greedy", "right"):
                    row[f"{key}_{which}_{when}"] = None if target is None else getattr(target, key)
                row[f"argmax_{which}_{when}"] = None if target is None else list(target.said)
            wanted = [text for text in (b.probe.wanted, *b.probe.aliases) if text.strip()]
            said = asked.said[number] if asked.said else None
            answer, stop = asked.answers[number] if asked.answers else (None, None)
            row[f"said_{when}"], row[f"answer_{when}"], row[f"stop_{when}"] = said, answer, stop
            row[f"exact_{when}"] = generation.exact(said, wanted) if said is not None and wanted else None
            row[f"natural_{when}"] = natural.matches(answer, wanted) if answer is not None and wanted else None
            if b.probe.long:
                row[f"long_answer_{when}"] = asked.long[number] if asked.long else None
        row["kept"] = _kept(_wanted(b), _wanted(a))
        rows.append(row)
    for prompt, was, now in zip(case.generation, before.texts, after.texts, strict=False):
        rows.append({"kind": GENERATION, "prompt": prompt, "text_before": was, "text_after": now})
    return rows + [{"kind": REFERENCE, "prompt": text} for text in case.references if after.texts]


def scores_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """One case's score of every registered metric, before and after the edit; None where a metric does not apply.

    A metric whose rows the data divides into groups has a score for each of them too (`Metric.part`).
    """
    found = []
    for entry in registered():
        if entry.formula is None:
            continue
        asked = [row for row in rows if row["kind"] in entry.parts_of and row["group"]]
        of_parts = {
            group: [row for row in asked if row["group"] == group] for group in dict.fromkeys(r["group"] for r in asked)
        }
        for part, own in {"": rows, **of_parts}.items():
            metric = replace(entry.metric, part=part)
            found += [Score(metric, when, entry.formula(own, when)) for when in (WHEN if metric.both else (AFTER,))]
    return found


def values_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`scores_of_rows` as {column of edits.parquet: value}, such as counterfact.ES_after: for a data frame."""
    return by_column(scores_of_rows(rows))


def by_column(scores: Sequence[Score]) -> dict[str, float | None]:
    """Scores as a row of a table; the mean of those that are averages."""
    return {s.metric.column(s.when): s.average.mean if s.average else s.value for s in scores}  # type: ignore[misc]


def _wanted(score: ProbeScore) -> TargetScore:
    """The score of the answer whose tokens are compared before and after."""
    return score.true if score.probe.kind in TRUE_WANTED and score.true is not None else score.new


def _kept(before: TargetScore, after: TargetScore) -> float:
    """Share of the argmax tokens at the target's positions that are as before (EasyEdit's locality)."""
    return sum(b == a for b, a in zip(before.said, after.said, strict=True)) / len(before.said)
