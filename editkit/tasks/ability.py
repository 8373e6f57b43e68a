"""General ability of a task's model, before its edits and after them; kept in the run folder for a run that goes on."""

import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.files import write_text
from editkit.metrics.ability import ability, scores_of
from editkit.metrics.harness import Figure
from editkit.metrics.metric import Average, Score
from editkit.models.load import LanguageModel
from editkit.models.prefix import prefix_of
from editkit.runs import names
from editkit.runs.read import sides_of
from editkit.settings import Config
from editkit.tasks import console

UNSEEN = (
    "lm-evaluation-harness calls the model itself, and does not see the prefix that this edit puts in front of texts"
)


class Ability:
    """Asked where task.ability says so: `take(BEFORE)` on the unedited model, `take(AFTER)` with all edits in force.

    What has been taken is in RUN/ability.json at once, and is not taken again by a run that goes on. Raises ConfigError
    for a shard of data, whose edits are not those of the whole.
    """

    def __init__(self, lm: LanguageModel, config: Config, folder: Path, say: Callable[[str], None]) -> None:
        self._lm, self._path, self._say = lm, folder / names.ABILITY, say
        self._preset, self._limit = config.task.ability, config.task.ability_limit
        if self._preset is not None and config.data.shard != "0/1":
            raise ConfigError(
                f"task.ability is asked with all edits in force; data.shard={config.data.shard} has a part of them. "
                "Leave one of the two."
            )
        # {when: {"figures": [...], "seconds": 12.3}} or {when: {"skipped": why}}
        self.taken: dict[str, dict[str, Any]] = {}
        if self._preset is not None and config.resume and self._path.exists():
            self.taken = json.loads(self._path.read_text(encoding="utf-8"))

    def take(self, when: str) -> None:
        """Ask the model as it is now, unless that was done. Raises EditkitError where the harness cannot."""
        if self._preset is None or when in self.taken:
            return
        if prefix_of(self._lm.model):
            self.taken[when] = {"skipped": UNSEEN}
        else:
            began = time.perf_counter()
            found = [vars(figure) for figure in ability(self._lm, self._preset, self._limit)]
            self.taken[when] = {"figures": found, "seconds": round(time.perf_counter() - began, 2)}
        write_text(self._path, json.dumps(self.taken, indent=2) + "\n")

    @property
    def scores(self) -> list[Score]:
        """What has been taken, as scores of the record."""
        return [
            score
            for when, found in self.taken.items()
            for score in scores_of([Figure(**each) for each in found.get("figures", [])], when)
        ]

    def to_json(self) -> dict[str, Any]:
        """What the record says beside the scores; {} where ability is not asked."""
        if self._preset is None:
            return {}
        return {"preset": self._preset, "limit": self._limit, **self.taken}

    def show(self) -> None:
        """Print the figures, where there are any."""
        if self._preset is None:
            return
        lines = ["", f"{f'general ability ({self._preset})':34}{'before':>9}{'after':>9}{'95 % interval':>18}{'n':>6}"]
        for metric, sides in sides_of(self.scores).items():
            shown = sides.shown
            assert shown is not None
            bounds = shown.interval
            interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else "–"
            lines.append(
                f"{metric.label[:34]:34}{_mean(sides.before):>9}{_mean(sides.after):>9}{interval:>18}{shown.n or 0:>6}"
            )
        for when, found in self.taken.items():
            if "skipped" in found:
                lines += textwrap.wrap(f"  {when}: {found['skipped']}", console.WIDTH)
        self._say("\n".join(lines))


def _mean(average: Average | None) -> str:
    return "–" if average is None else f"{average.mean:.3f}"
