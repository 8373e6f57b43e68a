"""The average trace of many facts, by kind of token, and the blocks that it proposes to edit."""

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from editkit.errors import EditkitError, FactError
from editkit.facts import Fact
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.tokens import encode_with_targets, spaced
from editkit.progress import Bar
from editkit.settings import TraceSettings
from editkit.shown import Rows, Shown
from editkit.tracing.corruption import embedding_std
from editkit.tracing.files import AVERAGE_AXES, AVERAGE_FIELDS, json_of, read_arrays, write_arrays
from editkit.tracing.prompt import PARTS, Traced, trace

if TYPE_CHECKING:
    from pandas import DataFrame

RESAMPLES = 2000  # bootstrap samples of the facts, for the 95 % intervals
Skipped = tuple[str, str]  # the text, and the reason


@dataclass(frozen=True, eq=False, repr=False)
class AverageTrace(Shown):
    """Indirect effects of many facts, by kind of token (PARTS) and block.

    `effect[kind]` is [facts, parts, blocks]: the mean over a prompt's tokens of that kind, NaN where it has none.
    Averages are over facts.
    """

    axes: ClassVar[tuple[str, str, str]] = AVERAGE_AXES

    texts: tuple[str, ...]  # of the facts that were traced
    clean: Tensor  # [facts], P(answer)
    corrupted: Tensor  # [facts]
    effect: dict[str, Tensor]
    window: int
    skipped: tuple[Skipped, ...] = ()
    complete: bool = True  # False if the run was interrupted
    how: dict[str, Any] = field(default_factory=dict)  # model, settings with the σ that was used, seed

    def shown(self) -> tuple[str, Rows]:
        """How many facts, and of each kind the part and block with the largest effect."""
        left = "" if self.complete else ", interrupted"
        rows = [("facts", f"{len(self.texts):,} traced, {len(self.skipped):,} skipped{left}")]
        rows.append(("total effect", f"{self.total_effect:.4f}"))
        for kind in self.effect:
            mean = self.mean(kind).nan_to_num(-1.0)
            part, block = divmod(int(mean.argmax()), self.layers)
            rows.append((kind, f"largest {mean.max().item():.4f} at {PARTS[part]}, block {block}"))
        return "Average trace", rows

    @property
    def total_effect(self) -> float:
        """Mean decrease of P(answer) by the corruption (the paper's ATE)."""
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
        """The ends of the 95 % bootstrap interval of the mean over facts, each [parts, blocks]."""
        means = self.resampled(kind)
        low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype), 0)
        return low, high

    def resampled(self, kind: str) -> Tensor:
        """[resamples, parts, blocks]: the mean over each bootstrap sample of the facts, the same for each kind."""
        effect, weights = self.effect[kind], self._weights
        has = (~effect.isnan()).double()
        total = torch.einsum("rf,fpb->rpb", weights, effect.nan_to_num())
        return total / torch.einsum("rf,fpb->rpb", weights, has)  # 0 / 0: no fact with such a token was drawn

    @cached_property
    def _weights(self) -> Tensor:
        """[resamples, facts]: how often each fact is in each bootstrap sample."""
        n = len(self.texts)
        drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
        weights = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    def to_frame(self) -> "DataFrame":
        """A row for each mean: kind, part, block, effect (AIE), low, high, facts."""
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
        about = {name: getattr(self, name) for name in AVERAGE_FIELDS} | {"axes": self.axes, "along": along}
        # For readers without torch, who could not draw the same samples of the facts; NaN as null.
        bounds = {
            kind: dict(zip(("low", "high"), map(_listed, self.interval(kind)), strict=True)) for kind in self.effect
        }
        about["intervals"] = bounds
        return write_arrays(Path(path), self.effect | {"clean": self.clean, "corrupted": self.corrupted}, about)

    @classmethod
    def load(cls, path: str | Path) -> "AverageTrace":
        """What `save` wrote. Raises EditkitError for files that are not there or not an average trace's."""
        read, about = read_arrays(Path(path), cls.axes, AVERAGE_FIELDS)
        arrays = {name: torch.from_numpy(array) for name, array in read.items()}
        kept: dict[str, Any] = {name: about[name] for name in AVERAGE_FIELDS}
        kept["skipped"] = tuple((text, why) for text, why in kept["skipped"])
        clean, corrupted = arrays.pop("clean"), arrays.pop("corrupted")
        return cls(tuple(about["along"]["fact"]), clean, corrupted, arrays, **kept)


def _listed(table: Tensor) -> list[list[float | None]]:
    return [[value if value == value else None for value in row] for row in table.tolist()]


@dataclass(frozen=True, eq=False)
class TracedFact:
    """One fact of an average trace; `skipped` is the reason if it is not part of the average."""

    text: str
    skipped: str = ""
    clean: float = float("nan")
    corrupted: float = float("nan")
    window: int = 0
    effect: dict[str, Tensor] = field(default_factory=dict)  # [parts, blocks], NaN where a prompt has no such token

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON; a part that the prompt lacks is null."""
        if self.skipped:
            return {"text": self.text, "skipped": self.skipped}
        values = {kind: [None if row.isnan().any() else row.tolist() for row in e] for kind, e in self.effect.items()}
        return (
            {"text": self.text} | {n: getattr(self, n) for n in ("clean", "corrupted", "window")} | {"effect": values}
        )

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "TracedFact":
        """What `to_json` gave, bit for bit."""
        if "skipped" in line:
            return cls(line["text"], line["skipped"])
        effect = {}
        for kind, rows in line["effect"].items():
            blocks = len(next(row for row in rows if row is not None))
            filled = [[float("nan")] * blocks if row is None else row for row in rows]
            effect[kind] = torch.tensor(filled, dtype=torch.float64)
        return cls(line["text"], "", line["clean"], line["corrupted"], line["window"], effect)


def with_sigma(lm: LanguageModel, facts: Sequence[Fact], settings: TraceSettings) -> TraceSettings:
    """If the settings have no σ, use that of the embeddings of the facts' subjects, as in the paper."""
    subjects = list(dict.fromkeys(fact.subject for fact in facts))
    if settings.sigma is None and settings.corruption == "noise" and subjects:
        return replace(settings, sigma=embedding_std(lm, subjects))
    return settings


def trace_each(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings,
    *,
    others: Sequence[str] | None = None,
    seed: int = 0,
    done: Collection[int] = (),
    progress: bool = True,
) -> Iterator[tuple[int, TracedFact]]:
    """Trace facts one by one; yields (number, result), in order.

    - `facts`: those that the model does not know, and those that cannot be traced, give a result with `skipped`.
    - `settings`: with σ, see `with_sigma`.
    - `others`: for corruption="swap", subjects to choose from; if None, those of all `facts`.
    - `seed`: fact number i is corrupted with the seed `seed` + i, whichever facts are done before.
    - `done`: numbers to leave out. `progress`: show a bar.
    """
    others = list(dict.fromkeys(fact.subject for fact in facts)) if others is None else others
    count = 0
    with Bar(
        total=len(facts), initial=len(done), desc="average trace", unit="fact", disable=not progress, delay=1
    ) as bar:
        for number, fact in enumerate(facts):
            if number in done:
                continue
            result = _traced_fact(lm, fact, settings, others, seed + number)
            count += not result.skipped
            yield number, result
            bar.set_postfix(traced=count, refresh=False)
            bar.update()


@in_eval_mode
def _traced_fact(
    lm: LanguageModel, fact: Fact, settings: TraceSettings, others: Sequence[str], seed: int
) -> TracedFact:
    """One fact for an average. The arguments are those of `trace_each`; `seed` is the fact's own."""
    try:
        if fact.target_true and not knows(lm, fact):
            return TracedFact(fact.text, "the model does not know it")
        one = trace(lm, fact, settings, others=others, seed=seed, progress=False)
    except FactError as error:
        return TracedFact(fact.text, str(error))
    effect = {kind: _by_part(one, kind) for kind in settings.kinds}
    return TracedFact(fact.text, "", one.clean, one.corrupted, one.window, effect)


def average_of(
    lm: LanguageModel, results: Sequence[TracedFact], settings: TraceSettings, *, seed: int = 0, complete: bool = True
) -> AverageTrace:
    """The average over the results of `trace_each`.

    - `results`: in any number, at least one of them not skipped.
    - `settings`, `seed`: those that `trace_each` was given. `complete`: False if it was interrupted.

    Raises EditkitError when no fact could be traced.
    """
    done = [each for each in results if not each.skipped]
    skipped = tuple((each.text, each.skipped) for each in results if each.skipped)
    if not done:
        reasons = "; ".join(dict.fromkeys(why for _, why in skipped)) or "none was given"
        raise EditkitError(
            f"None of {len(results)} facts could be traced: {reasons}. Give facts that '{lm.name}' knows."
        )
    return AverageTrace(
        texts=tuple(each.text for each in done),
        clean=torch.tensor([each.clean for each in done], dtype=torch.float64),
        corrupted=torch.tensor([each.corrupted for each in done], dtype=torch.float64),
        effect={kind: torch.stack([each.effect[kind] for each in done]) for kind in settings.kinds},
        window=done[0].window,
        skipped=skipped,
        complete=complete,
        how={"model": lm.name, "seed": seed} | json_of(settings),
    )


@in_eval_mode
def average_trace(
    lm: LanguageModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    others: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> AverageTrace:
    """The average trace of the facts that the model knows, each with its own noise (Meng et al. 2022, section 2).

    A fact is known if greedy decoding gives all tokens of `target_true`; a fact without `target_true` is not checked.
    Facts that are not known or cannot be traced are in `skipped`, with the reason. Ctrl-C ends the trace early: the
    average is then over the facts traced so far, with `complete=False`.

    - `facts`: one or more. `settings`: see TraceSettings; without a σ it is that of the facts' subjects' embeddings.
    - `others`: for corruption="swap", subjects to choose from; if None, those of the other facts.
    - `seed`: of the noise. `progress`: show a bar.

    Raises EditkitError when no fact is left.
    """
    settings = with_sigma(lm, facts, settings or TraceSettings())
    results: list[TracedFact] = []
    complete = True
    try:
        for _, each in trace_each(lm, facts, settings, others=others, seed=seed, progress=progress):
            results.append(each)
    except KeyboardInterrupt:
        traced = sum(not each.skipped for each in results)
        if not traced:
            raise
        complete = False
        warnings.warn(f"interrupted: the average is over the {traced} facts traced so far", stacklevel=2)
    return average_of(lm, results, settings, seed=seed, complete=complete)


def _by_part(traced: Traced, kind: str) -> Tensor:
    """[parts, blocks]: the mean over the tokens of each part, NaN where there is none."""
    effect = traced.indirect_effect(kind)
    none = torch.full_like(effect[0], float("nan"))  # a mean over no tokens would be a NaN of other bits
    return torch.stack([effect[tokens].mean(0) if tokens else none for tokens in traced.parts.values()])


@in_eval_mode
@torch.inference_mode()
def knows(lm: LanguageModel, fact: Fact) -> bool:
    """Whether greedy decoding gives all tokens of target_true after the fact's prompt."""
    scored = encode_with_targets(lm, [fact.text], [spaced(fact.target_true)])
    row, at, token = scored.pick()
    logits = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at]
    return bool((logits.argmax(-1) == token).all())
