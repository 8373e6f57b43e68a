"""The trace of one prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from editkit.facts import Fact
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.precision import widened
from editkit.models.tokens import tokenise
from editkit.progress import Bar
from editkit.settings import TraceSettings
from editkit.shown import Rows, Shown
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


@dataclass(frozen=True, eq=False, repr=False)
class Traced(Shown):
    """The trace of one prompt.

    `probability[kind]` is [tokens, blocks]: P(answer) with the clean activation of that token and block put back.
    """

    axes: ClassVar[tuple[str, str]] = ONE_AXES

    tokens: list[str]
    subject: tuple[int, int]  # its first and last token
    answer: str  # the clean model's next token
    clean: float  # P(answer)
    corrupted: float
    window: int  # number of blocks whose MLP or attention outputs are put back together
    probability: dict[str, Tensor]
    others: tuple[str, ...] = ()  # the subjects put in this one's place, if corruption="swap"
    how: dict[str, Any] = field(default_factory=dict)  # prompt, model, settings with the σ that was used, seed

    def shown(self) -> tuple[str, Rows]:
        """The prompt, its answer, and of each kind the place with the largest effect."""
        rows = [("prompt", "".join(self.starred)), ("answer", self.answer)]
        rows.append(("P(answer)", f"{self.clean:.4f}, {self.corrupted:.4f} with the subject corrupted"))
        for kind, table in self.probability.items():
            token, block = divmod(int(table.argmax()), table.shape[1])
            where = f"token {token} ({self.starred[token].strip()}), block {block}"
            rows.append((kind, f"{table.max().item():.4f} with {where} put back"))
        return "Trace of a prompt", rows

    @property
    def total_effect(self) -> float:
        """The decrease of P(answer) by the corruption."""
        return self.clean - self.corrupted

    def indirect_effect(self, kind: str) -> Tensor:
        """[tokens, blocks]: the increase of P(answer) over the corrupted run."""
        return self.probability[kind] - self.corrupted

    @property
    def starred(self) -> list[str]:
        """The tokens, with a star after those of the subject."""
        first, last = self.subject
        return [token + "*" * (first <= i <= last) for i, token in enumerate(self.tokens)]

    @property
    def parts(self) -> dict[str, list[int]]:
        """{part: positions of its tokens}, for each of PARTS."""
        return parts_of(len(self.tokens), self.subject)

    def to_frame(self) -> "DataFrame":
        """A row for each kind, token and block: kind, position, token, block, probability, indirect_effect."""
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
        about = {name: getattr(self, name) for name in ONE_FIELDS}
        axes = {"axes": self.axes, "along": {"token": self.tokens, "block": list(range(self._blocks))}}
        return write_arrays(Path(path), self.probability, axes | about)

    @classmethod
    def load(cls, path: str | Path) -> "Traced":
        """What `save` wrote. Raises EditkitError for files that are not there or not a trace's."""
        read, about = read_arrays(Path(path), cls.axes, ONE_FIELDS)
        arrays = {name: torch.from_numpy(array) for name, array in read.items()}
        fields: dict[str, Any] = {name: about[name] for name in ONE_FIELDS}
        fields |= {name: tuple(about[name]) for name in ("subject", "others")}  # JSON has lists
        return cls(probability=arrays, **fields)

    @property
    def _blocks(self) -> int:
        return next(iter(self.probability.values())).shape[1]


def parts_of(tokens: int, subject: tuple[int, int]) -> dict[str, list[int]]:
    """{part: positions of its tokens} in a prompt, for each of PARTS.

    As in the paper's code, the token of a one-token subject is both its first and its last; a single token after the
    subject is both the first subsequent and the last. With no token after it, the parts after the subject are empty.

    `tokens`: the number in the prompt. `subject`: positions of its first and last token.
    """
    first, last = subject
    after, end = last + 1, tokens - 1
    positions = [[first], [*range(first + 1, last)], [last], [after], [*range(after + 1, end)], [end]]
    return dict(zip(PARTS, positions if after <= end else [*positions[:3], [], [], []], strict=True))


@in_eval_mode
def trace(
    lm: LanguageModel,
    fact: Fact,
    settings: TraceSettings | None = None,
    *,
    others: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Traced:
    """The causal trace of the fact's prompt (Meng et al. 2022, section 2).

    The answer is the clean model's next token; the fact's targets are not used. The model is not changed.

    - `fact`: its prompt and subject. `settings`: see TraceSettings.
    - `others`: for corruption="swap", subjects to choose from. A subject fits if it has as many tokens in the prompt,
      so that each clean activation has its place, and another answer; `settings.samples` of those are drawn.
    - `seed`: of the noise. `progress`: show a bar on work of more than a second.

    Raises FactError when no token covers the subject, or no other subject fits.
    """
    # 1) where the subject is
    settings = settings or TraceSettings()
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    window = settings.window_of(lm.layers)
    # 2) corrupted embeddings [samples, tokens of the subject, d_embedding]
    taken: tuple[str, ...] = ()
    with torch.no_grad(), widened(lm):
        if settings.corruption == "swap":
            taken, subject = swapped(lm, fact, (first, last), others, settings, seed)
        else:
            settings = replace(settings, sigma=settings.sigma or embedding_std(lm))
            assert settings.sigma is not None
            subject = noised(lm, rows.ids[0, first : last + 1], settings, settings.sigma, seed)
        # 3) a clean and a corrupted run
        model = started(lm, fact.text, first, subject, settings.engine)
        # 4) put one clean activation back at a time; before the subject nothing changes
        shape = rows.last(0) + 1, lm.layers
        scores = {kind: torch.full(shape, model.corrupted, dtype=torch.float64) for kind in settings.kinds}
        total = len(settings.kinds) * (shape[0] - first)
        with Bar(total=total, desc=f"trace of {fact.subject}", disable=not progress, leave=False, delay=1) as bar:
            for kind, table in scores.items():
                places = places_of(kind, lm.layers, window)
                for token in range(first, shape[0]):
                    table[token] = torch.tensor(model.at(token, places), dtype=torch.float64)
                    bar.update()
    return Traced(
        tokens=[fact.text[begin:end] for begin, end in rows.offsets[0]],
        subject=(first, last),
        answer=str(lm.tokenizer.decode([model.answer])),
        clean=model.clean,
        corrupted=model.corrupted,
        window=window,
        probability=scores,
        others=taken,
        how={"prompt": fact.prompt, "subject": fact.subject, "model": lm.name, "seed": seed} | json_of(settings),
    )
