"""task=edit: rewrite one fact, look at what happened, put every bit back.

It is a benchmark of one case: the same rows, columns, metrics and scores. Beside them it keeps the edit, the most
likely next tokens and a continuation.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editkit import report
from editkit.data.cases import Case, case_of
from editkit.edits.edit import Edit, relative_norm
from editkit.edits.requantized import requantized
from editkit.edits.routing import routing_change
from editkit.edits.spectra import spectra
from editkit.judging import Judging
from editkit.metrics.audit import audit
from editkit.metrics.measure import Look, look, rows_of, scores_of_rows
from editkit.metrics.metric import AFTER, BEFORE
from editkit.metrics.scoring import continuation, top_next
from editkit.metrics.summary import summary
from editkit.metrics.verdict import verdict
from editkit.models.columns import Below
from editkit.models.load import LanguageModel
from editkit.runs import names
from editkit.runs import record as results
from editkit.runs.protocol import RunProtocol
from editkit.runs.tables import Tables, judged
from editkit.settings import Config
from editkit.tasks import console
from editkit.tasks.ability import Ability
from editkit.tasks.common import Clock, below_of, bind_method, described, load_model, measured, plain, spectrum_beside


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task and write edit, cases and record into `folder` (made and writable).

    Raises EditkitError for anything the user can mend; the model is then as it was.
    """
    clock = Clock()
    case = case_of(config.edit)
    judging = Judging(config.task.judge, config.device, say)
    lm = load_model(config)
    clock.lap("load")
    case.fact.check_targets(lm)
    say(console.heading(lm, config, case.fact))

    ability = Ability(lm, config, folder, say)
    ability.take(BEFORE)
    below = below_of(lm, config)
    before = _Asked.of(lm, case, config, below)
    clock.lap("measure_before")
    edit = bind_method(lm, config, progress=True)(case.facts)
    clock.lap("edit")
    relative, sizes = relative_norm(lm, edit), spectra(edit, lm)
    lost = {spectrum.parameter: spectrum.rounding_error for spectrum in sizes}
    largest = max((x for x in lost.values() if x is not None), default=0.0)
    routing, left = _routing(lm, edit, case), requantized(lm, edit)
    audited = audit(lm, edit) if config.task.audit else None
    clock.lap("audit")
    with edit.applied(lm) as applied:
        after = _Asked.of(lm, case, config, below)
        ability.take(AFTER)
        clock.lap("measure_after")
    assert applied.reversal is not None
    clock.lap("restore")

    rows = rows_of(case, before.look, after.look)
    verdicts = judging.rows(case.id or "0", rows)
    of_case = scores_of_rows(rows) + ([audited.score] if audited else [])
    scores = summary([of_case])
    say(console.probes(case.fact, rows, scores))
    say(console.texts(case.fact, before.texts, after.texts))
    say(console.update(edit, relative, largest, left))
    if routing:
        say(console.routing(routing))
    landed = verdict(rows, edit.provenance)
    say(console.verdict(landed))
    if audited is not None:
        say(console.audit(audited))
        results.write_table(folder / names.AUDIT, audited.rows())
    ability.show()
    say(console.reversal(applied.reversal))

    edit.save(folder / names.EDIT)
    whose = {"index": 0, "case": case.id or "0", "group": 0, "subject": case.fact.subject, "relation": case.relation}
    line = whose | {"edit": {}, "rows": rows, "scores": [score.to_json() for score in of_case], "judged": verdicts}
    Tables([line]).write_cases(folder)
    judge = judging.record(judged([line]))
    if judge:
        say(console.judge(judge))
    record = results.Record(
        task="edit",
        config=plain(config),
        model=described(lm, edit.base.digest),
        edit={
            "digest": edit.digest,
            "parameters": edit.parameters,
            "rank": edit.rank,
            "norm": edit.norm(),
            "relative_norm": relative,
            **({"installed": list(map(str, edit.installed))} if edit.installed else {}),
            "lost_in_rounding": lost,
            "spectra": [spectrum_beside(lm, spectrum) for spectrum in sizes],
            "provenance": edit.provenance,
            **({"routing": routing} if routing else {}),
            **({} if left is None else left.columns()),
        },
        reversal=asdict(applied.reversal) | {"exact": applied.reversal.exact},
        timings=clock.all(),
        verdict=asdict(landed),
        judge=judge,
        texts={"before": before.texts, "after": after.texts},
        environment=results.environment(lm),
        protocol=RunProtocol.of(config).to_json(),
        ability=ability.to_json(),
        **measured([*scores, *ability.scores]),
    )
    results.write_record(folder, record)
    report.write(folder)
    say(console.written(folder, record.timings["total"]))
    return record


def _routing(lm: LanguageModel, edit: Edit, case: Case) -> dict[str, dict[str, Any]]:
    """How a mixture of experts routes the case's prompts otherwise with the edit, by kind of prompt; empty for a model
    without experts, and for an edit that puts other tokens in front of the prompts."""
    compared = lm.architecture.experts is not None and not any(each.moves_tokens for each in edit.installed)
    kinds = dict.fromkeys(probe.kind for probe in case.probes) if compared else ()
    prompts = {kind: [probe.prompt for probe in case.probes if probe.kind == kind] for kind in kinds}
    return {kind: routing_change(lm, edit, asked).to_json() for kind, asked in prompts.items()}


@dataclass(frozen=True)
class _Asked:
    """What the model, as it was then, answers: to the case's prompts, and by itself after the rewrite prompt."""

    look: Look
    texts: dict[str, Any]  # top: the most likely next tokens with their probabilities; continuation: greedy

    @classmethod
    def of(cls, lm: LanguageModel, case: Case, config: Config, below: Below | None) -> "_Asked":
        prompt = case.fact.text
        texts = {
            "top": top_next(lm, prompt, config.task.top),
            "continuation": continuation(lm, prompt, config.task.continuation),
        }
        return cls(look(lm, case, config.task.measure, config.seed, below), texts)
