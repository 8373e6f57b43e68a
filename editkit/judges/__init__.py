"""Judges of free answers: is what the model said, until it stopped by itself, the wanted answer? One file a judge.

    task.judge=exact           the rule of natural stop (metrics/natural.py)
    task.judge=model:NAME      a model on this machine: a local folder, "atlas", or a Hub name
    task.judge=http:URL@MODEL  an endpoint in the form of OpenAI's chat completions; MODEL may be left out where it
                               serves one. $EDITKIT_JUDGE_KEY is its key, if it wants one

A file ends with `register("exact", open_exact)`. Another package adds its own with the same call, and an entry point
`NAME = "its.module"` in the group `editkit.judges` (see registry.py). Names are listed without importing torch.
`editkit.judging` puts the questions and keeps the verdicts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from editkit.errors import ConfigError, EditkitError
from editkit.registry import Registry

VERSION = 1  # of the prompt and of how a reply is read: change it with either, and no kept verdict is used again
PROMPT = """\
You grade an answer. Take the reference answer as true, whatever else you know.
The answer is right if it says what the reference answer says, in any words. It is wrong if it says something else, or \
if it goes on to contradict the reference answer.

Question, or text to complete: {question}
Reference answer: {expected}
Answer: {answer}

Is the answer right? Reply with one word: yes or no."""


@dataclass(frozen=True)
class Question:
    """One answer to judge."""

    question: str  # the prompt that was answered
    expected: tuple[str, ...]  # the right answer, and its other spellings
    answer: str

    @property
    def prompt(self) -> str:
        """What a judge that reads is asked."""
        return PROMPT.format(question=self.question, expected=" or ".join(self.expected), answer=self.answer)


@dataclass(frozen=True)
class Verdict:
    """What a judge found."""

    right: bool | None  # None: its reply is neither yes nor no
    reply: str
    tokens: int | None = None  # read and written; None: not told
    seconds: float = 0.0


class JudgeError(EditkitError):
    """The judge cannot be asked now; the run goes on without it."""


class Judge(Protocol):
    """Answers questions; a run opens one.

    - `identity`: what decides its verdicts beside the question: weights, or address and model. Kept in the record.
    - `lasting`: whether verdicts are kept on the disk for other runs.
    """

    identity: str
    lasting: bool

    def verdicts(self, asked: Sequence[Question]) -> "Iterator[Verdict | JudgeError]":
        """For each question, in order: the verdict, or why there is none."""
        ...


Open = Callable[[str, str], Judge]

_JUDGES: Registry[Open] = Registry("judge", package=__name__, group="editkit.judges")


def register(name: str, opened: Open) -> Open:
    """Add a judge: `task.judge=NAME:REST` opens it.

    - `opened(rest, device)`: the judge. `rest` is what stands behind the first colon, "" where there is none; `device`
      is the run's. Raises ConfigError for a `rest` that does not fit; JudgeError or ModelError where there is no such
      judge now, and the run goes on.

    Raises ConfigError for a name that is taken.
    """
    return _JUDGES.register(name, opened, home=opened.__module__)


def unregister(name: str) -> None:
    """Take a judge out again, as a test does."""
    _JUDGES.unregister(name)


def names() -> list[str]:
    """The names of all judges, sorted. Imports none."""
    return _JUDGES.names()


def check_judge(named: str | None) -> None:
    """Raises ConfigError for a `task.judge` whose name is no judge, with the near match. Imports none."""
    if named is not None:
        _JUDGES.check(named.partition(":")[0])


def open_judge(named: str, device: str) -> Judge:
    """The judge that `task.judge` names. Raises what `register` says."""
    name, _, rest = named.partition(":")
    return _JUDGES.get(name)(rest, device)


def required(rest: str, form: str) -> str:
    """`rest`, or ConfigError where a judge needs one; `form`: how it is written."""
    if not rest:
        raise ConfigError(f"task.judge={form.partition(':')[0]} does not say which. Write task.judge={form}.")
    return rest


def prompt_of(entry: Mapping[str, Any]) -> str:
    """What a judge that reads was asked, from an entry of a journal's line."""
    return Question(entry["question"], tuple(entry["expected"]), entry["answer"]).prompt


def totals(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's verdicts cost, from the entries of its journal's lines (`judging.Judging.rows`).

    asked: answers; kept: verdicts of former runs among them; unclear: replies that are neither yes nor no; unjudged:
    where the judge was not there; tokens and seconds of those that were asked now (tokens None: not told).
    """
    found = list(entries)
    new = [entry for entry in found if not entry["kept"] and not entry.get("error")]
    told = [entry["tokens"] for entry in new if entry["tokens"] is not None]
    return {
        "asked": len(found),
        "kept": sum(entry["kept"] for entry in found),
        "unclear": sum(entry["right"] is None and not entry.get("error") for entry in found),
        "unjudged": sum(bool(entry.get("error")) for entry in found),
        "tokens": sum(told) if told else None,
        "seconds": round(sum(entry["seconds"] for entry in new), 4),
    }
