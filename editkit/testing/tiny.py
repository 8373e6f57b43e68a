"""Tiny random models of each family, built from transformers configurations: no download, CPU, eval mode.

`tiny_lm("llama")` is one with a tokenizer; `build` the model alone. A family of your own is told to them by `add`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from editkit.corpora import atlas_prose, load_atlas
from editkit.models.architecture import architecture_of
from editkit.models.load import BUNDLED, LanguageModel


class Sites(NamedTuple):
    """Names of the modules of block `{}`. None where the family has no such module."""

    block: str
    attention: str
    mlp: str | None
    down_projection: str | None

    def mlp_of(self, layer: int) -> str:
        """The MLP's name in block `layer`, of a family that has one."""
        assert self.mlp is not None
        return self.mlp.format(layer)

    def down_of(self, layer: int) -> str:
        """The down-projection's name in block `layer`, of a family that has one."""
        assert self.down_projection is not None
        return self.down_projection.format(layer)


LLAMA_SITES = Sites(
    "model.layers.{}", "model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.{}.mlp.down_proj"
)
H = "transformer.h.{}"
# Mixtures of experts, which are slices of one 3-D parameter: no module holds a single down-projection.
EXPERTS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"]

SITES: dict[str, Sites] = {
    "gpt2": Sites(H, f"{H}.attn", f"{H}.mlp", f"{H}.mlp.c_proj"),
    "llama": LLAMA_SITES,
    "mistral": LLAMA_SITES,
    "qwen2": LLAMA_SITES,
    "qwen3": LLAMA_SITES,
    "gemma2": LLAMA_SITES,
    "gemma3": LLAMA_SITES,
    "gptj": Sites(H, f"{H}.attn", f"{H}.mlp", f"{H}.mlp.fc_out"),
    "gpt_neox": Sites(
        "gpt_neox.layers.{}",
        "gpt_neox.layers.{}.attention",
        "gpt_neox.layers.{}.mlp",
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),
    "gpt_neo": Sites(H, f"{H}.attn", f"{H}.mlp", f"{H}.mlp.c_proj"),
    "opt": Sites("model.decoder.layers.{}", "model.decoder.layers.{}.self_attn", None, "model.decoder.layers.{}.fc2"),
    "bloom": Sites(H, f"{H}.self_attention", f"{H}.mlp", f"{H}.mlp.dense_4h_to_h"),
    "falcon": Sites(H, f"{H}.self_attention", f"{H}.mlp", f"{H}.mlp.dense_4h_to_h"),
    "phi": Sites("model.layers.{}", "model.layers.{}.self_attn", "model.layers.{}.mlp", "model.layers.{}.mlp.fc2"),
    "phi3": LLAMA_SITES,
    "olmo2": LLAMA_SITES,
    **dict.fromkeys(EXPERTS, LLAMA_SITES._replace(down_projection=None)),
}
DENSE = [family for family in SITES if family not in EXPERTS]

POSITIONS = 256

_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64, "n_positions": POSITIONS}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = _LLAMA | {"num_key_value_heads": 2, "head_dim": 8}
_ALTERNATING = _GROUPED | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
}

_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = _LLAMA | {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED),
    "qwen2": ("Qwen2Config", _LLAMA | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", _GROUPED),
    "gemma2": ("Gemma2Config", _ALTERNATING),
    "gemma3": ("Gemma3TextConfig", _ALTERNATING),
    "gptj": ("GPTJConfig", _GPT2 | {"rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXConfig", _LLAMA),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": ("FalconConfig", _LLAMA | {"ffn_hidden_size": 64}),
    "phi": ("PhiConfig", _LLAMA),
    "phi3": ("Phi3Config", _LLAMA | {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", _LLAMA | {"num_key_value_heads": 2}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (  # a shared expert with a gate of its own; block 0 is dense
        "Qwen2MoeConfig",
        _LLAMA | _ROUTED | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _GROUPED | _ROUTED | {"norm_topk_prob": True}),
    "olmoe": ("OlmoeConfig", _LLAMA | _ROUTED | {"intermediate_size": 24}),  # gates that do not add up to 1
    "gpt_oss": (  # biases; softmax over the chosen alone; stored [E, d_ff, d_model]
        "GptOssConfig",
        _GROUPED
        | {
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", _DEEPSEEK | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),  # sigmoid with a bias for the choice, groups, normalised
}


def build(
    family: str, vocab_size: int = 96, dtype: torch.dtype = torch.float32, seed: int = 0, **own: Any
) -> PreTrainedModel:
    """A tiny model of `family`; equal arguments give equal weights, and the global RNG is left alone.

    `own`: fields of its configuration, in place of ours.

    Matrices are drawn wide and biases and norms away from 0 and 1, so that a forgotten bias or a swapped
    orientation shows.
    """
    name, options = _CONFIGS[family]
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, name)(vocab_size=vocab_size, **tokens, **options | own)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # decides the choice of DeepSeek-V3's experts, not their gates
                buffer.normal_(0, 0.2)
    if family in EXPERTS and dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products take no float64
    return model.to(dtype).eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {family: partial(build, family) for family in SITES}


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: pieces carry their leading space, nothing is added in front."""
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED["atlas"])


@cache
def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-2's kind: a BOS in front, and a space mark put before the first word."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=list("▁"), show_progress=False
    )
    sentences = [
        f"{p.format(f.subject)} {f.object}." for f in load_atlas().facts[:600] for p in load_atlas().trained_pairs(f)
    ]
    bpe.train_from_iterator(sentences + atlas_prose(), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def tiny_lm(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """A tiny random model of a family, with the tokenizer of its kind."""
    tokenizer = byte_level_tokenizer() if family.startswith("gpt") else llama_like_tokenizer()
    model = build(family, vocab_size=len(tokenizer), dtype=dtype, seed=seed)
    return LanguageModel(f"tiny-{family}", model, tokenizer, architecture_of(model.config.model_type))
