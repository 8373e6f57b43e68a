"""Models of the sizes that people edit, with random weights made on the device; texts and facts to run them on.

No download is needed, and the host never holds a second copy of a model that is made on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config
from widened import widened

from editkit.corpora import atlas_prose
from editkit.data.atlas import atlas_cases
from editkit.data.cases import Case
from editkit.models.architecture import architecture_of
from editkit.models.load import BUNDLED, DTYPES, LanguageModel, load


@dataclass(frozen=True)
class Shape:
    """A family's configuration, and the block that is edited (that of ROME's or MEMIT's authors where there is one)."""

    family: str
    layer: int
    sizes: dict[str, Any] = field(default_factory=dict)


def _gpt2(blocks: int, width: int, heads: int, layer: int, **sizes: Any) -> Shape:
    return Shape("gpt2", layer, {"n_layer": blocks, "n_embd": width, "n_head": heads, **sizes})


# The vocabulary's size is the real one too, since the head is a large part of a step.
SHAPES = {
    "gpt2-small": _gpt2(12, 768, 12, 5),
    "gpt2-medium": _gpt2(24, 1024, 16, 8),
    "gpt2-xl": _gpt2(48, 1600, 25, 17),
    "gpt-j-6b": Shape("gptj", 5, {"n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "vocab_size": 50_400}),
    "llama-3-8b": Shape(
        "llama",
        5,
        {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
    "qwen2.5-7b": Shape(
        "qwen2",
        5,
        {
            "num_hidden_layers": 28,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152_064,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "mixtral-tiny": Shape(
        "mixtral",
        2,
        {
            "num_hidden_layers": 8,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32_000,
        },
    ),
    "tiny": _gpt2(4, 64, 4, 1, vocab_size=1024),  # for tests
}

IN = "atlas-in-"


def model_of(
    shape: str, device: str = "cpu", dtype: str = "float32", *, tokenizer: str | None = None, blocks: int | None = None
) -> tuple[LanguageModel, int]:
    """A model of that shape with seeded random weights, and the block to edit.

    - `shape`: a name in SHAPES; "atlas", which is the bundled model itself; or "atlas-in-gpt2-small", which has that
      shape and the bundled model's answers (widened.py), on the CPU in float32.
    - `device`: where the weights are made. `dtype`: float32, bfloat16 or float16.
    - `tokenizer`: a folder with one; None takes the atlas model's, whose ids every vocabulary here has.
    - `blocks`: only so many of the shape's, and the edited one in their middle.
    """
    if shape == "atlas":
        return load("atlas", device=device, dtype=dtype), 4
    if shape.startswith(IN):
        sizes = SHAPES[shape.removeprefix(IN)].sizes
        return widened(load("atlas", device="cpu"), GPT2Config(**sizes), shape), 4
    chosen = SHAPES[shape]
    config = AutoConfig.for_model(chosen.family, **chosen.sizes)
    if blocks is not None:
        config.num_hidden_layers = blocks
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    found = AutoTokenizer.from_pretrained(tokenizer or BUNDLED["atlas"])
    lm = LanguageModel(f"random {shape}", model, found, architecture_of(chosen.family))
    return lm, chosen.layer if blocks is None else blocks // 2


def contexts_of(lm: LanguageModel, lengths: Sequence[int]) -> list[str]:
    """The bare prompt, and texts of so many tokens in front of it."""
    ids = lm.tokenizer(" ".join(atlas_prose()))["input_ids"]
    texts, at = ["{}"], 0
    for length in lengths:
        text = str(lm.tokenizer.decode(ids[at : at + length]))
        texts.append(text.replace("{", " ").replace("}", " ").strip() + ". {}")
        at += length
    return texts


def cases_of(count: int) -> list[Case]:
    """Cases of different prompts."""
    cases = {case.fact.text: case for case in atlas_cases(2 * count)}
    return list(cases.values())[:count]
