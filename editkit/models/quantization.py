"""Quantise a model as it is loaded, through transformers, bitsandbytes and torchao.

    load("gpt2-xl", quantization="bnb-nf4")

A checkpoint that is quantised already loads as it is, without being asked. What to do with a quantised model is in
quantized.py.
"""

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from editkit.errors import ModelError, did_you_mean
from editkit.models.quantized import WAYS
from editkit.nethook import replace_module

# The names for model.quantization, and the package that does each.
SCHEMES = {
    "bnb-8bit": "bitsandbytes",
    "bnb-nf4": "bitsandbytes",
    "bnb-fp4": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}
GROUP = 32  # weights that share a scale in torchao-int4
_NOISY_RUNS = ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops")  # of casts, and kernels not there
_NOISY_IMPORTS = ("torchao", "torch.utils._pytree")  # of kernels for GPUs, and of torch's own versions


def check_way(edited: str) -> str:
    """`edited`, or ModelError when there is no such way to edit a quantised weight."""
    if edited not in WAYS:
        raise ModelError(f"No way '{edited}' for model.edited: {did_you_mean(edited, WAYS)}.")
    return edited


def quantizer(quantization: str | None, config: Any, dtype: str | torch.dtype) -> dict[str, Any]:
    """The options of `from_pretrained` that quantise a model; {} for one that is left as it is.

    - `quantization`: one of SCHEMES, or None. `config`: the model's, which says whether it is quantised already.
    - `dtype`: that of the activations; "auto" for the checkpoint's own.

    Raises ModelError for a name that is not known, a missing package, or a model that is quantised already.
    """
    if quantization is None:
        if (by := method_of(config)) in SCHEMES.values() and importlib.util.find_spec(str(by)) is not None:
            _import_quietly(str(by))
        return {}
    if quantization not in SCHEMES:
        raise ModelError(f"No scheme '{quantization}' for model.quantization: {did_you_mean(quantization, SCHEMES)}.")
    if (already := method_of(config)) is not None:
        raise ModelError(
            f"model.quantization={quantization} was asked for, and this checkpoint is quantised already, by {already}. "
            "Leave model.quantization out to load it as it is, or name the checkpoint that is not quantised."
        )
    for package in (SCHEMES[quantization], "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"model.quantization={quantization} needs {package}, which is not installed. Install it with: "
                "pip install 'editkit[quantized]'"
            )
    _import_quietly(SCHEMES[quantization])
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    return {"quantization_config": _asked(quantization, dtype)}


def method_of(config: Any) -> str | None:
    """By what the checkpoint of this configuration was quantised, such as "gptq"; None when it was not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed quantiser")


def settle(model: nn.Module) -> None:
    """Make the quantised modules of a model ones whose tensors no forward pass changes; torchao's scheme is also put on
    Conv1D modules, which transformers leaves out. Does nothing the second time, or to a model that is not quantised.

    Raises ModelError for a model that bitsandbytes has packed already.
    """
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return
    for module in model.modules():
        if type(module._parameters.get("weight")).__name__ == "Params4bit":  # its own: PEFT's layers show their base's
            found: Any = module
            # On some processors bitsandbytes packs the codes in another order in the first pass without gradients.
            found.support_avx512bf16_for_cpu = False
            if getattr(found.weight.quant_state, "packing_format_for_cpu", False):
                raise ModelError(
                    "bitsandbytes has packed this model's weights for the processor in a pass that it was run in, and "
                    "rounded their scales. Load it again, with editkit.load or into a LanguageModel before it is run."
                )
            # It also casts the bias to its compute dtype in the first pass.
            if found.bias is not None and found.compute_dtype is not None:
                found.bias.data = found.bias.data.to(found.compute_dtype)
    if hasattr(settings, "get_apply_tensor_subclass"):
        _quantize_conv1d(model, settings.get_apply_tensor_subclass())


def _import_quietly(package: str) -> None:
    """Import it, without its warnings of kernels that a processor does not have, now and in each pass."""
    for name in _NOISY_RUNS:
        logging.getLogger(name).setLevel(logging.ERROR)
    with quiet_imports():
        importlib.import_module(package)
        if package == "torchao":
            importlib.import_module("torchao.quantization")


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """In the body torchao, which transformers imports where it is installed, does not warn of what it does not find."""
    loggers = [logging.getLogger(name) for name in _NOISY_IMPORTS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _quantize_conv1d(model: nn.Module, settings: Any) -> None:
    """Put a quantised nn.Linear in the place of each Conv1D of GPT-2, whose weight lies the other way."""
    from torchao.quantization import quantize_
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            new = nn.Linear(d_in, d_out, device="meta")
            new.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=False)
            new.bias = module.bias
            quantize_(new, settings)
            replace_module(model, name, new)


def _asked(scheme: str, dtype: str | torch.dtype) -> Any:
    """transformers' configuration of a scheme."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if scheme == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if scheme.startswith("bnb-"):
        kind = scheme.removeprefix("bnb-")
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if scheme == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    # Int4WeightOnlyConfig has kernels for GPUs alone. This one runs everywhere, with a byte for each 4-bit code.
    four_bits: Any = vars(torch)["int4"]  # torch's annotations leave it out
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=PerGroup(GROUP)))
