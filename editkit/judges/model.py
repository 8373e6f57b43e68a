"""A model on this machine as the judge: is "yes" the likelier word behind the question, or "no"?

A chat model reads the question as a user's turn, any other as plain text. Both words are scored, so every answer gets a
verdict, from a model that follows no instructions too; whether its verdicts mean anything is for the reader to check.
"""

import time
from collections.abc import Iterator, Sequence

from editkit.errors import FactError
from editkit.judges import Question, Verdict, register, required
from editkit.metrics.scoring import score_targets
from editkit.models.load import LanguageModel, load
from editkit.models.tokens import in_form, token_counts

BATCH = 16  # questions
LEAD = "Verdict:"  # what the word stands behind


class ModelJudge:
    """A loaded model. It is no copy of the edited one, though it may come from the same folder."""

    lasting = True

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.identity = f"model:{lm.name}, {str(lm.dtype).split('.')[-1]}, {lm.digest}"

    def verdicts(self, asked: Sequence[Question]) -> Iterator[Verdict]:
        for first in range(0, len(asked), BATCH):
            yield from self._together([self._prompt(each) for each in asked[first : first + BATCH]])

    def _prompt(self, asked: Question) -> str:
        if self.lm.tokenizer.chat_template:
            return in_form(self.lm, asked.prompt, "chat") + LEAD
        return f"{asked.prompt}\n{LEAD}"

    def _together(self, prompts: Sequence[str]) -> Iterator[Verdict]:
        began = time.perf_counter()
        try:
            found = score_targets(self.lm, [*prompts, *prompts], [*["yes"] * len(prompts), *["no"] * len(prompts)])
        except FactError as error:  # a question that the model has no positions for
            if len(prompts) == 1:
                yield Verdict(None, str(error))
            else:
                for prompt in prompts:
                    yield from self._together([prompt])
            return
        seconds = round((time.perf_counter() - began) / len(prompts), 4)
        sides = zip(found[: len(prompts)], found[len(prompts) :], token_counts(self.lm, prompts), strict=True)
        for yes, no, tokens in sides:
            right = None if yes.probability == no.probability else yes.probability > no.probability
            reply = f"P(yes) {yes.probability:.3g}, P(no) {no.probability:.3g}"
            yield Verdict(right, reply, tokens, seconds)


def open_model(rest: str, device: str) -> ModelJudge:
    """Raises ModelError for a model that cannot be loaded."""
    return ModelJudge(load(required(rest, "model:NAME_OR_FOLDER"), device=device, dtype="auto"))


register("model", open_model)
