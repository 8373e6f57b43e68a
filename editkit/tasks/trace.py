"""task=trace: where one fact is recalled; or, over the cases of a data set, where facts are and which blocks to edit.

Over a data set each fact is in the run folder's journal as soon as it is traced, and `resume=true` with the same run
folder goes on where a former run stopped.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from editkit import plots, report
from editkit.data import load_cases
from editkit.data.cases import case_of
from editkit.errors import EditkitError
from editkit.metrics.metric import AFTER, DIFFERENCE, PROBABILITY, Average, Metric, Protocol, Score, register
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal, Snapshot
from editkit.runs import names
from editkit.runs import record as results
from editkit.runs.journal import Journal
from editkit.settings import Config
from editkit.tasks import console
from editkit.tasks.common import Clock, data_of, described, load_model, measured, plain
from editkit.tracing import AverageTrace, Proposal, propose_layers, trace
from editkit.tracing.average import TracedFact, average_of, trace_each, with_sigma

_PROTOCOL = Protocol("trace", "Causal tracing: P(answer), the subject's embeddings corrupted and places put back")


def _metric(short: str, meaning: str, unit: str = PROBABILITY) -> Metric:
    bounds = (-1.0, 1.0) if unit == DIFFERENCE else (0.0, 1.0)
    return register(Metric(_PROTOCOL, short, meaning, better=0, unit=unit, range=bounds, averaged="mean over facts",
                           both=False))  # fmt: skip


CLEAN = _metric("clean", "probability of the model's own answer")
CORRUPTED = _metric("corrupted", "the same with the subject's embeddings corrupted")
TOTAL_EFFECT = _metric("total_effect", "what the corruption takes: clean − corrupted", DIFFERENCE)
MOST = _metric("most", "greatest indirect effect of one place put back", DIFFERENCE)


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task and write the arrays, pictures and record into `folder` (made and writable).

    Raises EditkitError for anything the user can mend. The model's weights are not touched, and that is verified.
    """
    clock = Clock()
    lm, digest, told = _average(config, folder, clock, say) if config.task.average else _one(config, folder, clock, say)
    reversal: Reversal = told.pop("whole").verify().require()
    clock.lap("verify")
    say(console.reversal(reversal))
    record = results.Record(
        task="trace",
        config=plain(config),
        model=described(lm, digest),
        edit={},
        reversal=asdict(reversal) | {"exact": reversal.exact},
        timings=clock.all(),
        environment=results.environment(lm),
        **told,
    )
    results.write_record(folder, record)
    report.write(folder)
    say(console.written(folder, record.timings["total"]))
    return record


Told = tuple[LanguageModel, str, dict[str, Any]]


def _one(config: Config, folder: Path, clock: Clock, say: Callable[[str], None]) -> Told:
    fact = case_of(config.edit).fact
    lm = load_model(config)
    whole = Snapshot.take(lm.model, [], everything=True)
    say(console.trace_heading(lm, fact.text))
    clock.lap("load")
    found = trace(lm, fact, config.task.trace, seed=config.seed)
    clock.lap("trace")
    say(console.traced(found))
    found.save(folder / names.TRACE)
    _drawn(say, lambda: plots.trace_map(found, path=folder / names.TRACE))
    most = {kind: found.indirect_effect(kind).max().item() for kind in found.probability}
    scores = _scores(1, found.clean, found.corrupted, found.total_effect)
    scores += [Score(replace(MOST, part=kind), AFTER, Average(value, 1)) for kind, value in most.items()]
    return lm, lm.digest, {"whole": whole, "trace": {"kind": "one", **found.how}, **measured(scores)}


def _average(config: Config, folder: Path, clock: Clock, say: Callable[[str], None]) -> Told:
    cases = load_cases(config.data, seed=config.seed)
    lm = load_model(config)
    digest = lm.digest
    whole = Snapshot.take(lm.model, [], everything=True)
    facts = [case.fact for case in cases.cases]
    say(console.trace_heading(lm, f"{len(facts)} of {cases.found} facts in {cases.source}"))
    clock.lap("load")
    settings = with_sigma(lm, facts, config.task.trace)
    header = {
        "format": names.FORMAT,
        "trace": asdict(settings),
        "seed": config.seed,
        "model": digest,
        "data": cases.digest,
    }
    header["indices"] = list(cases.indices)
    with Journal(folder / names.FACT_LINES, header, resume=config.resume) as journal:
        found = {line["number"]: TracedFact.from_json(line) for line in journal.lines}
        for number, one in trace_each(lm, facts, settings, seed=config.seed, done=list(found)):
            journal.append({"number": number} | one.to_json())
            found[number] = one
    average = average_of(lm, [found[number] for number in sorted(found)], settings, seed=config.seed)
    clock.lap("trace")
    average.save(folder / names.AVERAGE)
    results.write_table(folder / names.AVERAGE_TABLE, average.to_frame().to_dict("records"))
    proposal, text = _proposal(average, config.task.layers)
    say(console.average(average, text))
    _drawn(say, lambda: plots.average_map(average, proposal=proposal, path=folder / "average_map"))
    _drawn(say, lambda: plots.average_lines(average, proposal=proposal, path=folder / "average_lines"))
    means = (average.clean.mean().item(), average.corrupted.mean().item(), average.total_effect)
    scores = _scores(len(average.texts), *means)
    proposed = None if proposal is None else asdict(proposal) | {"text": text}
    told: dict[str, Any] = {"kind": "average", "proposal": proposed, **average.how}
    data = data_of(cases, [f"{text}: {why}" for text, why in average.skipped])
    return lm, digest, {"whole": whole, "trace": told, "data": data, **measured(scores)}


def _scores(facts: int, clean: float, corrupted: float, total_effect: float) -> list[Score]:
    values = ((CLEAN, clean), (CORRUPTED, corrupted), (TOTAL_EFFECT, total_effect))
    return [Score(metric, AFTER, Average(value, facts)) for metric, value in values]


def _drawn(say: Callable[[str], None], draw: Callable[[], object]) -> None:
    """Draw a picture where matplotlib is there; the arrays and the report are complete without it."""
    if find_spec("matplotlib") is None:
        say('no picture: pip install "editkit[plots]"')
    else:
        draw()


def _proposal(average: AverageTrace, layers: int) -> tuple[Proposal | None, str]:
    """The proposal and its text, or none and why."""
    try:
        proposal = propose_layers(average, layers)
    except EditkitError as error:
        return None, str(error)
    return proposal, str(proposal)
