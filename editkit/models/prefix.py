"""A prefix: text that stands in front of every text the model is given, as an edit in context does.

While one is in force, editkit's own questions (scores, generated texts, traces, lenses, running text) are asked with
the prefix in front. Characters are counted from the text's own first one on, so subjects and answers are found as
ever (tokens.py). A model that is called directly, as `lm.model(ids)`, does not know of it.

Several prefixes in force stand one behind the other, and of their leads the last one counts:

    New Fact: The Louvre is in Rome          text of the first
    New Fact: Big Ben is in Oslo             text of the second
    Prompt: Big Ben is in                    lead of the second, and what is asked
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from editkit.models.installed import Handle, Installed, installed_on, register
from editkit.models.snapshot import installed_meanwhile
from editkit.tensorfiles import require_fields


@dataclass(frozen=True, eq=False)
class Prefix(Installed):
    """`text`, and behind it `lead`, directly in front of what is asked; each with its own spaces and line breaks."""

    kind: ClassVar[str] = "prefix"
    moves_tokens: ClassVar[bool] = True

    text: str
    lead: str = ""

    def to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"text": self.text, "lead": self.lead}, {}

    @classmethod
    def from_file(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        found = require_fields(dict(values), {"text": (str,), "lead": (str,)}, "a prefix")
        if tensors:
            raise ValueError("a prefix has tensors")
        return cls(**found)

    def check(self, model: nn.Module) -> None:
        """Any model takes a prefix; one that is too long for it is refused when something is asked."""

    @classmethod
    def put(cls, model: nn.Module, contents: Sequence[Self]) -> Iterator[Handle]:
        """Nothing goes on the model: `prefix_of` reads what is in force."""
        yield from ()

    def __str__(self) -> str:
        last = (self.text.strip().splitlines() or [""])[-1]
        return f"a prefix of {len(self.text + self.lead)} characters, which ends with {last[:60]!r}"


def prefix_of(model: nn.Module) -> str:
    """The text that stands in front of every text of `model` now; "" without a prefix."""
    found = [each for each in installed_on(model) if isinstance(each, Prefix)]
    return "".join(each.text for each in found) + found[-1].lead if found else ""


def without_prefix(model: nn.Module) -> AbstractContextManager[None]:
    """In the body texts are taken as they are, without the prefixes that are in force."""
    return installed_meanwhile(model, [each for each in installed_on(model) if not isinstance(each, Prefix)])


register(Prefix)
