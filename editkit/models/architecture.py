"""Where a family of models keeps things: one entry a family.

To add a family, add its `config.model_type` to `FAMILIES` with the names of its modules. Nothing else
changes: weight orientation is read off the module's type, never off shapes.
"""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from editkit.errors import ModelError, did_you_mean


@dataclass(frozen=True)
class Architecture:
    """Names of a family's modules; `{}` stands for the block's number."""

    family: str
    embedding: str
    block: str
    attention: str
    mlp: str
    down_projection: str  # the MLP's last matrix: input k [.., d_ff], output m = W k + b [.., d_model]
    final_norm: str
    head: str

    def down(self, layer: int) -> str:
        """The name of the down-projection module of block `layer`."""
        return self.down_projection.format(layer)


_LLAMA = {
    "embedding": "model.embed_tokens",
    "block": "model.layers.{}",
    "attention": "model.layers.{}.self_attn",
    "mlp": "model.layers.{}.mlp",
    "down_projection": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

FAMILIES = {
    "gpt2": Architecture(
        "gpt2",
        embedding="transformer.wte",
        block="transformer.h.{}",
        attention="transformer.h.{}.attn",
        mlp="transformer.h.{}.mlp",
        down_projection="transformer.h.{}.mlp.c_proj",
        final_norm="transformer.ln_f",
        head="lm_head",
    ),
    "llama": Architecture("llama", **_LLAMA),
    "mistral": Architecture("mistral", **_LLAMA),
    "qwen2": Architecture("qwen2", **_LLAMA),
    "qwen3": Architecture("qwen3", **_LLAMA),
}


def architecture_of(model_type: str) -> Architecture:
    """The family's entry. Raises ModelError naming the families that are known."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"editkit does not know the model family '{model_type}' ({did_you_mean(model_type, FAMILIES)}). "
            "Adding a family takes one entry in editkit/models/architecture.py."
        )
    return FAMILIES[model_type]


def orientation(module: nn.Module, name: str) -> str:
    """How the module stores W: "in_out" for Conv1D ([d_ff, d_model]), "out_in" for Linear ([d_model, d_ff]).

    Decided by type: a square weight has no shape to tell by. Raises ModelError for any other module.
    """
    if isinstance(module, Conv1D):
        return "in_out"
    if isinstance(module, nn.Linear):
        return "out_in"
    raise ModelError(
        f"'{name}' is a {type(module).__name__}; editkit edits Linear and Conv1D weights. "
        "Quantised or adapted layers: load the model in float32, float16 or bfloat16, or merge the adapter first."
    )
