"""task=lifelong: cases edited one after the other on one model, measured on the way; everything put back at the end.

At each point are asked: those of a fixed sample of the cases that are edited so far ("retention"), those of them that
were edited since the last point ("recent"), cases that are never edited ("untouched"), whose true answers must
stay, and running text (KL to the unedited model, perplexity). The session is saved after every step and the points are
in a journal, so `resume=true` goes on where a former run stopped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editkit import report
from editkit.data import load_cases
from editkit.data.cases import NEIGHBORHOOD, PARAPHRASE, REWRITE, UNSEEN, Case
from editkit.errors import ConfigError, EditkitError, OutputError, ReversalError
from editkit.metrics.measure import Look, look, rows_of, scores_of_rows
from editkit.metrics.metric import RECENT, RETENTION, UNTOUCHED, Score
from editkit.metrics.running_text import Drift
from editkit.metrics.summary import summary
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Reversal
from editkit.runs import names
from editkit.runs import record as results
from editkit.runs.journal import Journal
from editkit.session import FILE, Session
from editkit.settings import Config, LifelongSettings
from editkit.tasks import console
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

Point = dict[str, Any]


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task in `folder`. Raises EditkitError; the model is as it was, and what was measured is kept.

    A step that cannot be computed is named in the record, counted, and left out.
    """
    clock, task = Clock(), config.task
    if config.data.shard != "0/1":
        raise ConfigError(f"task=lifelong edits all cases on one model; data.shard is {config.data.shard}. Leave it.")
    cases = load_cases(replace(config.data, limit=None), seed=config.seed, distinct=True)
    count = config.data.limit or max(len(cases.cases) - task.untouched, 1)
    edited, untouched = cases.cases[:count], cases.cases[count : count + task.untouched]
    lm = load_model(config)
    digest = lm.digest
    with Journal(folder / names.POINT_LINES, journal_header(config, digest, cases), resume=config.resume) as journal:
        about = f"{len(edited)} of {cases.found} in {cases.source} to edit, {len(untouched)} never edited"
        say(console.cases_heading(lm, config, about, cases.notes, len(journal.lines)))
        life = _Life(lm, digest, config, edited, untouched, folder, journal)
        clock.lap("ask_the_unedited_model")
        reversal = life.live(say)
        clock.lap("edit_and_measure")
        points, failed = life.points, life.failed
    say(console.reversal(reversal))
    record = results.Record(
        task=task.name,
        config=plain(config),
        model=described(lm, digest),
        edit={"count": points[-1]["edits"], "rank": life.rank, "relative_norm": points[-1]["relative_norm"]},
        series=points,
        reversal=asdict(reversal) | {"exact": reversal.exact},
        timings=clock.all(),
        environment=results.environment(lm),
        data=data_of(cases, failed),
        **measured([Score.of(found) for found in points[-1]["scores"]]),
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
        edited: Sequence[Case],
        untouched: Sequence[Case],
        folder: Path,
        journal: Journal,
    ) -> None:
        self.lm, self.config, self.edited, self.journal = lm, config, edited, journal
        self.task: LifelongSettings = config.task
        self.path = folder / names.SESSION
        self.untouched = [case for case in map(staying, untouched) if case.probes]
        self.asked = sampled(len(edited), self.task.retention)
        asking = [edited[number] for number in self.asked] + self.untouched
        bar = tqdm(asking, desc="asking the unedited model", unit="case", delay=1, leave=False)
        self.below = below_of(lm, config)
        self.before: list[Look] = [look_before(lm, digest, case, config, self.below) for case in bar]
        self.drift = Drift.take(lm, source=self.task.text)
        self.rank = 0

    @property
    def points(self) -> list[Point]:
        return [line for line in self.journal.lines if "edits" in line]

    @property
    def failed(self) -> list[str]:
        return [f"{line['case']}: {line['failed']}" for line in self.journal.lines if "failed" in line]

    def live(self, say: Callable[[str], None]) -> Reversal:
        """Edit and measure to the end. What was proved to be back afterwards."""
        session, size = self._session(), self.task.step
        steps = [range(first, min(first + size, len(self.edited))) for first in range(0, len(self.edited), size)]
        with session:
            begun = len(session.steps) + len(self.failed)
            self._measure(session, 0, say)
            with tqdm(desc="lifelong", total=len(steps), initial=begun, unit="step", delay=1) as bar:
                for number, step in enumerate(steps):
                    if number >= begun:
                        self._step(session, step)
                        bar.update()
                    last = number + 1 == len(steps)
                    if last or (step[-1] + 1) % self.task.every == 0:
                        self._measure(session, step[-1] + 1, say)
                        if self.task.stop_at_collapse and self.points[-1]["collapsed"]:
                            break
            self.rank = session.total().rank
            return session.reset().require()

    def _session(self) -> Session:
        if (self.path / FILE).exists():
            return Session.load(self.path, self.lm, moments=self.config.moments, progress=False)
        config = self.config
        return Session(
            self.lm, config.method_name, config.method, moments=config.moments, seed=config.seed, progress=False
        )

    def _step(self, session: Session, step: range) -> None:
        """One edit, saved; a step that cannot be computed is noted and left out."""
        try:
            session.edit([fact for number in step for fact in self.edited[number].facts])
        except (OutputError, ReversalError):
            raise
        except EditkitError as error:
            named = ", ".join(self.edited[number].id for number in step)
            self.journal.append({"case": named, "cases": list(step), "failed": str(error)})
        else:
            session.save(self.path)

    def _measure(self, session: Session, edits: int, say: Callable[[str], None]) -> None:
        """Ask everything after `edits` cases, unless the journal has it."""
        points = self.points
        if any(point["edits"] == edits for point in points):
            return
        since = points[-1]["edits"] if points else 0
        left_out = {number for line in self.journal.lines if "failed" in line for number in line["cases"]}
        of_cases: dict[str, list[list[Score]]] = {RETENTION: [], RECENT: [], UNTOUCHED: []}
        cases = [self.edited[number] for number in self.asked] + self.untouched
        for place, (case, before) in enumerate(zip(cases, self.before, strict=True)):
            number = self.asked[place] if place < len(self.asked) else None
            if number is not None and (number >= edits or number in left_out):
                continue
            after = look(self.lm, case, self.task.measure, self.config.seed, self.below)
            of_case = scores_of_rows(rows_of(case, before, after))
            of_cases[UNTOUCHED if number is None else RETENTION].append(of_case)
            if number is not None and number >= since:
                of_cases[RECENT].append(of_case)
        scores = [score for asked, each in of_cases.items() for score in summary(each, asked=asked)]
        kl, perplexity = self.drift.measure(self.lm)
        assert perplexity.average is not None
        ratio = perplexity.average.mean / self.drift.perplexity
        point: Point = {
            "edits": edits,
            "scores": [score.to_json() for score in [*scores, kl, perplexity]],
            "relative_norm": session.relative_norm(),
            "collapsed": not math.isfinite(ratio) or ratio > self.task.collapse,
        }
        self.journal.append(point)
        say(console.point(edits, [*scores, kl, perplexity], point["relative_norm"], collapsed=point["collapsed"]))
