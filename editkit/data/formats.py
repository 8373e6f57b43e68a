"""The formats of records by name. No torch here, so a configuration error answers at once."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from editkit.data.cases import Case
    from editkit.data.fields import Raw

ATLAS = "atlas"  # the bundled facts: made into cases, not read from records


@dataclass(frozen=True)
class Format:
    """How records of one sort become cases, and by what they are known."""

    reader: str  # "module:function", Raw -> Case
    marks: tuple[tuple[str, ...], ...]  # sets of fields, any of which shows that a record is of this format
    before: str = ""  # "module:function", (records, seed) -> records: what needs all records at once

    def load(self) -> "Callable[[Raw], Case]":
        return _imported(self.reader)

    def prepared(self, records: list[Any], seed: int) -> list[Any]:
        return _imported(self.before)(records, seed) if self.before else records


FORMATS = {
    "counterfact": Format(
        "editkit.data.counterfact:counterfact", (("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),)
    ),
    "counterfact_flat": Format(
        "editkit.data.counterfact:counterfact_flat", (("prompt", "subject", "rephrase_prompt", "locality_prompt"),)
    ),
    "zsre": Format("editkit.data.zsre:zsre", (("src", "subject", "rephrase", "answers"),)),
    "knowedit": Format(
        "editkit.data.knowedit:knowedit",
        (("prompt", "subject", "target_new", "locality"), ("concept", "text", "labels")),
    ),
    "mquake": Format("editkit.data.mquake:mquake", (("requested_rewrite", "questions", "new_answer"),)),
    "known": Format(
        "editkit.data.known:known", (("prompt", "subject", "attribute"),), "editkit.data.known:with_targets"
    ),
}


def check_format(name: str) -> None:
    """Raises ConfigError for a name that is neither `atlas` nor a format."""
    if name != ATLAS and name not in FORMATS:
        raise ConfigError(f"No data '{name}': {did_you_mean(name, [ATLAS, *FORMATS])}")


def looks_like(records: Iterable[Any]) -> str:
    """The format that most of the records have the fields of; "" when none has."""
    votes = dict.fromkeys(FORMATS, 0)
    for record in records:
        for name, found in FORMATS.items():
            votes[name] += isinstance(record, dict) and any(set(marks) <= set(record) for marks in found.marks)
    best = max(votes, key=lambda name: votes[name])
    return best if votes[best] else ""


def _imported(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)
