"""task=lifelong: cases edited one after the other on one model, measured on the way; everything put back at the end.

At each point are asked: those of a fixed sample of the facts that are edited so far ("retention"), those of them that
were edited since the last point ("recent"), cases that are never edited ("untouched"), whose true answers must
stay, and running text (KL to the unedited model, perplexity). Of a fact that was edited again (data.stream) the latest
case is asked. The session is saved as it goes on and the points are in a journal, so `resume=true` goes on where a
former run stopped, and ends with the same bytes: steps that were not saved are made again.

General ability (task.ability) is asked before the first edit and after the last, and not at the points: a preset takes
minutes to hours of a real model, and what breaks on the way the alarm and running text show at every point.

An alarm (editkit/alarm.py) looks at the model at each point and every so many steps; task.on_collapse says what comes
then. With rollback the session is saved only where a look has passed no limit.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editkit import report
from editkit.alarm import ROLLBACK, Alarm, CollapseError
from editkit.data import load_cases, load_texts, streamed
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE, UNSEEN, Case
from editkit.data.stream import CaseStream
from editkit.errors import ConfigError, EditkitError, OutputError, ReversalError
from editkit.judging import Judging
from editkit.metrics.measure import Look, look, rows_of, scores_of_rows
from editkit.metrics.metric import AFTER, BEFORE, RECENT, RETENTION, UNTOUCHED, Score
from editkit.metrics.running_text import Drift
from editkit.metrics.summary import summary
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal
from editkit.runs import names
from editkit.runs import record as results
from editkit.runs.journal import Journal
from editkit.runs.protocol import RunProtocol
from editkit.runs.tables import judged, write_judged
from editkit.session import Session
from editkit.sessionfiles import FILE
from editkit.settings import Config, LifelongSettings
from editkit.tasks import console
from editkit.tasks.ability import Ability
from editkit.tasks.common import (
    Clock,
    below_of,
    data_of,
    described,
    journal_header,
    load_model,
    look_before,
    measured,
    plain,
)
from editkit.tasks.costs import Costs

Point = dict[str, Any]


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task in `folder`. Raises EditkitError; the model is as it was, and what was measured is kept.

    A step that cannot be computed is named in the record, counted, and left out.
    """
    clock, task = Clock(), config.task
    if config.data.shard != "0/1":
        raise ConfigError(f"task=lifelong edits all cases on one model; data.shard is {config.data.shard}. Leave it.")
    cases = load_cases(replace(config.data, limit=None, stream=None), seed=config.seed, distinct=True)
    count = config.data.limit or max(len(cases.cases) - task.untouched, 1)
    edited = streamed(config.data, cases.cases[:count], seed=config.seed)
    untouched = cases.cases[count : count + task.untouched]
    texts = load_texts(task.text)
    judging = Judging(task.judge, config.device, say)
    lm = load_model(config)
    digest = lm.digest
    with Journal(folder / names.POINT_LINES, journal_header(config, digest, cases), resume=config.resume) as journal:
        about = f"{len(edited.cases)} of {cases.found} in {cases.source} to edit, {len(untouched)} never edited"
        if config.data.stream is not None:
            about += f"; {len(edited):,} edits"
        notes = (*cases.notes, *([texts.note] if texts else ()))
        say(console.cases_heading(lm, config, about, notes, len(journal.lines)))
        ability = Ability(lm, config, folder, say)
        ability.take(BEFORE)
        life = _Life(lm, digest, config, edited, untouched, folder, journal, judging, say)
        clock.lap("ask_the_unedited_model")
        reversal = life.live(ability)
        clock.lap("edit_and_measure")
        points, failed, collapse = life.points, life.failed, life.collapse
    write_judged(folder, points)
    judge = judging.record(judged(points))
    if judge:
        say(console.judge(judge))
    ability.show()
    say(console.reversal(reversal))
    record = results.Record(
        task=task.name,
        config=plain(config),
        model=described(lm, digest),
        edit={"count": points[-1]["edits"], "rank": life.rank, "relative_norm": points[-1]["relative_norm"]},
        series=[{name: value for name, value in point.items() if name != "judged"} for point in points],
        judge=judge,
        reversal=asdict(reversal) | {"exact": reversal.exact},
        timings=clock.all(),
        environment=results.environment(lm),
        protocol=RunProtocol.of(config, len(edited)).to_json(),
        data=data_of(cases, failed)
        | ({"collapse": collapse} if collapse else {})
        | ({"text": texts.note} if texts else {}),
        ability=ability.to_json(),
        **measured([*(Score.of(found) for found in points[-1]["scores"]), *ability.scores]),
    )
    results.write_record(folder, record)
    report.write(folder)
    say(console.written(folder, record.timings["total"]))
    return record


def sampled(edited: int, retention: int) -> list[int]:
    """Numbers of the cases that are asked at every point once they are edited: `retention` of them, evenly spread."""
    return sorted({round(i * edited / retention) for i in range(retention)} & set(range(edited)))


def staying(case: Case) -> Case:
    """The case as one that is never edited: what it asks of its own fact must keep the true answer."""
    asked = [probe for probe in case.probes if probe.kind in (REWRITE, PARAPHRASE, UNSEEN) and probe.target_true]
    return replace(case, probes=tuple(replace(probe, kind=NEIGHBORHOOD) for probe in asked), generation=())


class _Life:
    """The session and everything that is asked of it."""

    def __init__(
        self,
        lm: LanguageModel,
        digest: str,
        config: Config,
        edited: CaseStream,
        untouched: Sequence[Case],
        folder: Path,
        journal: Journal,
        judging: Judging,
        say: Callable[[str], None],
    ) -> None:
        self.lm, self.config, self.edited, self.journal, self.say = lm, config, edited, journal, say
        self.judging = judging
        self.task: LifelongSettings = config.task
        self.path, self.costs = folder / names.SESSION, Costs(folder / names.COSTS)
        size = self.task.step
        self.steps = [range(first, min(first + size, len(edited))) for first in range(0, len(edited), size)]
        self.points_due = self.task.points(len(edited))
        self.failed_steps = {line["cases"][0] // size for line in journal.lines if "failed" in line}
        self.tried = self.good = 0  # steps; and those at the last look that passed no limit
        self.untouched = [case for case in map(staying, untouched) if case.probes]
        self.asked = sampled(len(edited.cases), self.task.retention)
        self.alarm = Alarm(
            lm,
            self.task.alarm,
            untouched=[case.fact for case in untouched],
            on_collapse=self.task.on_collapse,
            text=self.task.text,
            say=lambda line: say(console.alarm(line)),
        )
        # What the unedited model says. Of a stream's cases most are never asked: see _before.
        once = [] if config.data.stream is not None else [edited.cases[fact] for fact in self.asked]
        bar = tqdm([*once, *self.untouched], desc="asking the unedited model", unit="case", delay=1, leave=False)
        self.below = below_of(lm, config)
        self.before: dict[str, Look] = {case.id: look_before(lm, digest, case, config, self.below) for case in bar}
        self.drift = Drift.take(lm, source=self.task.text)
        self.rank = 0

    @property
    def collapse(self) -> dict[str, Any] | None:
        """The journal's line about the end of the run at a limit."""
        return next((line for line in self.journal.lines if "collapse" in line), None)

    @property
    def points(self) -> list[Point]:
        """Without those after steps that were taken back."""
        last = self.collapse["edits_kept"] if self.collapse else len(self.edited)
        return [line for line in self.journal.lines if line.get("edits", last + 1) <= last]

    @property
    def failed(self) -> list[str]:
        return [f"{line['case']}: {line['failed']}" for line in self.journal.lines if "failed" in line]

    def live(self, ability: Ability) -> Reversal:
        """Edit and measure to the end, and ask for general ability there. What was proved to be back afterwards."""
        with self._session() as session, self.costs:
            try:
                self._edit(session)
            except CollapseError as error:
                self._end(session, error)
            session.save(self.path)
            self.rank = session.total().rank
            ability.take(AFTER)
            return session.reset().require()

    def _session(self) -> Session:
        options: dict[str, Any] = {"moments": self.config.moments, "alarm": self.alarm, "progress": False}
        if (self.path / FILE).exists():
            return Session.load(self.path, self.lm, **options)
        config = self.config
        return Session(self.lm, config.method_name, config.method, seed=config.seed, keep=self.task.keep, **options)

    def _edit(self, session: Session) -> None:
        """Make the steps that are left, and measure on the way. Raises CollapseError at a limit."""
        # 1) Where a former run stopped: so many steps are in force or have failed.
        self.tried = self.good = self._done(session)
        self._measure_if_due(session)
        # 2) The others.
        end = self.collapse["steps_kept"] if self.collapse else len(self.steps)
        with tqdm(desc="lifelong", total=len(self.steps), initial=self.tried, unit="step", delay=1) as bar:
            for number in range(self.tried, end):
                self.tried = number + 1
                with self.costs.of(number):
                    self._step(session, number)
                    self._save(session)
                self._measure_if_due(session)
                bar.update()

    def _done(self, session: Session) -> int:
        made = number = 0
        while made < session.count:
            made += number not in self.failed_steps
            number += 1
        return number

    def _step(self, session: Session, number: int) -> None:
        """One edit; a step that cannot be computed is noted and left out."""
        if number in self.failed_steps:
            return
        cases = [self.edited[place] for place in self.steps[number]]
        try:
            session.edit([fact for case in cases for fact in case.facts])
        except (ConfigError, OutputError, ReversalError, CollapseError):  # a setting would fail at every step
            raise
        except EditkitError as error:
            named = ", ".join(case.id for case in cases)
            self.failed_steps.add(number)
            self.journal.append({"case": named, "cases": list(self.steps[number]), "failed": str(error)})

    def _save(self, session: Session) -> None:
        """Save the session where it is due. One that may be rolled back is saved in good states alone."""
        if good := session.good == session.count:
            self.good = self.tried
        if good if self.task.on_collapse == ROLLBACK else self.tried % self.task.save == 0:
            session.save(self.path)

    def _measure_if_due(self, session: Session) -> None:
        edits = self.steps[self.tried - 1][-1] + 1 if self.tried else 0
        if edits in self.points_due:
            self._measure(session, edits)
            self._save(session)

    def _end(self, session: Session, error: CollapseError) -> None:
        """Note why the run ends, and measure what is in force."""
        kept = self.good if self.task.on_collapse == ROLLBACK else self.tried
        back = [number for number in range(kept, self.tried) if number not in self.failed_steps]
        dropped = [self.edited[place].id for number in back for place in self.steps[number]]
        edits = self.steps[kept - 1][-1] + 1 if kept else 0
        if self.collapse is None:
            how = {"steps_kept": kept, "edits_kept": edits, "dropped": dropped}
            self.journal.append({"collapse": str(error)} | how)
        self.say(console.alarm(error.outcome))
        self._measure(session, edits)

    def _measure(self, session: Session, edits: int) -> None:
        """Ask everything after `edits` cases, unless the journal has it. The alarm looks too."""
        seen = session.look()
        assert seen is not None  # the session has an alarm
        points = self.points
        if any(point["edits"] == edits for point in points):
            return
        since = points[-1]["edits"] if points else 0
        # 1) Which cases: the latest of each fact, and those that are never edited.
        left_out = {number for line in self.journal.lines if "failed" in line for number in line["cases"]}
        latest = [self.edited.latest(fact, edits) for fact in self.asked]
        numbers = [number for number in latest if number is not None and number not in left_out]
        cases = [*(self.edited[number] for number in numbers), *self.untouched]
        # 2) What they say, before and after.
        of_cases: dict[str, list[list[Score]]] = {RETENTION: [], RECENT: [], UNTOUCHED: []}
        verdicts: list[dict[str, Any]] = []
        for place, (case, before) in enumerate(zip(cases, self._before(session, cases), strict=True)):
            below = self.below if case.id in self.before else None
            rows = rows_of(case, before, look(self.lm, case, self.task.measure, self.config.seed, below))
            verdicts += self.judging.rows(case.id, rows)
            of_case = scores_of_rows(rows)
            of_cases[RETENTION if place < len(numbers) else UNTOUCHED].append(of_case)
            if place < len(numbers) and numbers[place] >= since:
                of_cases[RECENT].append(of_case)
        scores = [score for asked, each in of_cases.items() for score in summary(each, asked=asked)]
        # 3) Running text, and the point.
        scores += self.drift.measure(self.lm)
        point: Point = {
            "edits": edits,
            "scores": [score.to_json() for score in scores],
            "relative_norm": session.relative_norm(),
            "alarm": seen.to_json(),
            "collapsed": bool(seen.passed),
            **({"judged": verdicts} if verdicts else {}),
        }
        self.journal.append(point)
        self.say(console.point(edits, scores, point["relative_norm"], collapsed=point["collapsed"]))

    def _before(self, session: Session, cases: Sequence[Case]) -> list[Look]:
        """What the unedited model says on the cases. Of a stream it is asked now and not kept, so that memory does not
        grow with the cases that have been asked."""
        with session.unedited() if self.config.data.stream is not None else contextlib.nullcontext():
            return [
                self.before.get(case.id) or look(self.lm, case, self.task.measure, self.config.seed) for case in cases
            ]
