"""The bundled model in the shape of a larger GPT-2: as many weights, and the same answers.

Random weights know no facts, so what needs a model that knows some (an audit) can't be timed on them. Here the residual
stream holds the small model's state several times over, which a LayerNorm does not see, and what the shape has more of
is random but writes nothing: neurons and whole blocks whose output weights are zero, heads that nothing reads. The text
comes out the same; each product has the size that it has in the shape.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from editkit.models.load import LanguageModel

# Logit of a token that the small model does not have. Far lower, its probability is a denormal number, with which a
# processor takes 50 times as long: the backward pass of the head was most of an edit.
UNLIKELY = -30.0


@torch.no_grad()
def widened(small: LanguageModel, config: GPT2Config, name: str) -> LanguageModel:
    """`small` (a GPT-2) with the sizes of `config`, whose width is a multiple of its own.

    Logits of the small model's tokens are equal but for rounding. Added blocks come after its own. Raises ValueError
    where the sizes do not allow it.
    """
    own: Any = small.model.config
    copies, rest = divmod(config.n_embd, own.n_embd)
    heads_fit = config.n_head >= own.n_head and config.n_embd // config.n_head >= own.n_embd // own.n_head
    if rest or not heads_fit or config.n_layer < own.n_layer or config.vocab_size < own.vocab_size:
        raise ValueError(f"{name}: {_sizes(config)} can't hold {_sizes(own)}")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    old: Any = small.model.get_submodule("transformer")
    new: Any = model.transformer
    new.wte.weight[: own.vocab_size] = old.wte.weight.repeat(1, copies)
    new.wpe.weight[: own.n_positions] = old.wpe.weight.repeat(1, copies)
    for at, block in enumerate(new.h):
        if at >= own.n_layer:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            continue
        was = old.h[at]
        for norm in ("ln_1", "ln_2"):
            for part in ("weight", "bias"):
                getattr(block, norm).get_parameter(part).copy_(getattr(was, norm).get_parameter(part).repeat(copies))
        _attention(was.attn, block.attn, own, config)
        _reads(was.mlp.c_fc, block.mlp.c_fc, slice(0, was.mlp.c_fc.nf), copies)
        _writes(was.mlp.c_proj, block.mlp.c_proj, slice(0, was.mlp.c_fc.nf), copies)
    for part in ("weight", "bias"):  # each copy of the state counts in a logit
        new.ln_f.get_parameter(part).copy_(old.ln_f.get_parameter(part).repeat(copies) / copies)
    _unlikely(model, own.vocab_size)
    return LanguageModel(name, model, small.tokenizer, small.architecture)


def _sizes(config: GPT2Config) -> str:
    return f"{config.n_layer} blocks of width {config.n_embd}, {config.n_head} heads and {config.vocab_size} tokens"


def _attention(was: Any, now: Any, own: GPT2Config, config: GPT2Config) -> None:
    """The small model's heads, each padded with zeros. The other heads keep random weights and write nothing."""
    size, room = own.n_embd // own.n_head, config.n_embd // config.n_head
    head = torch.arange(own.n_embd) // size
    places = head * room + torch.arange(own.n_embd) % size  # [n_embd of the small model], where each number goes
    copies = config.n_embd // own.n_embd
    used = torch.arange(own.n_head * room)
    for third in range(3):  # queries, keys, values
        columns, start = third * config.n_embd, third * own.n_embd
        now.c_attn.weight[:, columns + used] = 0
        now.c_attn.bias[columns + used] = 0
        # scores are divided by √(size of a head)
        scale = math.sqrt(room / size) if third == 0 else 1.0
        weight = was.c_attn.weight[:, start : start + own.n_embd] * scale
        now.c_attn.weight[:, columns + places] = weight.repeat(copies, 1) / copies
        now.c_attn.bias[columns + places] = was.c_attn.bias[start : start + own.n_embd] * scale
    _writes(was.c_proj, now.c_proj, places, copies)


def _reads(was: Any, now: Any, places: slice, copies: int) -> None:
    """A layer that reads the residual stream; what is not in `places` is random, as large. Weights are [in, out]."""
    nn.init.normal_(now.weight, std=was.weight.std().item() / math.sqrt(copies))
    now.weight[:, places] = was.weight.repeat(copies, 1) / copies
    now.bias[places] = was.bias


def _writes(was: Any, now: Any, places: slice | Tensor, copies: int) -> None:
    """A layer that writes to the residual stream; from elsewhere it reads nothing."""
    nn.init.zeros_(now.weight)
    now.weight[places] = was.weight.repeat(1, copies)
    now.bias.copy_(was.bias.repeat(copies))


def _unlikely(model: GPT2LMHeadModel, first: int) -> None:
    """Give the tokens from `first` on an embedding whose logit is UNLIKELY, whatever the text.

    A LayerNorm's output before its weight γ and bias β sums to 0, so its product with 1/γ is Σ β/γ for every state.
    """
    norm = model.transformer.ln_f
    direction = 1 / norm.weight
    model.transformer.wte.weight[first:] = UNLIKELY * direction / (norm.bias * direction).sum()
