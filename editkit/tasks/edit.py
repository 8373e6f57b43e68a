"""task=edit: rewrite one fact, look at what happened, put every bit back."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from editkit import report
from editkit.data.cases import Case, make_case
from editkit.edits.edit import weight_norm
from editkit.edits.spectra import spectra
from editkit.errors import FactError
from editkit.facts import Fact
from editkit.metrics.audit import audit
from editkit.metrics.counterfact import ProbeScore, score_probes, share
from editkit.metrics.generation import continuation, top_next
from editkit.models.load import LanguageModel
from editkit.runs import record as results
from editkit.settings import Config, EditSettings
from editkit.tasks import console
from editkit.tasks.common import Clock, bind_method, described, load_model, plain, spectrum_beside


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task and write edit, cases and record into `folder` (made and writable).

    Raises EditkitError for anything the user can mend; the model is then as it was.
    """
    clock = Clock()
    case = case_of(config.edit)
    lm = load_model(config)
    clock.lap("load")
    case.fact.check_targets(lm)
    say(console.heading(lm, config, case.fact))

    before = _look(lm, case, config)
    clock.lap("measure_before")
    edit = bind_method(lm, config, progress=True)(case.facts)
    clock.lap("edit")
    relative_norm = edit.norm() / weight_norm(lm, edit)
    found = spectra(edit, lm)
    lost = {spectrum.parameter: spectrum.rounding_error for spectrum in found}
    audited = audit(lm, edit) if config.task.audit else None
    clock.lap("audit")
    with edit.applied(lm) as applied:
        after = _look(lm, case, config)
        clock.lap("measure_after")
    assert applied.reversal is not None
    clock.lap("restore")

    metrics = _metrics(before["scores"], after["scores"])
    if audited is not None:
        metrics |= {"audit_changed": len(audited.changed), "audit_n": len(audited.facts)}
    say(console.probes(case.fact, before["scores"], after["scores"], metrics))
    say(console.texts(case.fact, before, after))
    say(console.update(edit, relative_norm, max(x for x in lost.values() if x is not None)))
    if audited is not None:
        say(console.audit(audited))
        results.write_table(folder / results.AUDIT, audited.rows())
    say(console.reversal(applied.reversal))

    edit.save(folder / results.EDIT)
    results.write_table(folder / results.CASES, _rows(before["scores"], after["scores"]))
    record = results.Record(
        task="edit",
        config=plain(config),
        model=described(lm, edit.base.digest),
        edit={
            "digest": edit.digest,
            "parameters": edit.parameters,
            "rank": edit.rank,
            "norm": edit.norm(),
            "relative_norm": relative_norm,
            "lost_in_rounding": lost,
            "spectra": [spectrum_beside(lm, spectrum) for spectrum in found],
            "provenance": edit.provenance,
        },
        metrics=metrics,
        reversal=asdict(applied.reversal) | {"exact": applied.reversal.exact},
        timings=clock.all(),
        texts={"before": _spoken(before), "after": _spoken(after)},
        environment=results.environment(lm),
    )
    results.write_record(folder, record)
    report.write(folder)
    say(console.written(folder, record.timings["total"]))
    return record


def case_of(settings: EditSettings) -> Case:
    """The fact and its probes. A prompt without `{}` may hold the subject itself. Raises FactError."""
    prompt = settings.prompt
    targets = (settings.target_new, settings.target_true)
    if "{}" not in prompt and settings.subject and settings.subject in prompt:
        fact = Fact.in_text(prompt, settings.subject, *targets)
    elif "{}" not in prompt:
        raise FactError(
            f"The subject {settings.subject!r} is not in the prompt {prompt!r}. Write the prompt with {{}} in the "
            "subject's place, as in '{} is located in the city of', or with the subject itself."
        )
    else:
        fact = Fact(prompt, settings.subject, *targets)
    hops = [Fact(p.prompt, fact.subject, p.target_new, p.target_true) for p in settings.portability]
    return make_case(fact, settings.paraphrases, settings.neighborhood, hops)


def _look(lm: LanguageModel, case: Case, config: Config) -> dict[str, Any]:
    """Scores of the probes, most likely next tokens, and a continuation, for the model as it is now."""
    return {
        "scores": score_probes(lm, case.probes),
        "top": top_next(lm, case.fact.text, config.task.top),
        "continuation": continuation(lm, case.fact.text, config.task.continuation),
    }


def _spoken(look: dict[str, Any]) -> dict[str, Any]:
    return {"top": look["top"], "continuation": look["continuation"]}


def _metrics(before: list[ProbeScore], after: list[ProbeScore]) -> dict[str, Any]:
    """ES, PS, NS and portability before and after, with the number of probes of each."""
    metrics: dict[str, Any] = {}
    for name, kind, wins in (
        ("ES", "rewrite", "new_wins"),
        ("PS", "paraphrase", "new_wins"),
        ("NS", "neighborhood", "true_wins"),
        ("portability", "portability", "new_wins"),
    ):
        for when, scores in (("before", before), ("after", after)):
            metrics[f"{name}_{when}"] = share(getattr(s, wins) for s in scores if s.probe.kind == kind)
        metrics[f"{name}_n"] = sum(s.probe.kind == kind for s in after)
    metrics["p_new_before"] = before[0].new.probability
    metrics["p_new_after"] = after[0].new.probability
    return metrics


def _rows(before: list[ProbeScore], after: list[ProbeScore]) -> list[dict[str, Any]]:
    rows = []
    for b, a in zip(before, after, strict=True):
        row: dict[str, Any] = asdict(b.probe)
        for when, score in (("before", b), ("after", a)):
            for which, target in (("true", score.true), ("new", score.new)):
                for key in ("nll", "probability", "greedy"):
                    row[f"{key}_{which}_{when}"] = None if target is None else getattr(target, key)
        rows.append(row)
    return rows
