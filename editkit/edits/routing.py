"""Routing: whether an edit changes to which experts a mixture of experts sends its tokens.

An edit of one block leaves the routing there as it is: the router reads x, and x does not depend on the block's own W
(models/experts.py). Behind it the residual stream has moved, so later blocks may send a token to other experts or
with other gates, and then their W meet keys that no method has looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.models.architecture import experts_in
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of, has_experts, routed, site_of
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace, get_module

BATCH = 16  # prompts in one forward pass
MOST_PROMPTS = 32  # that the report of a method looks at


@dataclass(frozen=True, eq=False)
class RoutingChange:
    """How an edit changes the routing of prompts, in the blocks with experts from the first edited one on; float64."""

    axes: ClassVar[tuple[str, str]] = ("block", "prompt")

    layers: tuple[int, ...]
    prompts: tuple[str, ...]
    changed: Tensor  # [blocks, prompts], the share of a prompt's tokens that are sent to another set of experts
    last: Tensor  # [blocks, prompts], whether the last token is, from which the answer is read
    shift: Tensor  # [blocks, prompts], Σ |g′ − g| / Σ (g′ + g) over experts, of the token where it is largest: 0 to 1

    def to_json(self) -> dict[str, Any]:
        """Means over the prompts, for each block."""
        means = {name: getattr(self, name).double().mean(1).tolist() for name in ("changed", "last", "shift")}
        return {"layers": list(self.layers), "prompts": len(self.prompts), **means}


@in_eval_mode
def routing_change(lm: LanguageModel, edit: Edit, prompts: Sequence[str]) -> RoutingChange:
    """Run `prompts` through `lm` without and with `edit`, and compare where their tokens are sent.

    The model is left as it was. A model without experts has no blocks to report. Raises EditkitError for an edit of
    another base, or one that puts other tokens in front of the prompts.
    """
    edit.check_base(lm, whole=False)
    edit.require_same_tokens("routing_change")
    edited = [layer for layer in range(lm.layers) if {down_of(lm, layer), site_of(lm, layer)} & edit.modules]
    first = min(edited, default=lm.layers)
    layers = [layer for layer in range(first, lm.layers) if has_experts(lm, layer)]
    before = _gates(lm, layers, prompts)
    with edit.applied(lm, check=False, everything=False):
        after = _gates(lm, layers, prompts)
    found = torch.zeros(3, len(layers), len(prompts), dtype=torch.float64)
    for place, (was, now) in enumerate(zip(before, after, strict=True)):
        other = ((was != 0) != (now != 0)).any(-1).double()  # [blocks, tokens]
        shift = (now - was).abs().sum(-1) / (now + was).sum(-1)
        found[:, :, place] = torch.stack((other.mean(1), other[:, -1], shift.amax(1)))
    changed, last, largest = found
    return RoutingChange(tuple(layers), tuple(prompts), changed, last.bool(), largest)


def routing_report(lm: LanguageModel, edit: Edit, prompts: Sequence[str]) -> dict[str, Any]:
    """{"routing": …} for an edit's provenance, on the first prompts; empty for a model without experts."""
    if lm.architecture.experts is None:
        return {}
    return {"routing": routing_change(lm, edit, prompts[:MOST_PROMPTS]).to_json()}


@torch.no_grad()
def _gates(lm: LanguageModel, layers: Sequence[int], prompts: Sequence[str]) -> list[Tensor]:
    """For each prompt the gates of all experts [blocks, tokens, E], 0 for those that a token is not sent to."""
    found: list[Tensor] = []
    sites = [site_of(lm, layer) for layer in layers]
    with widened(lm):
        for begin in range(0, len(prompts) if layers else 0, BATCH):
            rows = tokenise(lm, prompts[begin : begin + BATCH])
            with Trace(lm.model, sites, inputs=True, outputs=False, stop=True) as trace:
                lm.model(**rows.inputs(), use_cache=False)
            each = [_of_block(lm, layer, trace[site].input) for layer, site in zip(layers, sites, strict=True)]
            stacked = torch.stack([unflatten(gates, len(rows.texts)) for gates in each])  # [blocks, rows, tokens, E]
            found += [stacked[:, row, : rows.last(row) + 1] for row in range(len(rows.texts))]
    return found or [torch.zeros(0, 1, 1, dtype=torch.float64) for _ in prompts]


def _of_block(lm: LanguageModel, layer: int, x: Tensor) -> Tensor:
    """The gates of all experts [tokens, E] of block `layer`, from its MLP's input [.., d_model]."""
    module = down_of(lm, layer)
    where, count = routed(lm, module, x.flatten(0, -2)), experts_in(get_module(lm.model, module))
    assert count is not None
    none = torch.zeros(len(where.gates), count, dtype=torch.float64)
    return none.scatter(1, where.experts.cpu(), where.gates.double().cpu())
