"""The judge that needs no model: LocFT-BF's rule, as in `metrics/natural.py`."""

from collections.abc import Iterator, Sequence

from editkit.errors import ConfigError
from editkit.judges import Question, Verdict, register
from editkit.metrics.natural import matches


class Exact:
    """Right where all of the answer is one of those expected, normalised as SQuAD does."""

    identity, lasting = "exact", False

    def verdicts(self, asked: Sequence[Question]) -> Iterator[Verdict]:
        for each in asked:
            right = matches(each.answer, each.expected)
            yield Verdict(right, "yes" if right else "no", tokens=0)


def open_exact(rest: str, device: str) -> Exact:
    if rest:
        raise ConfigError(f"task.judge=exact takes nothing behind it; found '{rest}'. Write task.judge=exact.")
    return Exact()


register("exact", open_exact)
