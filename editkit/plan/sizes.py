"""The numbers of a model that its costs depend on, read off its modules on the meta device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from editkit.models.architecture import experts_in, matrix_shape, orientation, weight_name
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.memory import free_bytes
from editkit.models.precision import widens
from editkit.models.snapshot import size_in_bytes, tensors_of
from editkit.nethook import get_module, get_parameter

# Of one weight in each scheme, with its share of scales. torchao keeps a byte for a code of 4 bits on a CPU.
BYTES = {
    "bnb-8bit": 1.0,
    "bnb-nf4": 0.5 + 4 / 64,
    "bnb-fp4": 0.5 + 4 / 64,
    "torchao-int8": 1.0,
    "torchao-int4": 1.0 + 5 / 32,
}


@dataclass(frozen=True)
class Down:
    """The down-projection of one block, W [d_model, d_ff], or those of all its experts."""

    d_model: int
    d_ff: int  # of one expert
    experts: int = 1

    @property
    def numbers(self) -> int:
        """How many numbers W has."""
        return self.d_model * self.d_ff * self.experts

    @property
    def moment(self) -> int:
        """Bytes of its second moment, float64; of experts one block each."""
        return 8 * self.experts * self.d_ff**2


@dataclass(frozen=True)
class Sizes:
    """The numbers of one model."""

    parameters: int
    weights: int  # bytes of all parameters and buffers
    dtype: torch.dtype
    widened: bool  # whether float32 copies of all weights are made for its passes (models/precision.py)
    d_model: int
    vocabulary: int
    head: float  # operations of one token in the head
    blocks: tuple[float, ...]  # operations of one token in each block; of experts those that it is sent to
    down: tuple[Down, ...]  # of each block

    @classmethod
    def of(cls, lm: LanguageModel, device: torch.device, quantization: str | None = None) -> "Sizes":
        """Those of `lm`, a skeleton or a whole model, as it will be on `device`.

        `quantization`: the scheme of models/quantization.py in which a skeleton's weights will be loaded.
        """
        config = lm.model.config.get_text_config()
        parameters = sum(parameter.numel() for parameter in lm.model.parameters())
        weights: float = size_in_bytes(tensors_of(lm.model).values())
        if quantization is not None:
            packed = sum(weight.numel() for weight in _quantized(lm))
            weights -= packed * (lm.dtype.itemsize - BYTES[quantization])
        plain = quantization is None and lm.quantization is None
        return cls(
            parameters,
            round(weights),
            lm.dtype,
            plain and device.type == "cpu" and widens(lm.dtype, parameters, free_bytes(device)),
            config.hidden_size,
            config.vocab_size,
            2.0 * config.hidden_size * config.vocab_size,
            tuple(_operations(lm, layer) for layer in range(lm.layers)),
            tuple(_down(lm, layer) for layer in range(lm.layers)),
        )

    @property
    def runs_in(self) -> torch.dtype:
        """The dtype of its passes."""
        return torch.float32 if self.widened else self.dtype

    @property
    def copies(self) -> int:
        """Bytes of those float32 copies."""
        return 4 * self.parameters if self.widened else 0

    def token(self, first: int = 0, *, head: bool = True) -> float:
        """Operations of one token from block `first` on, with or without the head."""
        return sum(self.blocks[first:]) + (self.head if head else 0.0)


def _quantized(lm: LanguageModel) -> Iterator[torch.Tensor]:
    """The weights that a quantiser takes: those of the blocks' linear layers."""
    from transformers.pytorch_utils import Conv1D

    for layer in range(lm.layers):
        for module in get_module(lm.model, lm.architecture.block.format(layer)).modules():
            if isinstance(module, nn.Linear | Conv1D):
                yield module.weight


def _operations(lm: LanguageModel, layer: int) -> float:
    """Two for each number of a matrix that a token meets; attention's scores are few for short texts."""
    config = lm.model.config.get_text_config()
    block, total = get_module(lm.model, lm.architecture.block.format(layer)), 0.0
    for module in block.modules():
        experts = experts_in(module)
        sent = getattr(config, "num_experts_per_tok", None)
        share = min(1.0, sent / experts) if experts and sent else 1.0
        total += share * sum(2 * each.numel() for each in module.parameters(recurse=False) if each.ndim > 1)
    return total


def _down(lm: LanguageModel, layer: int) -> Down:
    name = down_of(lm, layer)
    module = get_module(lm.model, name)
    experts = experts_in(module)
    stored = get_parameter(lm.model, weight_name(name, experts), allow_meta=True).shape
    d_model, d_ff = matrix_shape(stored, orientation(module, name))
    return Down(d_model, d_ff // (experts or 1), experts or 1)


def readable(size: float) -> str:
    """Bytes as a person reads them.

    >>> readable(16_060_522_496), readable(1500), readable(0)
    ('16.1 GB', '1.5 kB', '0 B')
    """
    step = min(3, int(math.log(size, 1000))) if size >= 1 else 0
    return f"{size / 1000**step:.1f} {('B', 'kB', 'MB', 'GB')[step]}" if step else f"{size:.0f} B"
