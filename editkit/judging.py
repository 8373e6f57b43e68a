"""Asks a judge about the free answers of a case's rows, and keeps what it says.

The columns `judged_before` and `judged_after` of cases.parquet hold the verdicts (metrics: `metrics/judged.py`), the
journal's line of the case everything else, from which judged.jsonl is written. Verdicts of judges that cost something
are kept in the cache too, so the same answer to the same question is judged once:

    CACHE/judged/KE/KEY.json     KEY: of the judge's identity, the version of the prompt, and the whole question

Where the judge is not there, the run goes on; what was not judged has no verdict, and says why.
"""

import contextlib
import hashlib
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editkit.data.kinds import TRUE_WANTED
from editkit.errors import ModelError, OutputError
from editkit.files import write_text
from editkit.judges import PROMPT, VERSION, Judge, JudgeError, Question, Verdict, open_judge, totals
from editkit.metrics.generation import ASKED_FREELY, KNOWN_BEFORE
from editkit.metrics.metric import WHEN
from editkit.moments.cache import cache_folder

KINDS = frozenset(kind for kind, _, _ in ASKED_FREELY)  # whose right answer is one text
WIDTH = 80  # of what is told
GIVE_UP = 3  # cases in a row for which the judge was not there
Entry = dict[str, Any]


class Judging:
    """A run's judge. `named`: task.judge, None for none; `device`: the run's; `say`: prints a line.

    Raises ConfigError for a judge that cannot be. One that is not there now is told of, and no answer is judged.
    """

    def __init__(self, named: str | None, device: str, say: Callable[[str], None]) -> None:
        self.named, self._say = named, say
        self._judge: Judge | None = None
        self._why = ""  # it is not asked any more
        self._missed = 0  # cases in a row
        if named is not None:
            try:
                self._judge = open_judge(named, device)
            except (JudgeError, ModelError) as error:
                self._give_up(str(error))

    def rows(self, case: str, rows: Sequence[dict[str, Any]]) -> list[Entry]:
        """Judge the free answers of a case's rows: puts the columns into `rows`, and returns an entry for each answer.

        Without a judge it does nothing, and returns []. An answer that says nothing is wrong, and nobody is asked.
        """
        if self.named is None:
            return []
        # 1) What is to be judged.
        places, entries, questions = [], [], []
        for row in (row for row in rows if row["kind"] in KINDS):
            known = row["kind"] not in KNOWN_BEFORE or row["greedy_true_before"] in (None, True)
            wanted = row["target_true"] if row["kind"] in TRUE_WANTED else row["target_new"]
            expected = [text for text in (wanted, *row["aliases"]) if known and text.strip()]
            for when in WHEN:
                row[f"judged_{when}"] = None
                answer = row[f"answer_{when}"]
                if expected and answer is not None:
                    entry = {"case": case, "kind": row["kind"], "when": when, "question": row["prompt"]}
                    places.append((row, f"judged_{when}"))
                    entries.append(entry | {"expected": expected, "answer": answer.strip()})
                    questions.append(Question(row["prompt"], tuple(expected), answer.strip()))
        # 2) The verdicts.
        found = self._verdicts(questions)
        for (row, column), entry, (verdict, kept) in zip(places, entries, found, strict=True):
            if isinstance(verdict, Verdict):
                row[column] = verdict.right
                entry |= asdict(verdict) | {"kept": kept}
            else:
                entry |= {"right": None, "kept": False, "error": str(verdict)}
        return entries

    def record(self, entries: Iterable[Entry]) -> dict[str, Any] | None:
        """Who judged, how it was asked and what it cost, for a record; None without a judge."""
        if self.named is None:
            return None
        found = list(entries)
        why = next((entry["error"] for entry in found if entry.get("error")), self._why)
        about = {"name": self.named, "identity": self._judge.identity if self._judge else "", "version": VERSION}
        return about | {"prompt": PROMPT} | totals(found) | ({"unavailable": why} if why else {})

    def _verdicts(self, questions: Sequence[Question]) -> list[tuple[Verdict | JudgeError, bool]]:
        """For each question the verdict, or why there is none, and whether it was there before: from a former run, or
        from the same question in this case."""
        found: dict[Question, tuple[Verdict | JudgeError, bool]] = {}
        for each in questions:
            if not each.answer:
                found[each] = Verdict(False, "", tokens=0), False
            elif (kept := self._kept(each)) is not None:
                found[each] = kept, True
        left = [each for each in dict.fromkeys(questions) if each not in found]
        if self._judge is None or self._why:
            found |= {each: (JudgeError(self._why), False) for each in left}
        elif left:
            answers = self._judge.verdicts(left)
            bar = tqdm(answers, desc="judge", total=len(left), unit="answer", delay=1, leave=False)
            for each, verdict in zip(left, bar, strict=True):
                found[each] = verdict, False
                if isinstance(verdict, Verdict):
                    self._keep(each, verdict)
            self._look_at([found[each][0] for each in left])
        listed = []
        for each in questions:
            verdict, _ = entry = found[each]
            listed.append(entry)
            found[each] = verdict, True
        return listed

    def _look_at(self, verdicts: Sequence[Verdict | JudgeError]) -> None:
        """Tell when the judge is not there, and ask no more when that lasts."""
        errors = [verdict for verdict in verdicts if isinstance(verdict, JudgeError)]
        self._missed = self._missed + 1 if errors else 0
        if self._missed == GIVE_UP:
            self._give_up(str(errors[0]))
        elif self._missed == 1:
            self._tell(f"{errors[0]} The run goes on; {len(errors)} answers of this case are not judged.")

    def _give_up(self, why: str) -> None:
        self._why = why
        self._tell(f"{why} It is not asked any more. The run goes on, and answers are not judged.")

    def _tell(self, line: str) -> None:
        self._say("\n".join(textwrap.wrap(line, WIDTH, initial_indent="judge   ", subsequent_indent=" " * 8)))

    def _path(self, asked: Question) -> Path | None:
        """Where a verdict is kept; None for a judge whose verdicts are not."""
        if self._judge is None or not self._judge.lasting:
            return None
        key = hashlib.sha256(json.dumps([self._judge.identity, VERSION, asked.prompt]).encode()).hexdigest()
        return cache_folder() / "judged" / key[:2] / f"{key}.json"

    def _kept(self, asked: Question) -> Verdict | None:
        """The verdict of a former run; a file that cannot be read counts as missing."""
        path = self._path(asked)
        try:
            return Verdict(**json.loads(path.read_text(encoding="utf-8"))) if path else None
        except (OSError, ValueError, TypeError):
            return None

    def _keep(self, asked: Question, verdict: Verdict) -> None:
        path = self._path(asked)
        if path is not None:
            with contextlib.suppress(OutputError):  # without a cache the next run asks again
                write_text(path, json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
