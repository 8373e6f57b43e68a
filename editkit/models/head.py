"""The head: logits of the places that are read, and of no other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from editkit.models.load import LanguageModel
from editkit.models.products import faster, quick_products
from editkit.nethook import get_module

# Rows of the head that a product takes at once: with few logits to read, 50,257 at once are slow on a processor. 43
# went at 38 GFLOP/s whole and at 65 in pieces of 512, 300 at 53 and 78 (MKL, one core; a large product: 90).
PIECE = 512


@quick_products()
def logits_of(lm: LanguageModel, final: Tensor) -> Tensor:
    """[.., vocabulary] from the residual stream after the final norm, [.., d_model]."""
    head = get_module(lm.model, lm.architecture.head)
    product: Callable[..., Tensor] = _InPieces.apply
    logits: Tensor = product(final, head.weight) if _by_pieces(head, final) else head(final).to(final.device)
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


class _InPieces(torch.autograd.Function):
    """x [n, d_model] Wᵀ, for a W [vocabulary, d_model] that takes no gradient, some of its rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        logits = x.new_empty(len(x), len(weight))
        for begin in range(0, len(weight), PIECE):
            torch.mm(x, weight[begin : begin + PIECE].T, out=logits[:, begin : begin + PIECE])
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return grad_outputs[0] @ ctx.saved_tensors[0], None


def _by_pieces(head: torch.nn.Module, final: Tensor) -> bool:
    """Whether the head does no more than a product, and of the kind that a processor does slowly as a whole."""
    plain = type(head) is torch.nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)
    plain = plain and not head.weight.is_meta and type(head.weight) is torch.nn.Parameter
    learns = torch.is_grad_enabled() and head.weight.requires_grad
    float32 = final.dtype == head.weight.dtype == torch.float32
    return plain and not learns and not faster() and float32 and final.device.type == "cpu" and final.ndim == 2
