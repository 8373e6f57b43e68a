"""Alarm: what a session watches while it edits, and when it says that the edits have begun to break the model.

    growth        ‖Σ ΔW‖ / ‖W0‖ over all weights that were changed (Frobenius)
    per_fact      the largest ‖Σ ΔW‖ / √n of one weight, n the facts edited so far (BetaEdit's guard, IJCAI 2026; its
                  authors' code ends at 20)
    perplexity    on running text that no edit has to do with, in multiples of the unedited model's
    untouched     the share of facts that are never edited, and that the unedited model answered rightly, which it still
                  answers rightly: every token of the true object is the likeliest after the prompt

The first three must not be over their limits, the last not under it; one that is no number has passed its limit.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editkit.data.cases import Probe
from editkit.data.kinds import NEIGHBORHOOD
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.metrics.running_text import PROSE, perplexity, text_blocks
from editkit.metrics.scoring import score_probes
from editkit.models.load import LanguageModel
from editkit.settings import AlarmSettings, require_one_of
from editkit.settings.runs import CONTINUE, ON_COLLAPSE, ROLLBACK, STOP

__all__ = ["CONTINUE", "ROLLBACK", "STOP", "Alarm", "CollapseError", "Seen"]

SAID = {
    "growth": "‖ΔW‖/‖W‖ is {:.3g}, over {}",
    "per_fact": "‖ΔW‖/√n is {:.3g}, over {}",
    "perplexity": "perplexity is {:.3g} × the unedited model's, over {}",
    "untouched": "the share of untouched facts that hold is {:.3g}, under {}",
}


@dataclass(frozen=True)
class Seen:
    """What an alarm saw after `step` steps, with `facts` edited; `untouched` is None without such facts."""

    step: int
    facts: int
    growth: float
    per_fact: float
    perplexity: float
    untouched: float | None
    passed: tuple[str, ...]  # names of the limits that were passed
    line: str  # what is said about it; "" where no limit was passed

    def to_json(self) -> dict[str, Any]:
        """The figures, with None for those that are no finite number, and the limits passed."""
        values = {name: value for name, value in asdict(self).items() if name in SAID}
        plain = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        return plain | {"passed": list(self.passed)}


class CollapseError(EditkitError):
    """An alarm has ended a session.

    - `seen`: what it saw. `kept`: how many steps are in force now.
    - `dropped`: facts whose edits were taken back; none where the session was only stopped.
    - `outcome`: the sentence of the message that says so.
    """

    def __init__(self, seen: Seen, kept: int, dropped: Sequence[Fact]) -> None:
        self.seen, self.kept, self.dropped = seen, kept, tuple(dropped)
        self.outcome = "The session stops there."
        if dropped or kept != seen.step:
            named = ", ".join(f"{fact.subject!r} ({fact.target_new.strip()})" for fact in self.dropped)
            self.outcome = f"It is back at step {kept}, the last good one; dropped: {named}."
        super().__init__(f"{seen.line}. {self.outcome}")


class Alarm:
    """`Session(lm, method, alarm=Alarm(lm, untouched=facts))`. Made on the unedited model, which it remembers.

    - `settings`: the limits, and after how many steps each look comes.
    - `untouched`: facts that the session never edits.
    - `on_collapse`: at a limit, continue; stop; or rollback: go back to the last look at which no limit was passed.
    - `text`: prose (bundled), records of running text (me_ppl:FILE), or as `corpora.running_text`.
    - `say`: takes the line about a limit; None: it is a warning. It is not said again while the same limits are passed.

    Raises ConfigError for another on_collapse, or a text that is too short.
    """

    def __init__(
        self,
        lm: LanguageModel,
        settings: AlarmSettings | None = None,
        *,
        untouched: Sequence[Fact] = (),
        on_collapse: str = CONTINUE,
        text: str = PROSE,
        say: Callable[[str], None] | None = None,
    ) -> None:
        require_one_of(on_collapse, "on_collapse", ON_COLLAPSE)
        self.lm, self.settings, self.on_collapse = lm, settings or AlarmSettings(), on_collapse
        self._say = say or _warn
        self._blocks = text_blocks(lm, text, tokens=self.settings.tokens)
        self._unedited = perplexity(lm, self._blocks)
        facts = [fact for fact in untouched if fact.target_true.strip()][: self.settings.facts]
        self._probes = [Probe(NEIGHBORHOOD, fact.text, fact.target_true, fact.target_new) for fact in facts]
        self._probes = [probe for probe, holds in zip(self._probes, self._held(), strict=True) if holds]
        self._last: tuple[str, ...] = ()

    def due(self, step: int) -> bool:
        """Whether a look comes after so many steps."""
        return step % self.settings.every == 0

    def look(self, step: int, facts: int, norms: Mapping[str, tuple[float, float]]) -> Seen:
        """The figures now; those that are over their limits are said.

        - `step`, `facts`: how many of each have been edited.
        - `norms`: (‖Σ ΔW‖, ‖W0‖) of each parameter that was changed.
        """
        changed, began = (math.hypot(*(pair[side] for pair in norms.values())) for side in (0, 1))
        held = self._held()
        values = {
            "growth": changed / began if began else 0.0,
            "per_fact": max((size for size, _ in norms.values()), default=0.0) / max(facts, 1) ** 0.5,
            "perplexity": perplexity(self.lm, self._blocks) / self._unedited,
            "untouched": sum(held) / len(held) if held else None,
        }
        passed = tuple(name for name, value in values.items() if value is not None and self._passes(name, value))
        told = [SAID[name].format(values[name], f"alarm.{name}={self._limit(name):g}") for name in passed]
        line = f"alarm after step {step} ({facts} facts edited): " + "; ".join(told) if passed else ""
        if line and passed != self._last:
            self._say(line)
        self._last = passed
        return Seen(step, facts, passed=passed, line=line, **values)

    def _limit(self, name: str) -> float | None:
        limit: float | None = getattr(self.settings, name)
        return limit

    def _passes(self, name: str, value: float) -> bool:
        limit = self._limit(name)
        if limit is None:
            return False
        return not (value >= limit if name == "untouched" else value <= limit)

    def _held(self) -> list[bool]:
        """Of each untouched fact, whether the model answers it rightly."""
        scores = score_probes(self.lm, self._probes) if self._probes else []
        return [score.true is not None and score.true.greedy for score in scores]


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=5)
