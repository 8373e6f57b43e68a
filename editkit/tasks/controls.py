"""The null controls of a benchmark: each puts another edit in the place of the edit of a group of cases."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from editkit.edits.edit import Edit
from editkit.facts import Fact
from editkit.methods.shared.controls import Control, null_controls, random_like
from editkit.models.load import LanguageModel
from editkit.runs.pairs import differences, headline
from editkit.runs.read import Sides, sides_of
from editkit.runs.tables import Tables
from editkit.settings import CONTROLS, Config
from editkit.tasks import console
from editkit.tasks.common import bind_method


class Controls:
    """The null controls of `config`'s method on `lm`. None where task.controls does not ask for them."""

    def __init__(self, lm: LanguageModel, config: Config) -> None:
        self._lm, self._config = lm, config
        asked = getattr(config.task, "controls", False)
        found = null_controls(config.method_name, config.method, config.moments, lm.name, lm.layers) if asked else []
        self.all: dict[str, Control] = {control.name: control for control in found}
        self._bound: dict[str, Callable[[Sequence[Fact]], Edit]] = {}

    @property
    def measured(self) -> list[str]:
        """The names of those that are not skipped."""
        return [name for name, control in self.all.items() if not control.skipped]

    def of(self, name: str, edit: Edit, place: int) -> Callable[[Sequence[Fact]], Edit]:
        """What computes a control's edit of facts on the unedited model; what its edits share is found now, once.

        - `edit`: the method's own, of the same facts. `place`: in the data, of the first of their cases; it seeds what
          is drawn, the same in a shard as in a run over all of the data.

        Raises EditkitError where the method cannot be used so.
        """
        control, config = self.all[name], self._config
        if control.settings is None:
            return lambda facts: random_like(edit, f"{config.seed}|{place}")
        if name not in self._bound:
            assert control.moments is not None
            asked = replace(config, method_name=control.method, method=control.settings, moments=control.moments)
            self._bound[name] = bind_method(self._lm, asked)
        return self._bound[name]


def table(described: Sequence[Mapping[str, Any]], tables: Tables) -> str:
    """What is printed: headline metrics under the edit and under each control, and P(the edit is better).

    `described`: what the record says of the controls. All figures are of the same cases.
    """
    names = list(tables.controlled)
    lines = ["", f"{'null controls':24}{'edit':>8}" + "".join(f"{CONTROLS[name]:>12}" for name in names)]
    edit = sides_of(tables.summary)
    under = {name: sides_of(tables.control_summary, control=name) for name in names}
    metrics = headline(edit)
    pairs = {name: differences(metrics, tables.edits, tables.control_rows(name)) for name in names}

    def row(label: str, edit: float | None, values: Sequence[float | None]) -> str:
        cells = ["–" if value is None else f"{value:.3f}" for value in (edit, *values)]
        return f"{label:24}{cells[0]:>8}" + "".join(f"{cell:>12}" for cell in cells[1:])

    for metric in metrics:
        means = [_mean(under[name].get(metric)) for name in names]
        lines.append(row(f"{metric.protocol.name}.{metric.label}", _mean(edit[metric]), means))
        found = [pairs[name].get(metric) for name in names]
        if any(found):
            shares = [None if each is None else each.probability for each in found]
            lines.append(row("  P(the edit is better)", None, shares).replace("–", " ", 1))
    norms = {each["name"]: each["relative_norm"] for each in described if "skipped" not in each}
    lines.append(row("‖ΔW‖/‖W‖", tables.edit()["relative_norm"], [norms[name] for name in names]))
    for each in described:
        texts = [f"skipped, {each['skipped']}"] if "skipped" in each else [each["how"]]
        if failed := each.get("failed"):
            texts.append(f"failed on {len(failed)} cases; the first: {failed[0]}")
        told = f"  {CONTROLS[each['name']]}: {'; '.join(texts)}"
        lines += textwrap.wrap(told, console.WIDTH, subsequent_indent="    ")
    return "\n".join(lines)


def _mean(sides: Sides | None) -> float | None:
    return sides.after.mean if sides and sides.after else None
