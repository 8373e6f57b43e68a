"""Where the values of an offloaded parameter are kept, so that it can be read and written there.

accelerate gives a module that it offloads an empty ("meta") parameter, and a hook that brings the values from a store
before each forward pass and drops them behind it. A store holds CPU tensors by name, and behind them files: `NAME.dat`
in the offload folder, or the very safetensors of the checkpoint. A value that is written is therefore put before the
files, in memory: no file is ever written, so a checkpoint stays as it is and a killed run leaves nothing edited. When
the file's own bits are written again, the value in memory is dropped.

Nothing here imports accelerate: a model without its hooks has no offloaded parameter.
"""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from editkit.errors import ModelError
from editkit.models.architecture import experts_in, weight_name
from editkit.models.quantized import dequantized, is_quantized, quantized_shape
from editkit.nethook import get_module, get_parameter, inside


def is_offloaded(model: nn.Module, name: str) -> bool:
    """Whether the values of the parameter `name` are kept outside of its module."""
    return get_parameter(model, name, allow_meta=True).is_meta


def values_of(model: nn.Module, name: str) -> Tensor:
    """The values of the parameter or buffer `name`: itself, or what an offloaded one has in its store, which is not to
    be written to (`write_values` does that); of a quantised weight its values in float32, [d_out, d_in].

    Raises ModelError for an empty one without a store, nethook's errors as `get_parameter` does.
    """
    module, leaf = _holder(model, name)
    if leaf == "weight" and is_quantized(module):
        return dequantized(module)
    held = module._buffers.get(leaf)
    if held is None:
        held = get_parameter(model, name, allow_meta=True)
    return held.detach() if not held.is_meta else _store(module, name)[leaf]


def shape_of(model: nn.Module, name: str) -> torch.Size:
    """The shape of the parameter `name`; of a quantised weight [d_out, d_in]."""
    module, leaf = _holder(model, name)
    if leaf == "weight" and is_quantized(module):
        return quantized_shape(module)
    return get_parameter(model, name, allow_meta=True).shape


def write_values(model: nn.Module, name: str, values: Tensor) -> None:
    """Give the parameter `name` these values, where its own are kept. A parameter stays the same object."""
    module, leaf = _holder(model, name)
    parameter = get_parameter(model, name, allow_meta=True)
    if not parameter.is_meta:
        with torch.no_grad():
            parameter.copy_(values)
        return
    memory, files, key = _behind(_store(module, name), leaf)
    if key in memory and key not in files:
        memory[key].copy_(values)
        return
    memory.pop(key, None)
    stored = _store(module, name)[leaf]  # as the file has it
    new = values.to("cpu", stored.dtype, copy=True)
    if not torch.equal(_bytes(new), _bytes(stored.cpu())):
        memory[key] = new


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter or buffer `name`, under wrappers and adapters too, and its name there."""
    owner, _, leaf = name.rpartition(".")
    module = get_module(model, owner)
    while leaf not in module._parameters and leaf not in module._buffers and (inner := inside(module)) is not None:
        module = inner
    return module, leaf


def require_trainable(model: nn.Module, module: str, method: str) -> None:
    """Raise ModelError where the weight of `module`, which `method` trains, is offloaded."""
    found = get_module(model, module)
    name = weight_name(module, experts_in(found))
    if not is_quantized(found) and is_offloaded(model, name):
        raise ModelError(
            f"method={method} trains {name}, which is offloaded. Give its block a device in model.device_map, "
            "or use a method that computes the change of a weight, such as r_rome or memit."
        )


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook runs the module; None without one."""
    found = next((hook.execution_device for hook in _hooks(module) if hook.execution_device is not None), None)
    return None if found is None else torch.device(found)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module that say where it runs."""
    hook = getattr(module, "_hf_hook", None)
    every = [] if hook is None else getattr(hook, "hooks", [hook])
    return [each for each in every if hasattr(each, "execution_device")]


def _store(module: nn.Module, name: str) -> Any:
    """The map from the module's own parameter names to their values."""
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            return hook.weights_map
    raise ModelError(
        f"'{name}' has no values: it lies on the meta device, and no hook of accelerate brings them. Load the model "
        "with its weights, or with model.device_map=auto."
    )


def _behind(store: Any, leaf: str) -> tuple[MutableMapping[str, Tensor], Any, str]:
    """(values in memory by full name, those in files, the full name) of a store.

    accelerate looks into memory first. A store is `PrefixedDataset`s around a dict or an `OffloadedWeightsLoader`.
    """
    key = leaf
    while hasattr(store, "dataset"):
        store, key = store.dataset, f"{store.prefix}{key}"
    if hasattr(store, "state_dict"):
        return store.state_dict, store.index, key
    return store, {}, key
