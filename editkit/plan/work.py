"""What a run does, step by step: how many operations, how long, and how much memory beside the weights.

Counted from shapes, settings and the real tokens of the facts. Steps that end when they are done (a value's loss falls
under its stop) count as if they went on to their limit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from editkit.data.cases import Case
from editkit.facts import Fact
from editkit.methods.shared.engine import FactRows, bytes_of, rows_of
from editkit.methods.shared.value import CPU_BYTES
from editkit.metrics.measure import probes_asked
from editkit.models.load import LanguageModel
from editkit.models.tokens import spaced, token_counts
from editkit.moments.amount import keys_wanted
from editkit.moments.collect import BATCH, PANELS
from editkit.moments.moment import KEPT
from editkit.plan.gradients import curvatures, one_backward_pass, statistics
from editkit.plan.sizes import Sizes
from editkit.plan.speed import Speed
from editkit.plan.step import Step, together
from editkit.settings import (
    AttributionSettings,
    ContextSettings,
    CurvatureSettings,
    MeasureSettings,
    MethodSettings,
    MomentSettings,
    OnePassSettings,
    SpreadSettings,
    TuningSettings,
    ValueSettings,
)

EFFICIENCY = 0.5  # of a large product's rate that the products of a few rows reach (experiments/cost: .48 to .67)
LANCZOS_AND_SOLVES = 100  # products of a vector with a factor: its condition, and the solves of a few facts


@dataclass(frozen=True)
class Counter:
    """Counts the steps of runs of one model on one device."""

    lm: LanguageModel  # its modules and tokenizer; values are not read
    sizes: Sizes
    speed: Speed
    device: torch.device

    # --- the model ------------------------------------------------------------------------------------------------

    def digests(self, count: int = 1) -> Step:
        """So many digests of all weights."""
        step = Step("digests of all weights", seconds=self.sizes.weights / self.speed.digest)
        return step.times(count)

    def passes(
        self, name: str, count: float, tokens: float, *, first: int = 0, backward: bool = False, logits: float = 0
    ) -> Step:
        """So many passes.

        - `tokens`: of each pass, in all rows. `first`: the first block that runs.
        - `backward`: whether a gradient goes back through all of it, but to no weight.
        - `logits`: places of each pass whose logits are computed.
        """
        sizes, speed = self.sizes, self.speed
        sides, itemsize = 1 + backward, sizes.runs_in.itemsize
        operations = sides * (tokens * sizes.token(first, head=False) + logits * sizes.head)
        # Of a mixture a pass of many tokens reads all experts.
        read = sides * sizes.weights * itemsize / sizes.dtype.itemsize * (len(sizes.blocks) - first) / len(sizes.blocks)
        each = max(operations / (EFFICIENCY * speed.operations), read / speed.bandwidth)
        widest = max(down.d_ff for down in sizes.down)
        memory = tokens * (4 * widest + 8 * sizes.d_model) * itemsize + logits * sizes.vocabulary * (itemsize + 8)
        return Step(name, count * operations, count * each, device=memory)

    # --- second moments -------------------------------------------------------------------------------------------

    def moments(self, layers: Sequence[int], settings: MomentSettings) -> Step:
        """One collection for all of `layers`."""
        if not settings.enabled or not layers:
            return Step("second moments", note="the identity")
        downs, keys = [self.sizes.down[layer] for layer in layers], settings.tokens or keys_wanted(self.lm)
        last = sum(self.sizes.blocks[: max(layers) + 1]) / sum(self.sizes.blocks)
        run = self.passes("", last * keys / BATCH, BATCH)
        share = (PANELS + 1) / (2 * PANELS)  # of the square: the panels of the lower triangle
        sums = keys * sum(2 * share * down.d_ff**2 for down in downs)  # an expert has its share of the tokens
        largest = max(down.moment for down in downs)
        taken = BATCH * sum(down.d_ff for down in downs) * self.sizes.runs_in.itemsize
        wide = BATCH * max(down.d_ff for down in downs) * 8
        held = sum(down.moment for down in downs)
        return Step(
            "second moments",
            run.operations + sums,
            run.seconds + sums / self.speed.float64,
            device=run.device + taken + wide,
            host=held + 2 * largest / PANELS,  # C is made in their memory
            note=f"{keys:,.0f} keys, unless the cache has them",
        )

    # --- edits ----------------------------------------------------------------------------------------------------

    def edit(self, facts: Sequence[Fact], settings: MethodSettings, moments: MomentSettings) -> list[Step]:
        """One edit of `facts`; `settings` resolved for the model."""
        if isinstance(settings, ValueSettings):
            return self._value_edit(facts, settings, moments)
        if isinstance(settings, TuningSettings):
            return [self._tuning(facts, settings), self._write(settings.blocks)]
        if isinstance(settings, OnePassSettings):
            return [one_backward_pass(self, facts, settings), self._write(())]
        if isinstance(settings, AttributionSettings):
            return [self._attribution(facts, settings), self._write(self._looked_at(settings))]
        return [
            Step(f"{type(settings).__name__}", note="not counted: a method that plans do not know"),
            self._write(()),
        ]

    def contexts(self, settings: MethodSettings) -> Step:
        """The samples that stand in front of prompts, one token after the other."""
        if not isinstance(settings, ValueSettings | AttributionSettings):
            return Step("contexts")
        lengths, counts = settings.contexts.lengths, settings.contexts.counts
        tokens = len(settings.contexts.starts) * sum(a * b for a, b in zip(lengths, counts, strict=True))
        return self.passes("contexts", tokens, 1, logits=1)

    def of_base(self, settings: MethodSettings) -> list[Step]:
        """What a method reads of running text on the unedited model, once for all edits."""
        if isinstance(settings, CurvatureSettings):
            return [curvatures(self, settings)]
        return [statistics(self, settings)] if isinstance(settings, OnePassSettings) else []

    def _value_edit(self, facts: Sequence[Fact], settings: ValueSettings, moments: MomentSettings) -> list[Step]:
        layers = settings.blocks
        first, sizes = max(layers), self.sizes
        templates = _templates(settings.contexts)
        jobs = [rows_of(self.lm, fact, settings.fact_token, templates) for fact in facts]
        # 1) The factors of C, which are kept for the time of the values unless they are large.
        factors = self._factors(layers, settings, moments)
        # 2) The values, in batches.
        room = torch.cuda.mem_get_info(self.device)[0] / 2 if self.device.type == "cuda" else CPU_BYTES
        each = max(bytes_of(self.lm, [job], first) for job in jobs)
        size = max(1, min(len(jobs), int(room // each)))
        batches, largest = -(-len(jobs) // size), max(jobs, key=lambda job: job.columns)
        tokens = size * len(largest.lookup) * largest.columns
        assert settings.steps is not None  # resolved
        # A long answer in windows: a value for each, over all tokens up to its window's end.
        windows = -(-_longest(jobs) // window) if (window := getattr(settings, "window", None)) else 1
        evaluations = settings.steps * batches * windows
        steps = self.passes(
            "",
            evaluations,
            tokens * (windows + 1) / (2 * windows),
            first=first,
            backward=True,
            logits=size * _logits(largest) / windows,
        )
        prefix = sum(len(offsets) for offsets in largest.scored.rows.offsets)
        clean = self.passes("", batches, size * prefix)
        values = replace(
            together("values", [steps, clean]),
            device=max(size * each, clean.device) + factors.device,
            host=factors.host,
            note=f"{len(facts)} facts, at most {settings.steps * windows} evaluations each",
        )
        # 3) Keys and what is missing at each block.
        several = isinstance(settings, SpreadSettings)
        rows = sum(len(job.lookup) * (job.columns + max(job.lookup)) for job in jobs)
        keys = self.passes("keys", (1 + len(layers)) if several else 0, rows / len(layers))
        solve = together("solves", [factors, keys])
        return [self.digests(), solve, values, self._write(layers)] if sizes.down else []

    def _factors(self, layers: Sequence[int], settings: MethodSettings, moments: MomentSettings) -> Step:
        """C of each layer made ready to solve with: one at a time where it is large, all of them where not."""
        if not moments.enabled:
            return Step("solves")
        downs = [self.sizes.down[layer] for layer in layers]
        large = any(8 * down.d_ff**2 > KEPT for down in downs)
        cubes = sum(down.d_ff**3 for down in downs)
        squares = sum(down.d_ff**2 for down in downs)
        one = max(8 * down.d_ff**2 for down in downs)
        # AlphaEdit takes all eigenvectors, and solves in the space of those with little energy.
        eigen = hasattr(settings, "threshold") and getattr(settings, "solve", "alphaedit") == "alphaedit"
        operations = (12.0 if eigen else 1 / 3) * cubes + 2 * LANCZOS_AND_SOLVES * squares
        read = 0 if large else sum(down.moment for down in downs)  # larger files are mapped
        held = (3 if eigen else 1) * (one if large else sum(8 * down.d_ff**2 for down in downs))
        return Step("solves", operations, operations / self.speed.float64, host=read + held + one)

    def _tuning(self, facts: Sequence[Fact], settings: TuningSettings) -> Step:
        """Descent on weights: a gradient goes to them too."""
        first = min(settings.blocks, default=0)
        lengths = [sum(token_counts(self.lm, [f.text + spaced(f.target_new)])) for f in facts]
        size = min(len(facts), settings.batch)
        tokens = size * max(lengths)
        steps = self.passes("", settings.steps * -(-len(facts) // size), tokens, backward=True, logits=tokens)
        layers = settings.blocks or range(len(self.sizes.blocks))
        trained = sum(self.sizes.down[layer].numbers for layer in layers)
        kept = tokens * len(self.sizes.blocks[first:]) * 24 * self.sizes.d_model * self.sizes.runs_in.itemsize
        memory = steps.device + kept + 4 * 4 * trained  # ΔW, its gradient, Adam's two moments
        note = f"{len(facts)} facts, at most {settings.steps} passes"
        return replace(steps, name="descent", device=memory, note=note)

    def _attribution(self, facts: Sequence[Fact], settings: AttributionSettings) -> Step:
        """One replay of the prompts of each fact, and then one token from each block on: forward and backward."""
        templates, layers = _templates(settings.contexts), self._looked_at(settings)
        prompts = [fact.filled(each.replace("{}", fact.prompt)) for fact in facts for each in templates]
        clean = self.passes("", len(facts), sum(token_counts(self.lm, prompts)) / len(facts))
        rows = settings.steps * len(templates)
        runs = [self.passes("", len(facts), rows, first=layer, backward=True, logits=rows) for layer in layers]
        # W w̄ and Wᵀ ∂P/∂m of all prompts, in float64 on the CPU.
        sizes = [self.sizes.down[layer].numbers for layer in layers]
        products = 4.0 * len(prompts) * sum(sizes)
        weights = Step("", products, products / self.speed.float64, host=8 * max(sizes))
        note = f"{len(facts)} facts, {len(templates)} prompts each, {settings.steps} points in {len(layers)} blocks"
        return replace(together("attribution", [clean, *runs, weights]), note=note)

    def _looked_at(self, settings: AttributionSettings) -> Sequence[int]:
        return settings.blocks or range(len(self.sizes.blocks))

    def _write(self, layers: Sequence[int]) -> Step:
        """W + ΔW: clones of what is written, and the float32 sum of one weight."""
        downs = [self.sizes.down[layer] for layer in layers]
        clones = sum(down.numbers for down in downs) * self.sizes.dtype.itemsize
        sums = 3 * 4 * max((down.numbers // down.experts for down in downs), default=0)
        return Step("write and restore", seconds=2 * clones / self.speed.bandwidth, device=clones + sums)

    # --- questions ------------------------------------------------------------------------------------------------

    def look(self, case: Case, settings: MeasureSettings) -> Step:
        """Everything that is asked about a case, once."""
        probes = probes_asked(case, settings)
        prompts = [probe.prompt for probe in probes]
        lengths = token_counts(self.lm, prompts) or [1]
        rows = 2 * len(lengths)
        asked = self.passes("", 1, rows * (sum(lengths) / len(lengths) + 2), logits=2 * rows)
        answers = [text for probe in probes for text in (probe.target_new, probe.target_true) if text]
        longest = max(token_counts(self.lm, [spaced(text) for text in answers]), default=1)
        least = longest + settings.generate if settings.generate else 0
        most = settings.natural if least else 0
        texts = [spaced(probe.target_new) for probe in case.probes if probe.long and least]
        long = max((count + settings.generate for count in token_counts(self.lm, texts)), default=0)
        free = [max(least, most)] if settings.form == "bare" else [least, max(most, long)]
        said = self.passes("", sum(free), len(lengths), logits=len(lengths))
        count = len(case.generation) if settings.fluency else 0
        sampled = self.passes("", settings.fluency if count else 0, count, logits=count)
        return together("questions", [asked, said, sampled])

    def trace(self, fact: Fact, kinds: int, samples: int) -> Step:
        """Every token and block put back, each in `samples` corrupted runs: half the blocks and tokens on average."""
        (tokens,) = token_counts(self.lm, [fact.text])
        places = kinds * tokens * len(self.sizes.blocks)
        rows = 1 + samples
        whole = self.passes("", places / 4, rows * tokens, logits=rows)
        return replace(whole, name="trace", note=f"{places:,} places")


def _longest(jobs: Sequence[FactRows]) -> int:
    """Tokens of the longest target."""
    return max(len(job.scored.positions[0]) for job in jobs)


def _logits(rows: FactRows) -> int:
    return sum(map(len, rows.scored.positions)) + 1


def _templates(settings: ContextSettings) -> list[str]:
    """Texts as long as the contexts will be."""

    def each() -> Iterator[str]:
        yield "{}"
        for length, count in zip(settings.lengths, settings.counts, strict=True):
            for start in settings.starts:
                for _ in range(count):
                    yield f"{start}{' and' * length}. {{}}"

    return list(each())
