"""Which inner units of MLPs an answer is due to: integrated gradients (Dai et al. 2022, arXiv 2104.08696, section 3).

A block's MLP gives m = W w̄ + rest at the prompt's last token, with w̄ [D] the input of its down-projection; of a mixture
of experts w̄ is κ, with the routing held fixed (models/experts.py). P(w) is the probability of the answer's token there
when the block has w in place of w̄:

    Attr(w_i) = w̄_i ∫₀¹ ∂P(α w̄)/∂w_i dα  ≈  w̄_i/M · Σ_{k=0}^{M−1} ∂P(k/M · w̄)/∂w_i

All units of the block go from 0 to w̄ together, and k begins at 0, as in the authors' code. (The paper's text moves one
unit, and k ends at M.) P depends on w by m alone, so ∂P/∂w = Wᵀ ∂P/∂m: one gradient [d_model] for each point, at a
vector −(1 − k/M) W w̄ that is added to m, gives all D units.

The answer of a causal model is told at the last token, and no earlier one reads it: a replay runs one token from block
l on, for all points and prompts at once.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editkit.methods.shared.engine import Batch, Engine, FactRows, FullDepth, Replayed
from editkit.models.architecture import as_matrix, experts_in, orientation, weight_name
from editkit.models.experts import down_of, keys_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.passes import CannotReplay
from editkit.models.precision import wide, widened
from editkit.models.products import quick_products
from editkit.models.replay import Replay, replay
from editkit.models.tokens import Rows, Scored, unflatten
from editkit.nethook import Trace, get_module, requires_grad
from editkit.progress import Bar

ROWS = 256  # points × prompts of a run, about


@dataclass(frozen=True)
class Units:
    """The inner units of one block, at one token of each of P prompts, in float64 on the CPU."""

    values: Tensor  # w̄ [P, D]
    scores: Tensor  # Attr [P, D]


def attributed(
    lm: LanguageModel,
    layers: Sequence[int],
    rows: Rows,
    at: Sequence[int],
    tokens: Sequence[int],
    steps: int,
    *,
    engine: str = "replay",
    name: str = "",
    progress: bool = False,
) -> dict[int, Units]:
    """The attribution of each prompt's answer to the units of each of `layers`.

    - `rows`: P prompts, which may go on behind the token that is asked.
    - `at`: the position of that token in each row, and `tokens`: the answer's token that it predicts.
    - `steps`: M.
    - `engine`: "full", or "replay", which goes on at full depth with a warning where the model cannot be replayed.
    - `name`, `progress`: the label of the progress bar, and whether to show it.

    A half model on the CPU runs in float32.
    """
    with widened(lm), requires_grad(lm.model, only=[]):
        runs = _started(lm, layers, rows, at, engine)
        found = {}
        for layer in Bar(layers, desc=f"units for {name}", disable=not progress, leave=False, delay=1):
            found[layer] = _of_block(lm, layer, runs, tokens, steps)
        return found


class _Runs:
    """Prompts that are run through the whole model, with a vector added to one MLP's output at their token."""

    def __init__(self, lm: LanguageModel, layers: Sequence[int], rows: Rows, at: Sequence[int]) -> None:
        self.lm, self.rows, self.at = lm, rows, list(at)
        # A row without targets before a KL row of its own: what is read are the logits at its lookup token.
        self.jobs = [FactRows(Scored(_cut(rows, row, end), [[]]), [end], 0) for row, end in enumerate(self.at)]
        self.inputs = self._inputs([site_of(lm, layer) for layer in layers])

    @torch.no_grad()
    @quick_products()
    def _inputs(self, sites: Sequence[str]) -> dict[str, Tensor]:
        """What enters each of `sites` at the tokens, [P, d]."""
        with Trace(self.lm.model, sites, inputs=True, outputs=False, clone=True) as trace:
            self.lm.model(**self.rows.inputs(), use_cache=False)
        count = len(self.at)
        return {site: unflatten(trace[site].input, count)[torch.arange(count), self.at] for site in sites}

    def engine(self, layer: int, copies: int) -> Engine:
        """The engine of so many copies of all prompts, one after the other, with a vector for each."""
        return FullDepth(self.lm, layer, [site_of(self.lm, layer)], Batch(self.jobs * copies))


class _Replays(_Runs):
    """The same through the blocks from the MLP's own on, at one token. Raises CannotReplay."""

    _ready: Replay

    def _inputs(self, sites: Sequence[str]) -> dict[str, Tensor]:
        self._ready = replay(self.lm, self.rows, self.at, self.at, 0, sites, everything=True)
        return {site: self._ready.column0[site][0] for site in sites}

    def engine(self, layer: int, copies: int) -> Engine:
        lm, site, ready = self.lm, site_of(self.lm, layer), self._ready
        start = layer + (lm.architecture.mlp_norm is None)  # as Replayed takes it
        there = ready.after(0, start, ready.seen)
        there = replace(there, stream=ready.streams[start], column0={}).times(copies)
        return Replayed(lm, layer, [site], Batch(self.jobs * copies), there)


def _started(lm: LanguageModel, layers: Sequence[int], rows: Rows, at: Sequence[int], engine: str) -> _Runs:
    if engine == "full":
        return _Runs(lm, layers, rows, at)
    try:
        return _Replays(lm, layers, rows, at)
    except CannotReplay as error:
        warnings.warn(f"The family '{lm.architecture.family}' runs at full depth, which is slow: {error}", stacklevel=4)
        return _Runs(lm, layers, rows, at)


def _of_block(lm: LanguageModel, layer: int, runs: _Runs, tokens: Sequence[int], steps: int) -> Units:
    """The units of one block."""
    module, prompts, width = down_of(lm, layer), len(tokens), lm.model.config.get_text_config().hidden_size
    # 1) w̄ and W w̄ of each prompt.
    values = keys_of(lm, module, runs.inputs[site_of(lm, layer)]).double().cpu()  # [P, D]
    parts = list(_weight_parts(lm, module, values))
    told = torch.zeros(prompts, width, dtype=torch.float64)
    for columns, w in parts:
        told += values[:, columns] @ w.T
    # 2) The mean of ∂P/∂m over the points.
    answers = torch.tensor(tokens, device=lm.device)
    total, each = torch.zeros_like(told), max(1, ROWS // prompts)
    for begin in range(0, steps, each):
        points = torch.arange(begin, min(begin + each, steps)).double() / steps  # [copies]
        added = (-(1 - points)[:, None, None] * told).flatten(0, 1)  # [copies · P, d_model]
        engine = runs.engine(layer, len(points))
        logits = engine.logits(added[None].to(lm.device, wide(lm.dtype)))
        p = logits.to(wide(lm.dtype)).softmax(-1).gather(1, answers.repeat(len(points))[:, None])
        total += engine.gradient(p.sum())[0].double().cpu().view(len(points), prompts, -1).sum(0)
    # 3) Attr.
    scores = torch.zeros_like(values)
    for columns, w in parts:
        scores[:, columns] = values[:, columns] * (total / steps @ w)
    return Units(values, scores)


def _weight_parts(lm: LanguageModel, module: str, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """W [d_model, D] in parts: (columns, W there) in float64 on the CPU; of experts those that have `values` [P, D]."""
    holder = get_module(lm.model, module)
    experts, layout = experts_in(holder), orientation(holder, module)
    weight, width = values_of(lm.model, weight_name(module, experts)), values.shape[1] // (experts or 1)
    for number, mine in enumerate(weight if experts is not None else weight[None]):
        columns = slice(number * width, (number + 1) * width)
        if values[:, columns].any():
            yield columns, as_matrix(mine, layout).double().cpu()


def _cut(rows: Rows, row: int, end: int) -> Rows:
    """One of the rows up to token `end`."""
    ids, mask = rows.ids[row : row + 1, : end + 1], rows.mask[row : row + 1, : end + 1]
    return Rows((rows.texts[row],), ids, mask, [rows.offsets[row][: end + 1]])
