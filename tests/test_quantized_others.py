"""Quantisers that do not run here, GPTQ and AWQ: what is refused, and the adapter way on a module of their kind. And
the settings that are refused. No package of a quantiser is needed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from editkit import Session, load, r_rome
from editkit.config import CONF_DIR
from editkit.edits import base_of, requantized
from editkit.errors import ModelError
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.quantized import Beside, dequantized, is_quantized, scheme_of
from editkit.nethook import replace_module
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.quantized import apart, every_bit, logits, same, saved
from tests.test_quantized import FACT, SETTINGS, random_edit
from tests.test_session import FACTS, MOMENTS
from tests.test_session import SETTINGS as SESSION_SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys


class PackedLinear(nn.Module):
    """A stand-in for GPTQ's and AWQ's modules: eight 4-bit codes in each int32 of `qweight`, scales and zero points of
    groups of 16 inputs; it has no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        groups = linear.weight.detach().unflatten(1, (-1, 16))  # [d_out, groups, 16]
        scales = groups.abs().amax(-1) / 7
        codes = (groups / scales[..., None]).round().to(torch.int32) + 8
        packed = torch.zeros(linear.out_features, linear.in_features // 8, dtype=torch.int32)
        for place, eighth in enumerate(codes.flatten(1).unflatten(1, (-1, 8)).unbind(-1)):
            packed |= eighth << (4 * place)
        self.register_buffer("qweight", packed)
        self.register_buffer("qzeros", torch.full_like(scales, 8, dtype=torch.int32))
        self.register_buffer("scales", scales)

    def unpacked(self) -> Tensor:
        """W, written out."""
        qweight, scales = self.get_buffer("qweight"), self.get_buffer("scales")
        codes = torch.stack([qweight >> (4 * place) & 15 for place in range(8)], -1).flatten(1)
        each = codes.unflatten(1, (-1, 16)) - self.get_buffer("qzeros")[..., None]
        found: Tensor = (each * scales[..., None]).flatten(1)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


def packed_lm(family: str, edited: str = "adapter") -> LanguageModel:
    """A tiny model whose down-projections are stand-ins."""
    lm = tiny_lm(family)
    for layer in range(lm.layers):
        module = lm.model.get_submodule(down_of(lm, layer))
        assert isinstance(module, nn.Linear)
        replace_module(lm.model, down_of(lm, layer), PackedLinear(module))
    return LanguageModel(lm.name, lm.model, lm.tokenizer, lm.architecture, edited)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_adapter_way_needs_nothing_but_a_module_to_call(family: str) -> None:
    lm = packed_lm(family)
    name = down_of(lm, 1)
    module = lm.model.get_submodule(name)
    assert isinstance(module, PackedLinear)
    assert scheme_of(module) == lm.quantization == base_of(lm).dtype.split("/")[0] == "PackedLinear"
    assert torch.allclose(dequantized(module), module.unpacked(), atol=1e-6)  # read through unit vectors
    twin = tiny_lm(family)
    with torch.no_grad():
        for layer in range(lm.layers):
            packed = lm.model.get_submodule(down_of(lm, layer))
            assert isinstance(packed, PackedLinear)
            twin.model.get_parameter(f"{down_of(lm, layer)}.weight").copy_(packed.unpacked())
    before = every_bit(lm.model)
    contexts, moments = ["{}", "It is so. {}"], MomentSettings(tokens=2000)
    edit, wanted = (
        r_rome(each, FACT, SETTINGS, moments=moments, contexts=contexts, progress=False) for each in (lm, twin)
    )
    assert same(before, lm.model)
    assert apart(edit.deltas[0].change(), wanted.deltas[0].change()) < 1e-4
    with edit.applied(lm) as applied, wanted.applied(twin):
        assert isinstance(lm.model.get_submodule(name), Beside)
        assert apart(logits(lm), logits(twin)) < 1e-4
    assert applied.reversal is not None and applied.reversal.exact
    assert {f"{name}.qweight", f"{name}.qzeros", f"{name}.scales"} <= {*applied.reversal.touched}
    assert same(before, lm.model)
    with Session(lm, "ft", SESSION_SETTINGS["ft"], moments=MOMENTS, progress=False) as session:
        session.edit(FACTS[0])
    assert same(before, lm.model)
    assert requantized(lm, edit) is None  # its quantiser needs texts


def test_the_wide_way_is_refused_where_a_weight_is_not_unpacked() -> None:
    lm = packed_lm("llama", "wide")
    before = every_bit(lm.model)
    with pytest.raises(ModelError, match=r"down_proj is a PackedLinear.*Use model.edited=adapter"):
        random_edit(lm).apply(lm)
    assert same(before, lm.model)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_whose_quantiser_is_not_here_is_refused_with_the_remedy(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"quantised by {method} and does not load here.*model.edited=adapter"):
        load(tmp_path, device="cpu")
    with pytest.raises(ModelError, match=rf"quantised already, by {method}"):
        load(tmp_path, device="cpu", quantization="bnb-nf4")


def test_what_cannot_be_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="No scheme 'bnb-nf5' for model.quantization: did you mean 'bnb-nf4'"):
        load(saved("llama"), device="cpu", quantization="bnb-nf5")
    with pytest.raises(ModelError, match="No way 'adaptor' for model.edited: did you mean 'adapter'"):
        load(saved("llama"), device="cpu", edited="adaptor")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else there(name))
    with pytest.raises(ModelError, match=r"needs bitsandbytes.*pip install 'editkit\[quantized\]'"):
        load(saved("llama"), device="cpu", quantization="bnb-8bit")


def test_plain_models_are_not_quantised() -> None:
    for family in ("gpt2", "llama", "mixtral"):
        lm = tiny_lm(family)
        assert lm.quantization is None and not any(map(is_quantized, lm.model.modules()))
        assert base_of(lm).dtype == "float32"


def test_every_model_option_has_the_two_keys() -> None:
    for path in (CONF_DIR / "model").glob("*.yaml"):
        assert {"quantization: null", "edited: adapter"} <= {
            line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()
        }
