"""The trace of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.precision import widened
from editkit.models.tokens import tokenise
from editkit.settings import TraceSettings
from editkit.tracing.corruption import embedding_std, noised, swapped
from editkit.tracing.engines import places_of, started
from editkit.tracing.files import ONE_AXES, ONE_FIELDS, json_of, read_arrays, write_arrays

if TYPE_CHECKING:
    from pandas import DataFrame

# The kinds of token that the paper averages over.
PARTS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, eq=False)
class Traced:
    """The trace of one prompt. `probability[kind]`: [tokens, blocks], P(answer) with that place put back."""

    axes: ClassVar[tuple[str, str]] = ONE_AXES

    tokens: list[str]
    subject: tuple[int, int]  # its first and last token
    answer: str  # what the clean model says next
    clean: float  # P(answer)
    corrupted: float
    window: int  # blocks that mlp and attention put back together
    probability: dict[str, Tensor]
    others: tuple[str, ...] = ()  # subjects that stood for this one
    how: dict[str, Any] = field(default_factory=dict)  # prompt, model, settings with the σ that was used, seed

    @property
    def total_effect(self) -> float:
        """P(answer) that the corruption takes."""
        return self.clean - self.corrupted

    def indirect_effect(self, kind: str) -> Tensor:
        """[tokens, blocks]: how much of it comes back."""
        return self.probability[kind] - self.corrupted

    @property
    def starred(self) -> list[str]:
        """The tokens, those of the subject with a star."""
        first, last = self.subject
        return [token + "*" * (first <= i <= last) for i, token in enumerate(self.tokens)]

    @property
    def parts(self) -> dict[str, list[int]]:
        """The tokens of each of PARTS."""
        return parts_of(len(self.tokens), self.subject)

    def to_frame(self) -> "DataFrame":
        """A row a place: kind, position, token, block, probability, indirect_effect."""
        from pandas import DataFrame

        rows = [
            (kind, position, token, block, table[position, block].item())
            for kind, table in self.probability.items()
            for position, token in enumerate(self.tokens)
            for block in range(table.shape[1])
        ]
        frame = DataFrame(rows, columns=["kind", "position", *self.axes, "probability"])
        return frame.assign(indirect_effect=frame.probability - self.corrupted)

    def save(self, path: str | Path) -> Path:
        """Write PATH.npz (the arrays, by kind) and PATH.json (axes, names along them, everything else)."""
        said = {name: getattr(self, name) for name in ONE_FIELDS}
        axes = {"axes": self.axes, "along": {"token": self.tokens, "block": list(range(self._blocks))}}
        return write_arrays(Path(path), self.probability, axes | said)

    @classmethod
    def load(cls, path: str | Path) -> "Traced":
        """What `save` wrote. Raises EditkitError for files that are not there or not a trace's."""
        read, said = read_arrays(Path(path), cls.axes, ONE_FIELDS)
        arrays = {name: torch.from_numpy(array) for name, array in read.items()}
        said = {name: tuple(said[name]) if name in ("subject", "others") else said[name] for name in ONE_FIELDS}
        return cls(probability=arrays, **said)

    @property
    def _blocks(self) -> int:
        return next(iter(self.probability.values())).shape[1]


def parts_of(tokens: int, subject: tuple[int, int]) -> dict[str, list[int]]:
    """The positions of each of PARTS in a prompt of so many tokens.

    As in the paper's code a subject of one token is both its first and its last, and one token behind it both the first
    subsequent and the last. Nothing behind the subject: those parts are empty.
    """
    first, last = subject
    after, end = last + 1, tokens - 1
    found = [[first], [*range(first + 1, last)], [last], [after], [*range(after + 1, end)], [end]]
    return dict(zip(PARTS, found if after <= end else [*found[:3], [], [], []], strict=True))


def trace(
    lm: LanguageModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    others: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Traced:
    """The causal trace of the fact's prompt. The answer is what the clean model says, whatever the fact's targets are.

    - `settings`: see TraceSettings. `seed`: of the noise. `progress`: a bar on what takes over a second.
    - `others`: with corruption="swap", subjects to take from. One fits that has as many tokens in the prompt, so that
      every clean activation has its place, and another answer; `samples` of those are drawn.

    The model is left as it was. Raises FactError when no token covers the subject, or no other subject fits.
    """
    settings = settings or TraceSettings()
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    window = settings.window_of(lm.layers)
    taken: tuple[str, ...] = ()
    with torch.no_grad(), widened(lm):
        if settings.corruption == "swap":
            taken, subject = swapped(lm, fact, (first, last), others, settings, seed)
        else:
            settings = replace(settings, sigma=settings.sigma or embedding_std(lm))
            assert settings.sigma is not None
            subject = noised(lm, rows.ids[0, first : last + 1], settings, settings.sigma, seed)
        model = started(lm, fact.text, first, subject, settings.engine)
        shape = rows.last(0) + 1, lm.layers
        scores = {kind: torch.full(shape, model.corrupted, dtype=torch.float64) for kind in settings.kinds}
        total = len(settings.kinds) * (shape[0] - first)
        with tqdm(total=total, desc=f"trace of {fact.subject}", disable=not progress, leave=False, delay=1) as bar:
            for kind, table in scores.items():
                places = places_of(kind, lm.layers, window)
                for token in range(first, shape[0]):
                    table[token] = torch.tensor(model.at(token, places), dtype=torch.float64)
                    bar.update()
    return Traced(
        tokens=[fact.text[begin:end] for begin, end in rows.offsets[0]],
        subject=(first, last),
        answer=lm.tokenizer.decode([model.answer]),
        clean=model.clean,
        corrupted=model.corrupted,
        window=window,
        probability=scores,
        others=taken,
        how={"prompt": fact.prompt, "subject": fact.subject, "model": lm.name, "seed": seed} | json_of(settings),
    )
