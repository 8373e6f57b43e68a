"""Fact, and where its subject's tokens are."""

from dataclasses import dataclass, replace

from editkit.errors import FactError
from editkit.models.load import LanguageModel
from editkit.models.tokens import encode_with_targets, spaced
from editkit.shown import Rows, Shown


@dataclass(frozen=True)
class Fact(Shown):
    """A fact to write: `prompt` with one `{}` for the `subject`, the `target_new`, and the `target_true`.

    >>> Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris").text
    'The Eiffel Tower is located in the city of'

    Raises FactError for a prompt without exactly one `{}`, an empty part, or two equal targets.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str = ""  # may be unknown; needed to compare with what was true before

    def shown(self) -> tuple[str, Rows]:
        """The text, and what it goes from and to."""
        true = [("not", self.target_true)] if self.target_true else []
        return "Fact", [("", self.text), ("→", self.target_new), *true]

    def __post_init__(self) -> None:
        if self.prompt.count("{}") != 1:
            raise FactError(
                f"The prompt {self.prompt!r} has {self.prompt.count('{}')} places for the subject. Write it with "
                "one {}, as in '{} is located in the city of'."
            )
        if not self.subject.strip():
            raise FactError(f"The subject of {self.prompt!r} is empty. Name the subject as the text does.")
        if not self.target_new.strip():
            raise FactError(f"target_new is empty for {self.text!r}. Say what the model should answer.")
        if self.target_new.strip() == self.target_true.strip():
            raise FactError(
                f"target_new and target_true are both {self.target_new.strip()!r}: there is nothing to change."
            )

    @classmethod
    def in_text(cls, text: str, subject: str, target_new: str, target_true: str = "") -> "Fact":
        """A fact from a prompt already filled in. Raises FactError when the subject is not in it once."""
        if text.count(subject) != 1:
            raise FactError(f"The subject {subject!r} occurs {text.count(subject)} times in {text!r}; it must be once.")
        return cls(text.replace(subject, "{}"), subject, target_new, target_true)

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.filled(self.prompt)

    def filled(self, template: str) -> str:
        """A template with this subject in place of `{}`; braces elsewhere stay as they are."""
        return template.replace("{}", self.subject)

    def with_target(self, target_new: str) -> "Fact":
        return replace(self, target_new=target_new)

    def check_targets(self, lm: LanguageModel) -> None:
        """Raise FactError when the tokenizer maps a target to nothing or both targets to the same tokens."""
        targets = [spaced(t) for t in (self.target_new, self.target_true) if t]
        scored = encode_with_targets(lm, [self.text] * len(targets), targets)
        tokens = [[scored.rows.ids[r, i].item() for i in at] for r, at in enumerate(scored.positions)]
        unknown = lm.tokenizer.unk_token_id
        if unknown is not None and unknown != lm.tokenizer.eos_token_id and unknown in tokens[0]:
            raise FactError(
                f"The tokenizer of '{lm.name}' has no tokens for all of {self.target_new!r} (it gives the unknown "
                "token). Choose another target_new or model."
            )
        if len(tokens) == 2 and tokens[0] == tokens[1]:
            raise FactError(
                f"{self.target_new!r} and {self.target_true!r} are the same tokens to the tokenizer of '{lm.name}'."
            )
