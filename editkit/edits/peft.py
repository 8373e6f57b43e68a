"""An edit as a LoRA adapter: a folder that `peft.PeftModel.from_pretrained(base, folder)` loads, ready to be uploaded.

A low-rank edit *is* a LoRA with A = right [r, d_ff], B = left [d_model, r] and scaling 1 (arXiv 2106.09685). peft reads
A and B in this orientation for Linear and, with fan_in_fan_out, for Conv1D. Writing needs no peft.

For the 3-D weight of E experts peft has a LoRA too (`target_parameters`), with an A_e [r, d_ff] and a B_e of each: A
[E · r, d_ff] expert by expert, and B [d_model, r · E] with the expert running fastest. Our right [r, E · d_ff] is cut
into the A_e, and every B_e is left. All weights of such an edit are named as parameters: in DeepSeek, peft takes the
module name `mlp.down_proj` for that of experts. So an edit of one of its dense blocks alone does not load there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from einops import rearrange, repeat
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.functional import pad

from editkit.edits.delta import Delta
from editkit.errors import EditkitError
from editkit.files import write_bytes, write_text

# What vLLM takes for max_lora_rank (its documentation of LoRAConfig); an adapter is padded to the next one with zeros.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_adapter(
    deltas: Sequence[Delta],
    base: Mapping[str, str],
    provenance: Mapping[str, Any],
    folder: Path,
    rank: int | None = None,
    *,
    served: bool = False,
) -> dict[str, float]:
    """Write adapter_config.json, adapter_model.safetensors and README.md; the relative error of each weight's ΔW.

    - `deltas`: the changes of an edit. A factored ΔW is written as it is.
    - `base`: name, digest and dtype of the model they are for. `provenance`: that of the edit.
    - `folder`: where to write; it is made where it is missing.
    - `rank`: cut each ΔW to this many of its largest singular values. If None, a dense ΔW is cut to its numerical
      rank.
    - `served`: as vLLM and SGLang take it. They read one rank and one alpha for the whole adapter, no patterns, and
      have Linear weights alone; so all factors are padded with zeros to one of SERVED_RANKS.

    Returns ‖ΔW written − ΔW‖ / ‖ΔW‖ by parameter name. Raises EditkitError for an edit without deltas or of mixed
    orientations, OutputError when the folder cannot be written.
    """
    if not deltas:
        raise EditkitError("This edit changes nothing: there is no adapter to write.")
    if len({delta.orientation for delta in deltas if delta.experts is None}) > 1:
        raise EditkitError("This edit changes Conv1D and Linear weights; peft has one fan_in_fan_out for an adapter.")
    by_parameter = any(delta.experts is not None for delta in deltas)
    if served and (by_parameter or deltas[0].orientation == "in_out"):
        raise EditkitError(
            "vLLM and SGLang take adapters of Linear weights alone, and this edit changes "
            f"{'the joint weight of experts' if by_parameter else 'Conv1D weights'}. Merge it into a checkpoint: "
            "python -m editkit.edits merge."
        )
    tensors: dict[str, Tensor] = {}
    ranks, errors = {}, {}
    for delta in deltas:
        left, right, error = delta.factors(rank)
        target = delta.parameter if by_parameter else delta.module
        ranks[target], errors[delta.parameter] = right.shape[0], error
        if delta.experts is not None:
            right = rearrange(right, "r (e f) -> (e r) f", e=delta.experts)
            left = repeat(left, "d r -> d (r e)", e=delta.experts)
        prefix = f"base_model.model.{delta.module}"
        tensors[f"{prefix}.lora_A.weight"] = right.contiguous()
        tensors[f"{prefix}.lora_B.weight"] = left.contiguous()
    if served:
        ranks = dict.fromkeys(ranks, _pad(tensors))
    name = Path(base["name"]).name if Path(base["name"]).is_absolute() else base["name"]
    largest = max(ranks.values())
    # peft warns, for nothing, of a pattern for a parameter; servers do not read patterns.
    alike = served or (by_parameter and len({*ranks.values()}) == 1)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": not by_parameter and deltas[0].orientation == "in_out",
        **(
            {"target_modules": [], "target_parameters": list(ranks)}
            if by_parameter
            else {"target_modules": list(ranks)}
        ),
        "rank_pattern": {} if alike else ranks,
        "alpha_pattern": {} if alike else ranks,
    }
    write_bytes(folder / "adapter_model.safetensors", save_tensors(tensors))
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "README.md", _card(name, base, provenance, ranks, errors))
    return errors


def _pad(tensors: dict[str, Tensor]) -> int:
    """Bring all factors to one rank of SERVED_RANKS, which is returned. Raises EditkitError for a larger one."""
    largest = max(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    rank = next((each for each in SERVED_RANKS if each >= largest), None)
    if rank is None:
        raise EditkitError(
            f"This edit has rank {largest}, and vLLM takes {SERVED_RANKS[-1]} at most. Cut it with rank=N, which "
            "measures what that loses, or merge it into a checkpoint."
        )
    for name, tensor in tensors.items():
        missing = rank - tensor.shape[0 if ".lora_A." in name else 1]
        sides = (0, 0, 0, missing) if ".lora_A." in name else (0, missing)
        tensors[name] = pad(tensor, sides).contiguous()
    return rank


def _card(
    name: str, base: Mapping[str, str], how: Mapping[str, Any], ranks: dict[str, int], errors: dict[str, float]
) -> str:
    facts = "\n".join(f"- {_fact(fact)}" for fact in how.get("facts", [])) or "- not recorded"
    weights = "\n".join(
        f"| {parameter} | {rank} | {error:.1e} |"
        for (parameter, error), rank in zip(errors.items(), ranks.values(), strict=True)
    )
    settings = json.dumps(how.get("settings", {}), indent=2, ensure_ascii=False)
    return f"""---
library_name: peft
base_model: {name}
tags: [model-editing]
---

# An edit of {name}

A knowledge edit by {how.get("method", "an unknown method")}, computed with editkit and exported as a LoRA adapter.
It belongs on the base with digest `{base["digest"][:16]}` ({base["dtype"]}) and on no other.

    import peft
    model = peft.PeftModel.from_pretrained(base_model, "THIS FOLDER")

## Facts

{facts}

## Weights

| weight | rank | relative error of the export |
|---|---|---|
{weights}

## Settings

```json
{settings}
```
"""


def _fact(fact: dict[str, str]) -> str:
    was = f" (was: {fact['target_true']})" if fact.get("target_true") else ""
    return f"{fact['prompt'].replace('{}', fact['subject'])} → {fact['target_new']}{was}"
