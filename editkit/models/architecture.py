"""Where a family of models keeps things: one entry a family.

A new family is one call, with its `config.model_type` and the names of its modules:

    register(Architecture("gpt2", embedding="transformer.wte", …))

Nothing else changes: weight orientation is read off the module's type, never off shapes. A mixture of experts names its
experts and its router too, and experts.py does the rest for all of them. Another package registers its own with the
same call, and an entry point `model_type = "its.module"` in the group `editkit.families` (registry.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from einops import rearrange
from torch import Tensor, nn

from editkit.errors import ModelError, did_you_mean
from editkit.models.quantized import is_quantized
from editkit.nethook import inside
from editkit.registry import Registry


@dataclass(frozen=True)
class Architecture:
    """Names of a family's modules; `{}` stands for the block's number."""

    family: str
    embedding: str
    block: str
    attention: str
    down_projection: str  # the MLP's last matrix: input k [.., d_ff], output m = W k + b [.., d_model]
    final_norm: str
    mlp: str | None  # None where its parts lie in the block itself
    mlp_norm: str | None = None  # a norm between the MLP's output and the residual stream
    head: str = "lm_head"
    attention_projection: str | None = None  # where the attention module adds the residual too: what puts out its own
    # Of a mixture of experts. A block that has no such modules is dense, with a down-projection of its own.
    experts: str | None = None  # holds the down-projections of all experts as one 3-D parameter, `down_proj`
    router: str | None = None  # gives (logits, gates, experts) of each token
    # What llama.cpp calls the family, where its ffn_down is this down-projection; None elsewhere (edits/gguf.py).
    llama_cpp: str | None = None

    @property
    def attention_output(self) -> str:
        """The module whose output is what attention adds to the residual stream, and no more."""
        return self.attention_projection or self.attention

    def down(self, layer: int) -> str:
        """The name of the down-projection module of block `layer`."""
        return self.down_projection.format(layer)

    def target_site(self, layer: int) -> str:
        """Where a value for block `layer` is aimed: the block itself, whose output is the residual stream, or the
        down-projection where a norm lies between the two."""
        return self.block.format(layer) if self.mlp_norm is None else self.down(layer)


_FAMILIES: Registry[Architecture] = Registry("model family", group="editkit.families")


def register(architecture: Architecture) -> Architecture:
    """Add the entry of a family, `architecture.family` being its `config.model_type`.

    Raises ConfigError for a family that has another entry already.
    """
    return _FAMILIES.register(architecture.family, architecture)


def families() -> list[str]:
    """The families that are known, sorted. Imports none."""
    return _FAMILIES.names()


def unregister(family: str) -> None:
    """Take a family out again, as a test does."""
    _FAMILIES.unregister(family)


def _family(family: str, embedding: str, block: str, parts: tuple[str, str, str], final_norm: str) -> Architecture:
    """An entry whose attention, MLP and down-projection (`parts`) lie one in the other below the block."""
    attention, mlp, down = parts
    return Architecture(
        family,
        embedding=embedding,
        block=block,
        attention=f"{block}.{attention}",
        mlp=f"{block}.{mlp}",
        down_projection=f"{block}.{mlp}.{down}",
        final_norm=final_norm,
    )


_LLAMA = _family(
    "llama", "model.embed_tokens", "model.layers.{}", ("self_attn", "mlp", "down_proj"), final_norm="model.norm"
)
_GPT2 = _family("gpt2", "transformer.wte", "transformer.h.{}", ("attn", "mlp", "c_proj"), final_norm="transformer.ln_f")
_FALCON = _family(
    "falcon",
    "transformer.word_embeddings",
    "transformer.h.{}",
    ("self_attention", "mlp", "dense_4h_to_h"),
    final_norm="transformer.ln_f",
)
_NORM_AFTER = "model.layers.{}.post_feedforward_layernorm"
_MIXTURE = replace(_LLAMA, experts="model.layers.{}.mlp.experts", router="model.layers.{}.mlp.gate")

# scripts/llamacpp_families.py checks each against llama.cpp's own conversion. It runs no OPT, GPT-J or GPT-Neo, and has
# the experts of a mixture in other tensors.
_LLAMA_CPP = {
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "llama": "llama",
    "mistral": "llama",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

for _entry in (
    _GPT2,
    replace(_GPT2, family="gpt_neo"),
    replace(_GPT2, family="gptj", down_projection="transformer.h.{}.mlp.fc_out"),
    _family(
        "gpt_neox",
        "gpt_neox.embed_in",
        "gpt_neox.layers.{}",
        ("attention", "mlp", "dense_4h_to_h"),
        final_norm="gpt_neox.final_layer_norm",
    ),
    Architecture(
        "opt",
        embedding="model.decoder.embed_tokens",
        block="model.decoder.layers.{}",
        attention="model.decoder.layers.{}.self_attn",
        mlp=None,
        down_projection="model.decoder.layers.{}.fc2",
        final_norm="model.decoder.final_layer_norm",
    ),
    _FALCON,
    replace(_FALCON, family="bloom", attention_projection="transformer.h.{}.self_attention.dense"),
    replace(_LLAMA, family="phi", down_projection="model.layers.{}.mlp.fc2", final_norm="model.final_layernorm"),
    *(replace(_LLAMA, family=family) for family in ("llama", "mistral", "qwen2", "qwen3", "phi3")),
    *(replace(_LLAMA, family=family, mlp_norm=_NORM_AFTER) for family in ("gemma2", "gemma3_text", "olmo2")),
    *(
        replace(_MIXTURE, family=family)
        for family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
    ),
    replace(_MIXTURE, family="gpt_oss", router="model.layers.{}.mlp.router"),
):
    register(replace(_entry, llama_cpp=_LLAMA_CPP.get(_entry.family)))


def architecture_of(model_type: str) -> Architecture:
    """The family's entry. Raises ModelError naming the families that are known."""
    if model_type not in (known := families()):
        raise ModelError(
            f"editkit does not know the model family '{model_type}' ({did_you_mean(model_type, known)}). "
            "Adding a family takes one call of editkit.models.architecture.register."
        )
    return _FAMILIES.get(model_type)


def orientation(module: nn.Module, name: str) -> str:
    """How the module stores W: "in_out" for Conv1D ([d_ff, d_model]), "out_in" for Linear ([d_model, d_ff]).

    A quantised module counts as a Linear. Of experts each slice [d_ff, d_model] or [d_model, d_ff] is stored so.
    Decided by type, or by what the experts declare: a square weight has no shape to tell by. Raises ModelError for any
    other module.
    """
    from transformers.pytorch_utils import Conv1D

    while (inner := inside(module)) is not None:  # under an adapter or a compiled call
        module = inner
    if isinstance(module, Conv1D):
        return "in_out"
    if isinstance(module, nn.Linear) or is_quantized(module):
        return "out_in"
    if experts_in(module) is not None:
        return "in_out" if getattr(module, "is_transposed", False) else "out_in"
    raise ModelError(
        f"'{name}' is a {type(module).__name__}; editkit edits the weights of Linear and Conv1D modules, and of "
        "experts that are one 3-D parameter, quantised ones too. Adapted layers: merge the adapter first."
    )


def experts_in(module: nn.Module) -> int | None:
    """How many experts' down-projections the module holds as slices of one 3-D parameter; None for another module."""
    weight = getattr(module, "down_proj", None)
    return len(weight) if isinstance(weight, nn.Parameter) and weight.ndim == 3 else None


def weight_name(module: str, experts: int | None) -> str:
    """The name of the parameter that holds W in the module of this name."""
    return f"{module}.weight" if experts is None else f"{module}.down_proj"


def matrix_shape(stored: Sequence[int], orientation: str) -> tuple[int, int]:
    """(d_model, d_ff) of W from the shape of the weight as a module stores it; of experts (d_model, E · d_ff)."""
    *experts, rows, columns = stored
    d_model, d_ff = (columns, rows) if orientation == "in_out" else (rows, columns)
    return d_model, math.prod(experts) * d_ff


def as_matrix(weight: Tensor, orientation: str) -> Tensor:
    """W [d_model, d_ff] from the weight as a module stores it; of experts [W_1 … W_E], [d_model, E · d_ff]."""
    if weight.ndim == 3:
        spread = "e f d -> d (e f)" if orientation == "in_out" else "e d f -> d (e f)"
        return rearrange(weight, spread)
    return weight.T if orientation == "in_out" else weight


def as_stored(matrix: Tensor, orientation: str, experts: int | None) -> Tensor:
    """The inverse of `as_matrix`: a matrix [d_model, d_ff] or [d_model, E · d_ff] as the module stores it."""
    if experts is not None:
        slices = "d (e f) -> e f d" if orientation == "in_out" else "d (e f) -> e d f"
        return rearrange(matrix, slices, e=experts)
    return matrix.T if orientation == "in_out" else matrix
