"""Quantised tiny models, really quantised by bitsandbytes and torchao, and what their tests compare."""

import atexit
import importlib.util
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editkit import load
from editkit.models.load import LanguageModel
from editkit.models.quantization import SCHEMES
from editkit.models.quantized import WAYS, dequantized, is_quantized
from editkit.models.snapshot import bits
from editkit.testing.tiny import tiny_lm

FAMILIES = ("gpt2", "llama", "gpt_neox", "opt")
PROMPTS = ("The Eiffel Tower is located in the city of", "The capital of France is")
CELLS = [(scheme, way) for scheme in SCHEMES for way in WAYS]


@cache
def saved(family: str) -> Path:
    """A folder with a tiny model's float32 checkpoint."""
    folder, lm = Path(tempfile.mkdtemp(prefix=f"editkit-{family}-")), tiny_lm(family)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def need(scheme: str) -> None:
    """Skip the test where the package of a scheme is not installed."""
    for package in (SCHEMES[scheme], "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'editkit[quantized]'")


def quantized_lm(family: str, scheme: str, way: str = "adapter", **options: Any) -> LanguageModel:
    """A tiny model of the family, quantised at load. `options`: of `load`; it is on the CPU without."""
    need(scheme)
    asked: dict[str, Any] = {"device": "cpu"} | options
    return load(saved(family), quantization=scheme, edited=way, **asked)


def float_twin(lm: LanguageModel, family: str) -> LanguageModel:
    """The float32 model whose weights are what the quantised ones stand for."""
    twin = load(saved(family), device="cpu")
    for name, module in lm.model.named_modules():
        if is_quantized(module):
            other = twin.model.get_submodule(name)
            weight = dequantized(module)
            with torch.no_grad():
                other.get_parameter("weight").copy_(weight.T if isinstance(other, Conv1D) else weight)
    return twin


def every_bit(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors of a model as integers, written out here: parameters, buffers, and for quantised weights
    the codes, scales, code books and offsets; with the identity of each module and parameter."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        found[f"{name}#"] = torch.tensor(id(module))
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            found[f"{name}.{key}#"] = torch.tensor(id(tensor))
            for part, value in parts(module, tensor).items():
                found[f"{name}.{key}.{part}"] = bits(value).clone()
    return found


def parts(module: nn.Module, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that one parameter or buffer is made of."""
    kind = type(tensor).__name__
    if kind == "Int8Params":
        held = getattr(tensor, "SCB")  # noqa: B009
        return {"codes": tensor.data, "SCB": getattr(module, "state").SCB if held is None else held}  # noqa: B009
    if kind == "Params4bit":
        state = getattr(tensor, "quant_state")  # noqa: B009
        every = {"codes": tensor.data, "absmax": state.absmax, "code": state.code}
        if state.nested:
            every |= {"offset": state.offset, "absmax2": state.state2.absmax, "code2": state.state2.code}
        return every
    if type(tensor).__module__.startswith("torchao."):
        return {name: value for name, value in vars(tensor).items() if isinstance(value, Tensor)}
    return {"": tensor.data}


def same(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether the model has the tensors, bits and objects of `before`, and no others."""
    now = every_bit(model)
    return before.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    """Of the last token of each prompt."""
    encoded = [lm.tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(lm.device) for text in PROMPTS]
    each = [lm.model(**inputs) for inputs in encoded]
    return torch.stack([output.logits[0, -1] for output in each])


def apart(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
