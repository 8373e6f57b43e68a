"""The average trace of many facts, by kind of token, and the blocks that it proposes to edit."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from editkit.errors import EditkitError, FactError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.tokens import continued, spaced
from editkit.settings import TraceSettings
from editkit.tracing.corruption import embedding_std
from editkit.tracing.files import json_of, read_arrays, write_arrays
from editkit.tracing.prompt import PARTS, Traced, trace

if TYPE_CHECKING:
    from pandas import DataFrame

RESAMPLES = 2000  # of the facts, for the 95 % intervals
Skipped = tuple[str, str]  # the text, and why


@dataclass(frozen=True, eq=False)
class AverageTrace:
    """Indirect effects of many facts. `effect[kind]`: [facts, parts, blocks]; NaN where a prompt has no such token.

    A fact has one value for each of PARTS: the mean over its tokens of that part. Averages are over facts.
    """

    axes: ClassVar[tuple[str, str, str]] = ("fact", "part", "block")

    texts: tuple[str, ...]  # of the facts that were traced
    clean: Tensor  # [facts], P(answer)
    corrupted: Tensor  # [facts]
    effect: dict[str, Tensor]
    window: int
    skipped: tuple[Skipped, ...] = ()
    complete: bool = True  # False when it was interrupted
    how: dict[str, Any] = field(default_factory=dict)  # model, settings with the σ that was used, seed

    @property
    def total_effect(self) -> float:
        """Mean of P(answer) that the corruption takes (the paper's ATE)."""
        return (self.clean - self.corrupted).mean().item()

    @property
    def layers(self) -> int:
        return next(iter(self.effect.values())).shape[2]

    def mean(self, kind: str) -> Tensor:
        """[parts, blocks]: the average indirect effect (AIE)."""
        return self.effect[kind].nanmean(0)

    def count(self, kind: str) -> Tensor:
        """[parts]: how many facts have such a token."""
        return (~self.effect[kind][:, :, 0].isnan()).sum(0)

    def interval(self, kind: str) -> tuple[Tensor, Tensor]:
        """The bounds of the 95 % bootstrap interval of the mean over facts, each [parts, blocks]."""
        means = self.resampled(kind)
        low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype), 0)
        return low, high

    def resampled(self, kind: str) -> Tensor:
        """[resamples, parts, blocks]: the mean over each bootstrap sample of the facts, the same for every kind."""
        effect, weights = self.effect[kind], self._weights
        held = (~effect.isnan()).double()
        total = torch.einsum("rf,fpb->rpb", weights, effect.nan_to_num())
        return total / torch.einsum("rf,fpb->rpb", weights, held)  # 0 / 0: no fact with such a token was drawn

    @cached_property
    def _weights(self) -> Tensor:
        """[resamples, facts]: how often each fact is in each bootstrap sample."""
        n = len(self.texts)
        drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
        weights = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def to_frame(self) -> "DataFrame":
        """A row a mean: kind, part, block, effect (AIE), low, high, facts."""
        from pandas import DataFrame

        rows = []
        for kind in self.effect:
            mean, count, (low, high) = self.mean(kind), self.count(kind), self.interval(kind)
            for p, part in enumerate(PARTS):
                for b in range(self.layers):
                    bounds = [table[p, b].item() for table in (mean, low, high)]
                    rows.append((kind, part, b, *bounds, int(count[p])))
        return DataFrame(rows, columns=["kind", "part", "block", "effect", "low", "high", "facts"])

    def save(self, path: str | Path) -> Path:
        """Write PATH.npz (the arrays) and PATH.json (axes, names along them, everything else)."""
        along = {"fact": self.texts, "part": PARTS, "block": list(range(self.layers))}
        said = {name: getattr(self, name) for name in _SAID} | {"axes": self.axes, "along": along}
        # For readers without torch, who could not draw the same samples of the facts; NaN as null.
        bounds = {
            kind: dict(zip(("low", "high"), map(_listed, self.interval(kind)), strict=True)) for kind in self.effect
        }
        said["intervals"] = bounds
        return write_arrays(Path(path), self.effect | {"clean": self.clean, "corrupted": self.corrupted}, said)

    @classmethod
    def load(cls, path: str | Path) -> "AverageTrace":
        """What `save` wrote. Raises EditkitError for files that are not there or not an average trace's."""
        arrays, said = read_arrays(Path(path), cls.axes)
        kept: dict[str, Any] = {name: said[name] for name in _SAID}
        kept["skipped"] = tuple((text, why) for text, why in kept["skipped"])
        clean, corrupted = arrays.pop("clean"), arrays.pop("corrupted")
        return cls(tuple(said["along"]["fact"]), clean, corrupted, arrays, **kept)


_SAID = ("window", "skipped", "complete", "how")


def _listed(table: Tensor) -> list[list[float | None]]:
    return [[value if value == value else None for value in row] for row in table.tolist()]


def average_trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    others: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AverageTrace:
    """The average trace of facts that the model knows, each traced with its own noise.

    - A fact is known when the model says the whole `target_true` by greedy decoding; one without a target_true is
      traced as it is. Those not known, and those that cannot be traced, are in `skipped` with the reason.
    - `settings.sigma=None`: one standard deviation is that of the embeddings of the facts' subjects, as the paper's.
    - `others`: with corruption="swap", subjects to take from; None: those of the other facts.
    - Ctrl-C ends it with what is done, `complete=False`, once there is one fact.

    Raises EditkitError when no fact is left.
    """
    settings = settings or TraceSettings()
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    if settings.sigma is None and settings.corruption == "noise" and subjects:
        settings = replace(settings, sigma=embedding_std(lm, subjects))
    others = subjects if others is None else others
    done: list[Traced] = []
    texts: list[str] = []
    skipped: list[Skipped] = []
    complete = True
    with tqdm(facts, desc="average trace", unit="fact", disable=not progress, delay=1) as bar:
        try:
            for number, fact in enumerate(bar):
                bar.set_postfix(known=len(done), skipped=len(skipped), refresh=False)
                try:
                    if fact.target_true and not knows(lm, fact):
                        skipped.append((fact.text, "the model does not know it"))
                        continue
                    done.append(trace(lm, fact, settings, others=others, seed=seed + number, progress=False))
                    texts.append(fact.text)
                except FactError as error:
                    skipped.append((fact.text, str(error)))
        except KeyboardInterrupt:
            if not done:
                raise
            complete = False
            warnings.warn(f"interrupted: the average is over the {len(done)} facts traced so far", stacklevel=2)
    if not done:
        reasons = "; ".join(dict.fromkeys(why for _, why in skipped)) or "none was given"
        raise EditkitError(f"None of {len(facts)} facts could be traced: {reasons}. Give facts that '{lm.name}' knows.")
    return AverageTrace(
        texts=tuple(texts),
        clean=torch.tensor([found.clean for found in done], dtype=torch.float64),
        corrupted=torch.tensor([found.corrupted for found in done], dtype=torch.float64),
        effect={kind: torch.stack([_by_part(found, kind) for found in done]) for kind in settings.kinds},
        window=done[0].window,
        skipped=tuple(skipped),
        complete=complete,
        how={"model": lm.name, "seed": seed} | json_of(settings),
    )


def _by_part(found: Traced, kind: str) -> Tensor:
    """[parts, blocks]: the mean over the tokens of each part, NaN where there is none."""
    effect = found.indirect_effect(kind)
    return torch.stack([effect[tokens].mean(0) for tokens in found.parts.values()])


@torch.inference_mode()
def knows(lm: LanguageModel, fact: Fact) -> bool:
    """Whether greedy decoding says the whole target_true after the fact's prompt."""
    scored = continued(lm, [fact.text], [spaced(fact.target_true)])
    row, at, token = scored.pick()
    logits = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at]
    return bool((logits.argmax(-1) == token).all())
