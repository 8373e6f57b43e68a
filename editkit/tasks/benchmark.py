"""task=benchmark and task=batch: edit each case alone, or several in one edit; measure before and after; restore.

Each case is in the run folder's journal as soon as it is measured. `resume=true` with the same run folder goes on
where a former run stopped, and ends with the same tables.

With task.controls each null control (methods/shared/controls.py) is put in the place of each edit, and measured on the
same cases; each case has a line of its own for each control.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editkit import report
from editkit.data import load_cases
from editkit.data.cases import Case
from editkit.edits.edit import Edit, relative_norm
from editkit.edits.requantized import requantized
from editkit.edits.spectra import spectra
from editkit.errors import EditkitError, OutputError, ReversalError
from editkit.judging import Judging
from editkit.metrics.audit import answers, audit
from editkit.metrics.measure import Look, look, rows_of, scores_of_rows
from editkit.metrics.metric import AFTER, BEFORE, Score
from editkit.models.columns import Below
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot
from editkit.runs import names
from editkit.runs import record as results
from editkit.runs.journal import Journal
from editkit.runs.protocol import RunProtocol
from editkit.runs.tables import Tables, judged
from editkit.settings import BenchmarkSettings, Config
from editkit.tasks import console
from editkit.tasks.ability import Ability
from editkit.tasks.common import (
    Clock,
    below_of,
    bind_method,
    data_of,
    described,
    journal_header,
    load_model,
    look_before,
    measured,
    plain,
    spectrum_beside,
)
from editkit.tasks.controls import Controls, table


def run(config: Config, folder: Path, say: Callable[[str], None] = print) -> results.Record:
    """Run the task in `folder`. Raises EditkitError when nothing could be measured; the model is as it was.

    A case that cannot be edited or measured is named in the record, counted, and left out.
    """
    clock, task = Clock(), config.task
    cases = load_cases(config.data, seed=config.seed, distinct=task.size != 1)
    judging = Judging(task.judge, config.device, say)
    lm = load_model(config)
    digest = lm.digest
    with Journal(folder / names.CASE_LINES, journal_header(config, digest, cases), resume=config.resume) as journal:
        about = f"{len(cases.cases)} of {cases.found} in {cases.source}"
        say(console.cases_heading(lm, config, about, cases.notes, len(journal.lines)))
        clock.lap("load")
        whole = Snapshot.take(lm.model, [], everything=True)
        ability = Ability(lm, config, folder, say)
        ability.take(BEFORE)
        bench = _Bench(lm, digest, config, folder, journal, judging, ability)
        numbered = list(zip(cases.indices, cases.cases, strict=True))
        total = len(numbered) * len(bench.ways)
        with tqdm(desc=task.name, total=total, initial=len(bench.done), unit="case", delay=1) as bar:
            for number, members in enumerate(_groups(numbered, task.size)):
                bench.group(number, members, bar.update)
        clock.lap("edit_and_measure")
        reversal = whole.verify().require()
    tables = Tables(journal.lines)
    tables.write(folder)
    controls = tables.controls([control.to_json() for control in bench.controls.all.values()])
    say(console.summary(tables.summary))
    if controls:
        say(table(controls, tables))
    ability.show()
    for text in (*map(str, cases.rejected), *tables.failed):
        say(f"left out: {text}")
    if not tables.measured:
        raise EditkitError(f"None of the {len(cases.cases)} cases could be measured; the first: {tables.failed[0]}")
    judge = judging.record(judged(tables.asked))
    if judge:
        say(console.judge(judge))
    say(console.reversal(reversal))
    record = results.Record(
        task=task.name,
        config=plain(config),
        model=described(lm, digest),
        edit=tables.edit(),
        reversal=asdict(reversal) | {"exact": reversal.exact},
        timings=clock.all(),
        judge=judge,
        environment=results.environment(lm),
        protocol=RunProtocol.of(config, len(numbered)).to_json(),
        data=data_of(cases, tables.failed) | {"shard": config.data.shard},
        controls=controls,
        ability=ability.to_json(),
        **measured([*tables.summary, *tables.control_summary, *ability.scores]),
    )
    results.write_record(folder, record)
    report.write(folder)
    say(console.written(folder, record.timings["total"]))
    return record


Numbered = tuple[int, Case]  # the case, and its place in the data


def _groups(cases: Sequence[Numbered], size: int | None) -> Iterator[list[Numbered]]:
    size = size or len(cases)
    for first in range(0, len(cases), size):
        yield list(cases[first : first + size])


class _Bench:
    """Groups of cases, each edited together and measured one by one, and what they share."""

    def __init__(
        self,
        lm: LanguageModel,
        digest: str,
        config: Config,
        folder: Path,
        journal: Journal,
        judging: Judging,
        ability: Ability,
    ) -> None:
        self.judging = judging
        self.lm, self.digest, self.config, self.folder, self.journal = lm, digest, config, folder, journal
        self.ability = ability
        self.task: BenchmarkSettings = config.task
        self.done = {(line["index"], line.get("control", "")) for line in journal.lines}
        self.failed = {line["index"] for line in journal.lines if "failed" in line and "control" not in line}
        self.answers: list[str] | None = None  # of the unedited model to every fact, where there is an audit
        self.compute = bind_method(lm, config)
        self.controls = Controls(lm, config)
        self.ways = ["", *self.controls.measured]  # the edit itself, then what is put in its place

    def group(self, number: int, members: Sequence[Numbered], advance: Callable[[int], object]) -> None:
        """Edit the cases together and measure those that are not in the journal; then under each control."""
        below = below_of(self.lm, self.config)
        waiting = [member for member in members if not self.done.issuperset((member[0], name) for name in self.ways)]
        befores = self._before(number, waiting, below, advance)
        together = [(index, case) for index, case in members if index not in self.failed]
        edit: Edit | None = None
        for name in self.ways if befores else ():
            asked = [(i, case) for i, case in together if i in befores and (i, name) not in self.done]
            # The edit itself is wanted by the controls too, where a former run has measured it.
            if not asked and edit is not None:
                continue
            try:
                found, about = self._edit(number, members, name, edit)
            except (OutputError, ReversalError):
                raise
            except EditkitError as error:
                for index, case in asked:
                    self._add(number, index, case, name, failed=str(error))
                if not name:  # without the edit there are no controls of it
                    advance(len(asked) * len(self.ways))
                    return
                advance(len(asked))
                continue
            edit = edit or found
            audited = self._audit(number, found) if asked and not name else []
            with found.applied(self.lm, check=False, everything=False):
                if not name:
                    self.ability.take(AFTER)
                for index, case in asked:
                    after = look(self.lm, case, self.task.measure, self.config.seed, below)
                    rows = rows_of(case, befores[index], after)
                    verdicts = self.judging.rows(case.id, rows)
                    said = {"judged": verdicts} if verdicts else {}
                    scores = [replace(score, control=name) for score in scores_of_rows(rows) + audited]
                    kept = [score.to_json() for score in scores if score.when == AFTER or not name]
                    self._add(number, index, case, name, edit=about, rows=rows, scores=kept, **said)
                    advance(1)

    def _before(
        self, number: int, waiting: Sequence[Numbered], below: Below | None, advance: Callable[[int], object]
    ) -> dict[int, Look]:
        """What the unedited model says on each case; a case that cannot be asked is noted as failed."""
        found: dict[int, Look] = {}
        for index, case in waiting:
            if index in self.failed:
                continue
            try:
                for fact in case.facts:
                    fact.check_targets(self.lm)
                found[index] = look_before(self.lm, self.digest, case, self.config, below)
            except EditkitError as error:
                self._add(number, index, case, failed=str(error))
                advance(len(self.ways))
        return found

    def _edit(
        self, number: int, members: Sequence[Numbered], control: str, edit: Edit | None
    ) -> tuple[Edit, dict[str, Any]]:
        """The edit of a group, or of a control of it, and what its lines say of it; of a group that was begun before,
        the one that it had.

        - `members`: the group's cases; those that have failed are left out.
        - `control`: the name of a control of `edit`; "": the method's own edit.
        """
        path = self.folder / names.EDIT_FILES / f"{'-'.join(filter(None, (str(number), control)))}.safetensors"
        lines = [line for line in self.journal.lines if line["group"] == number and "edit" in line]
        lines = [line for line in lines if line.get("control", "") == control]
        if lines and path.exists():
            return Edit.load(path), lines[0]["edit"]
        compute = self.compute if edit is None else self.controls.of(control, edit, members[0][0])
        facts = [fact for index, case in members if index not in self.failed for fact in case.facts]
        began = time.perf_counter()
        found = Edit.load(path) if path.exists() else compute(facts)
        about: dict[str, Any] = {
            "rank": found.rank,
            "norm": found.norm(),
            "relative_norm": relative_norm(self.lm, found),
            "seconds": round(time.perf_counter() - began, 4),
        }
        if (left := requantized(self.lm, found)) is not None:
            about |= left.columns()
        if len(members) > 1 or self.task.keep_edits:
            found.save(path)
        if number == 0 and not control:
            about["spectra"] = [spectrum_beside(self.lm, each) for each in spectra(found)]
        return found, about

    def _audit(self, number: int, edit: Edit) -> list[Score]:
        """How many other facts of the atlas a group's edit changes; its table is in the folder of audits."""
        if not self.task.audit:
            return []
        if self.answers is None:
            self.answers = answers(self.lm)
        found = audit(self.lm, edit, before=self.answers, progress=False)
        results.write_table(self.folder / names.AUDITS / f"{number}.parquet", found.rows())
        return [found.score]

    def _add(self, number: int, index: int, case: Case, control: str = "", **found: Any) -> None:
        whose = {"index": index, "case": case.id, "group": number} | ({"control": control} if control else {})
        self.journal.append(whose | {"subject": case.fact.subject, "relation": case.relation} | found)
        self.done.add((index, control))
        if "failed" in found and not control:
            self.failed.add(index)
