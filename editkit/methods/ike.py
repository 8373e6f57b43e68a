"""IKE: an edit in context, which changes no weight (Zheng et al. 2023, arXiv 2305.12740).

A prefix goes in front of every text that the model is given (models/prefix.py):

    demonstrations                      of other facts, the nearest one last  (shared/demonstrations.py)
    New Fact: {prompt} {target_new}
    Prompt: {prompt} {target_new}

    New Fact: {prompt} {target_new}
    Prompt:                             and then what is asked

With `method.corpus` there are up to 32 demonstrations, of kinds copy, update and retain as 1 : 3 : 4, as many as fit
into `room` of the model's positions, and the fact's own copy behind them, as in the authors' code. Without a corpus the
prefix is the last two lines alone: prompt-only editing, the null control that every other method must beat.

Each step of a session adds its own lines in front of the same "Prompt: ", so the latest fact stands nearest to what is
asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from editkit.edits import Edit, base_of
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.demonstrations import KINDS, Corpus, corpus_of
from editkit.methods.shared.prelude import Moments, checked_facts, provenance
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.prefix import Prefix, prefix_of, without_prefix
from editkit.models.tokens import positions_of
from editkit.settings import WeightlessSettings, require

LEAD = "Prompt: "


@dataclass(frozen=True)
class IkeSettings(WeightlessSettings):
    """IKE (arXiv 2305.12740)."""

    corpus: str | None = (
        None  # where demonstrations come from: atlas, or a file of CounterFact's records; None: no demonstrations
    )
    demonstrations: int = 32  # at most
    room: float = 0.5  # share of the model's positions that the prefix may take

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.demonstrations > 0, "method.demonstrations", self.demonstrations, "positive")
        require(0 < self.room < 1, "method.room", self.room, "between 0 and 1")


@in_eval_mode
def read(
    lm: LanguageModel, settings: IkeSettings, *, moments: Moments = None, seed: int = 0, progress: bool = False
) -> Corpus | None:
    """The corpus of `settings` with the states of its facts on `lm` without a prefix; None where it names none.

    `moments`, `seed` and `progress` are of no use here.
    """
    if settings.corpus is None:
        return None
    with without_prefix(lm.model):
        return corpus_of(lm, settings.corpus)


@in_eval_mode
def ike(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: IkeSettings | None = None,
    *,
    base: Corpus | None = None,
) -> Edit:
    """A prefix that states all of `facts`, as an Edit.

    - `settings`: see IkeSettings.
    - `base`: the corpus that `settings` name, read before (`read`).

    The model is left as it was. Raises ConfigError for a corpus that cannot be read, FactError for a target without
    tokens, EditkitError for a prefix that takes more than its share of the model's positions.
    """
    found = checked_facts(lm, facts)
    settings = settings or IkeSettings()
    corpus = read(lm, settings) if base is None else base
    stated = "".join(f"New Fact: {_said(fact)}\n" for fact in found)
    limit = positions_of(lm)
    room = None if limit is None else int(settings.room * limit)
    before = prefix_of(lm.model).removesuffix(LEAD)
    if room is not None and _length(lm, before + stated + LEAD) > room:
        raise EditkitError(
            f"The prefix would have {_length(lm, before + stated + LEAD)} tokens with {len(found)} more facts; "
            f"method.room gives it {room} of the {limit} positions of '{lm.name}'. Edit fewer facts in context, or "
            "raise method.room."
        )
    text, shown = stated, 0
    if corpus is not None:
        own = "".join(f"New Fact: {_said(fact)}\nPrompt: {_said(fact)}\n\n" for fact in found)
        with without_prefix(lm.model):
            texts, subjects = [_said(fact) for fact in found], [fact.subject for fact in found]
            nearest = corpus.nearest(lm, texts, subjects)[: settings.demonstrations]
        kinds = [KINDS[i % len(KINDS)] for i in range(len(nearest))]
        pieces = [each.demonstration(kind) for each, kind in zip(nearest, kinds, strict=True)]
        # The most that fit, the nearest ones, which stand last.
        for count in range(len(pieces), -1, -1):
            longer = "".join(reversed(pieces[:count])) + own + stated
            if room is None or _length(lm, before + longer + LEAD) <= room:
                text, shown = longer, count
                break
    how = provenance("ike", settings, found, demonstrations=shown, tokens=_length(lm, text + LEAD))
    return Edit((), base_of(lm), how, installed=(Prefix(text, LEAD),))


def _said(fact: Fact) -> str:
    """The prompt with its new answer."""
    return f"{fact.text} {fact.target_new.strip()}"


def _length(lm: LanguageModel, text: str) -> int:
    """How many tokens the text has, with the tokenizer's own."""
    return len(lm.tokenizer(text, verbose=False)["input_ids"])


register("ike", ike, IkeSettings, base=read)
