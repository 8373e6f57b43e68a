"""What the tests of the hook layer share: sites of the tiny GPT-2, and small functions of a model."""

import torch
from torch import nn

IDS = torch.arange(2, 16).view(2, 7)


MLP = "transformer.h.1.mlp"


DOWN = "transformer.h.1.mlp.c_proj"


BLOCKS = [f"transformer.h.{i}" for i in range(3)]


def count_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(-1, 1, output.shape[-1])).pow(2).mean()


def uneven(h: torch.Tensor) -> torch.Tensor:
    """A change that no normalisation takes out again."""
    return h + torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype) ** 3
