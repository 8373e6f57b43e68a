"""Inputs of modules and gradients at their outputs, token by token: what methods without a value are computed from.

The gradient is that of the *sum* of the tokens' NLL, so that a token counts as much in a large batch as in a small one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.corpora import running_text
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.likelihood import targets_after_prompts
from editkit.models.architecture import experts_in, matrix_shape, orientation, weight_name
from editkit.models.experts import down_of, keys_of
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.offload import shape_of
from editkit.models.precision import widened
from editkit.models.products import quick_products
from editkit.models.tokens import unflatten
from editkit.moments import packed_blocks
from editkit.nethook import Trace, get_module, requires_grad, select_all
from editkit.settings import MomentSettings, OnePassSettings

ROWS = 64  # of a pass over facts; of like length, so that little is padding
TEXT_ROWS = 8  # blocks of running text in a pass


class Pairs(NamedTuple):
    """Of one module, in float64 on the CPU."""

    inputs: Tensor  # h [tokens, p]; of experts their stacked key
    gradients: Tensor  # g [tokens, q]


def modules_of(lm: LanguageModel, settings: OnePassSettings) -> list[str]:
    """The modules that resolved `settings` name. Raises ModelError for a block that `lm` lacks, NameNotFound."""
    if settings.modules is not None:
        return select_all(lm.model, settings.modules)
    return [down_of(lm, lm.check_layer(layer)) for layer in settings.layers or ()]


def weight_shape(lm: LanguageModel, name: str) -> tuple[int, int]:
    """(q, p) of the weight in a module."""
    module = get_module(lm.model, name)
    return matrix_shape(shape_of(lm.model, weight_name(name, experts_in(module))), orientation(module, name))


def answer_pairs(
    lm: LanguageModel, modules: Sequence[str], facts: Sequence[Fact]
) -> tuple[dict[str, Pairs], list[float]]:
    """h and g of each module at every position whose next token is one of a target, fact after fact, and the mean NLL
    of each fact's target.

    - `modules`: names, at least one.

    Raises FactError for a target without tokens, EditkitError for a loss that is not finite.
    """
    order = sorted(range(len(facts)), key=lambda i: len(facts[i].text) + len(facts[i].target_new))
    found: dict[int, dict[str, Pairs]] = {}
    losses = [0.0] * len(facts)
    for begin in range(0, len(order), ROWS):
        part = order[begin : begin + ROWS]
        scored = targets_after_prompts(lm, [facts[i] for i in part])
        row, at, token = scored.pick()
        pairs, nll = _pairs(lm, modules, scored.rows.inputs(), row, at, token)
        counts = [len(positions) for positions in scored.positions]
        for number, (i, own) in enumerate(zip(part, nll.split(counts), strict=True)):
            losses[i] = own.mean().item()
            mine = slice(sum(counts[:number]), sum(counts[: number + 1]))
            found[i] = {name: Pairs(h[mine], g[mine]) for name, (h, g) in pairs.items()}
    joined = {
        name: Pairs(*(torch.cat([found[i][name][side] for i in range(len(facts))]) for side in (0, 1)))
        for name in modules
    }
    return joined, losses


def text_pairs(
    lm: LanguageModel, modules: Sequence[str], moments: MomentSettings, tokens: int, seed: int
) -> Iterator[dict[str, Pairs]]:
    """h and g of each module at the positions of running text, each predicting the next token; about `tokens` of them.

    - `moments`: its source, and tokens a block.
    """
    blocks = packed_blocks(lm, running_text(moments.source, seed=seed), moments.block)
    left = -(-tokens // (moments.block - 1))
    while left > 0:
        rows = [block for _, block in zip(range(min(left, TEXT_ROWS)), blocks, strict=False)]
        if not rows:
            return
        ids = torch.stack(rows).to(lm.device)
        row, at = torch.ones_like(ids[:, 1:]).nonzero().T
        yield _pairs(lm, modules, {"input_ids": ids}, row, at, ids[row, at + 1])[0]
        left -= len(rows)


@quick_products()
def _pairs(
    lm: LanguageModel, modules: Sequence[str], inputs: dict[str, Tensor], row: Tensor, at: Tensor, token: Tensor
) -> tuple[dict[str, Pairs], Tensor]:
    """h and g at the places (row, at), and the NLL of `token` there [places]. Logits are computed there alone."""
    rows = len(inputs["input_ids"])
    # 1) Forward, from the first of the modules on with a graph, to the final norm.
    with widened(lm), requires_grad(lm.model, only=[]):
        end = Trace(lm.model, lm.architecture.final_norm, detach=False, stop=True)
        with Trace(lm.model, modules, inputs=True, outputs=False, grads=True, leaf=True) as trace, end:
            lm.model(**inputs, use_cache=False)
        final = unflatten(end.output, rows)[row.to(end.output.device), at.to(end.output.device)]
        logits = logits_of(lm, final)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = -log_softmax(logits, -1).gather(1, token[:, None].to(logits.device))[:, 0]
        if not nll.isfinite().all():
            raise EditkitError("The loss is not finite; nothing was changed. Load the model in float32.")
        # 2) Backward.
        nll.sum().backward()
        # 3) What is kept.
        found = {}
        for name in modules:
            both = trace[name].input.detach(), trace[name].grad
            h, g = (unflatten(each, rows)[row.to(each.device), at.to(each.device)] for each in both)
            found[name] = Pairs(keys_of(lm, name, h).cpu().double(), g.cpu().double())
    return found, nll.detach()
