"""Causal tracing: where in a model, and at which token, a fact is recalled (Meng et al. 2022, arXiv 2202.05262, 2).

The subject's embeddings are corrupted, by noise or by another subject in its place, so that the model forgets the
answer o that it gives to a prompt. Then, one at a time, the clean activation of one place is put back:

    total effect       TE = P(o | clean) − P(o | corrupted)
    indirect effect    IE = P(o | corrupted, clean h at (token, block)) − P(o | corrupted)

    state              the residual stream behind a block
    mlp, attention     their outputs, in a window of blocks around it
    severed_mlp        as state, with the MLPs (attentions) of all later blocks held at that token at what they put
    severed_attention  out in the corrupted run: what the state does other than by way of them

All P are means over the samples of the corruption. `trace` is of one prompt, `average_trace` of many facts by kind of
token, and `propose_layers` says which blocks to edit. Arrays come out; `editkit.plots` draws them.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Imported when first used, so that a page can read a trace's files (files.py) without torch.
_PUBLIC = {
    "PARTS": "prompt",
    "AverageTrace": "average",
    "Proposal": "proposal",
    "Traced": "prompt",
    "average_trace": "average",
    "embedding_std": "corruption",
    "parts_of": "prompt",
    "propose_layers": "proposal",
    "proposed_block": "proposal",
    "trace": "prompt",
}
__all__ = [
    "PARTS",
    "AverageTrace",
    "Proposal",
    "Traced",
    "average_trace",
    "embedding_std",
    "parts_of",
    "propose_layers",
    "proposed_block",
    "trace",
]

if TYPE_CHECKING:
    from editkit.tracing.average import AverageTrace, average_trace
    from editkit.tracing.corruption import embedding_std
    from editkit.tracing.prompt import PARTS, Traced, parts_of, trace
    from editkit.tracing.proposal import Proposal, propose_layers, proposed_block


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'editkit.tracing' has no attribute '{name}'")
    return getattr(importlib.import_module(f"editkit.tracing.{_PUBLIC[name]}"), name)
