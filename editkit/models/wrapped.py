"""What people put around a model: torch.compile, PEFT's adapters, checkpointing wrappers, parametrisations.

An edit knows the names of the plain transformers model. So `LanguageModel` holds the transformers model itself
(`unwrapped`); the names of its tensors leave out the wrappers that are inside of it (`plain_name`), and nethook's
`get_parameter` finds the weight behind them. `require_editable` refuses what cannot be edited truly. While something
runs the model, evalmode.py takes off what would change what it gives.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from editkit.errors import ModelError
from editkit.models.architecture import experts_in, weight_name
from editkit.models.quantized import is_quantized, scheme_of
from editkit.nethook import NameNotFound, get_module, get_parameter, inside

AROUND = {  # class of a wrapper that only runs the module in it: where it keeps that
    "OptimizedModule": "_orig_mod",  # torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",  # torch.distributed
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
_SILENT = {"_orig_mod", "_checkpoint_wrapped_module", "base_layer"}  # parts of a name that a plain model does not have


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile's, DataParallel's and PEFT's objects; a plain model itself.

    Adapters stay where they are: inside of it. Raises ModelError for PEFT's virtual tokens, which are outside.
    """
    while True:
        if type(model).__name__ in AROUND:
            model = getattr(model, AROUND[type(model).__name__])
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):  # PeftModel
            for name, config in model.peft_config.items():
                if getattr(config, "is_prompt_learning", False):
                    raise ModelError(
                        f"The adapter '{name}' of PEFT is of kind {config.peft_type.value}: tokens of its own in front "
                        "of every text, which is no part of the model that editkit edits. Give the model without it: "
                        "model.get_base_model()."
                    )
            model = model.get_base_model()
        else:
            return model


def innermost(module: nn.Module) -> nn.Module:
    """The module inside of wrappers that only run it, which `eval_mode` takes off; a plain module itself."""
    while type(module).__name__ in AROUND:
        module = getattr(module, AROUND[type(module).__name__])
    return module


def plain_name(name: str) -> str:
    """The name that a parameter has in the plain model.

    >>> plain_name("transformer.h.1._orig_mod.mlp.c_proj.base_layer.weight")
    'transformer.h.1.mlp.c_proj.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _SILENT)


def adapters_of(model: nn.Module) -> tuple[object, ...]:
    """Which adapters of PEFT are active, off or merged, layer by layer."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return tuple((each.disable_adapters, tuple(each.active_adapters), tuple(each.merged_adapters)) for each in layers)


def require_editable(model: nn.Module, module: str) -> None:
    """Raise ModelError where a change of the weight in `module` would be lost, or would not mean what it says.

    Raises nethook's NameNotFound for a module that there is not.
    """
    layer: nn.Module | None = get_module(model, module)
    while layer is not None and (inner := inside(layer)) is not None:
        if hasattr(layer, "base_layer"):
            _require_a_sum(layer, module)
        layer = inner
    assert layer is not None
    if hasattr(layer, "modules_to_save"):
        raise ModelError(
            f"The weight of '{module}' was to be edited, and PEFT trains a copy of it (modules_to_save). Merge that "
            "(model.merge_and_unload()), or edit another block."
        )
    if is_quantized(layer):
        if layer is not get_module(model, module):
            raise ModelError(
                f"The weight of '{module}' was to be edited, and it is quantised ({scheme_of(layer)}) and lies in a "
                "wrapper or under an adapter. Take that off (model.merge_and_unload()), or edit another block."
            )
        return
    name = weight_name(module, experts_in(layer))
    leaf = name.rpartition(".")[2]
    if parametrize.is_parametrized(layer, leaf):
        kind = type(layer.parametrizations[leaf][0]).__name__  # type: ignore[index]
        raise ModelError(
            f"'{name}' was to be edited, and it is computed from other parameters ({kind}): a change of it would be "
            f"lost. Call torch.nn.utils.parametrize.remove_parametrizations(module, '{leaf}') first, or edit another "
            "block."
        )
    try:
        weight = get_parameter(model, name, allow_meta=True)
    except NameNotFound as error:
        others = ", ".join(each for each, _ in layer.named_parameters(recurse=False)) or "none"
        if isinstance(getattr(layer, leaf, None), torch.Tensor):  # torch.nn.utils.prune, the older weight_norm
            raise ModelError(
                f"'{name}' was to be edited, and it is no parameter but computed from others ({others}): a change of "
                "it would be lost. Make it one first (torch.nn.utils.prune.remove, remove_weight_norm)."
            ) from error
        raise
    if weight.is_meta and not hasattr(layer, "_hf_hook"):
        raise ModelError(
            f"'{name}' was to be edited, and it has no values: it lies on the meta device. Load the model with its "
            "weights, or with model.device_map=auto."
        )


def require_all_editable(model: nn.Module, modules: Iterable[str]) -> None:
    """`require_editable` for each, and ModelError where two of them share one weight.

    Warns of a weight that other modules use too.
    """
    named: dict[int, str] = {}
    for module in modules:
        require_editable(model, module)
        if is_quantized(get_module(model, module)):
            continue  # quantisers leave tied weights as they are
        name = weight_name(module, experts_in(get_module(model, module)))
        weight = get_parameter(model, name, allow_meta=True)
        if (other := named.setdefault(id(weight), name)) != name:
            raise ModelError(
                f"{other} and {name} were to be edited, and they are one tied weight: what is written for one block "
                "would change the other. Give one of the blocks."
            )
        every = [plain_name(each) for each, p in model.named_parameters(remove_duplicate=False) if p is weight]
        if tied := [each for each in every if each != name]:
            warnings.warn(f"{name} is tied to {', '.join(tied)}: an edit changes them all", stacklevel=4)


def _require_a_sum(layer: Any, module: str) -> None:
    """Raise ModelError unless what PEFT's `layer` puts out is W k + b and a part that does not depend on W."""
    kind, home = type(layer).__name__, type(layer).__module__
    variants = [type(each).__name__ for each in getattr(layer, "lora_variant", {}).values()]
    if not (home.startswith("peft.tuners.lora") and kind == "Linear") or variants:
        raise ModelError(
            f"The weight of '{module}' was to be edited, and it lies under an adapter of PEFT that is no plain LoRA "
            f"({', '.join(variants) or f'{home}.{kind}'}): what is written would not be what the adapter lets through. "
            "Merge it (model.merge_and_unload()), or edit another block."
        )
    if layer.merged:
        raise ModelError(
            f"The weight of '{module}' was to be edited, and the adapter {', '.join(layer.merged_adapters)} is merged "
            "into it: taking that out again would change the edited weight. Call model.unmerge_adapter() first, or "
            "model.merge_and_unload() to keep it for good."
        )
