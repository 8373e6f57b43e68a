"""Quantised models are edited by both ways: the edit is that of the float model with the same weights, and every bit of
weights and quantisation state is back. Real bitsandbytes and torchao, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from editkit import Edit, Fact, RRomeSettings, load, r_rome
from editkit.edits import base_of, low_rank_delta
from editkit.errors import EditkitError, ModelError, ReversalError
from editkit.metrics.scoring import score_targets
from editkit.models.architecture import architecture_of
from editkit.models.experts import down_of
from editkit.models.load import BUNDLED, LanguageModel
from editkit.models.quantized import dequantized, scheme_of
from editkit.models.snapshot import Snapshot, digests, tensors_of
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.quantized import CELLS, FAMILIES, apart, every_bit, float_twin, logits, need, quantized_lm, same, saved

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
SETTINGS = RRomeSettings(layer=1, steps=6, lr=0.1, contexts=ContextSettings(lengths=(4,), counts=(2,)))
# How far logits with the same ΔW, and ΔW itself, may be apart: bitsandbytes rounds the inputs of 8-bit layers to int8
# (measured: 0.02 and 0.08 at most), the others round nothing (1e-6 and 3e-6).
LOGITS = {"bnb-8bit": 0.05}
CHANGE = {"bnb-8bit": 0.25}


def edited(lm: LanguageModel) -> Edit:
    return r_rome(
        lm, FACT, SETTINGS, moments=MomentSettings(tokens=2000), contexts=["{}", "It is so. {}"], progress=False
    )


def random_edit(lm: LanguageModel, layer: int = 1, scale: float = 0.3) -> Edit:
    """Of rank 2, larger than what quantising leaves out."""
    module = down_of(lm, layer)
    weight = dequantized(lm.model.get_submodule(module))
    generator = torch.Generator().manual_seed(layer)
    left = torch.randn(weight.shape[0], 2, generator=generator)
    right = scale * weight.norm() * torch.randn(2, weight.shape[1], generator=generator) / weight.numel() ** 0.5
    return Edit((low_rank_delta(lm, module, left, right),), base_of(lm))


@pytest.mark.cells
@pytest.mark.parametrize(("scheme", "way"), CELLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_that_of_the_float_model_with_the_same_weights(family: str, scheme: str, way: str) -> None:
    lm = quantized_lm(family, scheme, way)
    twin = float_twin(lm, family)
    assert apart(logits(lm), logits(twin)) < LOGITS.get(scheme, 1e-5)
    logits(lm)
    before, digest = every_bit(lm.model), lm.digest

    edit, wanted = edited(lm), edited(twin)
    assert same(before, lm.model), "computing an edit changed the model"
    (delta,), (other,) = edit.deltas, wanted.deltas
    assert apart(delta.change(), other.change()) < CHANGE.get(scheme, 1e-4)

    # The same ΔW on both.
    again = Edit((low_rank_delta(twin, other.module, delta.left, delta.right),), base_of(twin))  # type: ignore[arg-type]
    clean = logits(lm)
    with edit.applied(lm, everything=True) as applied, again.applied(twin):
        assert lm.digest != digest
        found, expected = logits(lm), logits(twin)
        assert apart(found, expected) < LOGITS.get(scheme, 1e-5)
        assert apart(found, clean) > 0.01
        score_targets(lm, [FACT.text], [FACT.target_new])
    assert applied.reversal is not None and applied.reversal.exact
    assert same(before, lm.model) and lm.digest == digest
    assert torch.equal(logits(lm), clean)


@pytest.mark.parametrize(("scheme", "way"), CELLS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_bit_is_back_after_an_exception(family: str, scheme: str, way: str) -> None:
    lm = quantized_lm(family, scheme, way)
    edit, before = random_edit(lm), every_bit(lm.model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), edit.applied(lm):
            assert not same(before, lm.model)
            logits(lm)
            raise error
        assert same(before, lm.model)
    module = lm.model.get_submodule(edit.deltas[0].module)
    with pytest.raises(EditkitError, match="not finite in torch.float32"):
        (edit * 1e38 * 10).apply(lm)
    assert same(before, lm.model) and lm.model.get_submodule(edit.deltas[0].module) is module


@pytest.mark.parametrize(("scheme", "way"), CELLS)
def test_edits_lie_on_each_other_and_come_off_one_by_one(scheme: str, way: str) -> None:
    lm = quantized_lm("llama", scheme, way)
    twin = float_twin(lm, "llama")
    first, second = random_edit(lm), random_edit(lm, scale=0.2) * -1.5
    other = random_edit(lm, layer=0)
    before = every_bit(lm.model)
    with first.applied(lm):
        between = every_bit(lm.model)
        with second.applied(lm, check=False), other.applied(lm, check=False):
            both = logits(lm)
        assert same(between, lm.model)
    assert same(before, lm.model)
    weight = dict(twin.model.named_parameters())
    with torch.no_grad():
        for delta in (*first.deltas, *second.deltas, *other.deltas):
            weight[delta.parameter].add_(delta.change().float())
    assert apart(both, logits(twin)) < LOGITS.get(scheme, 1e-5)


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", "torchao-int4"])
def test_a_write_to_codes_or_state_is_seen_and_undone(scheme: str) -> None:
    lm = quantized_lm("llama", scheme)
    module = down_of(lm, 1)
    before = every_bit(lm.model)
    logits(lm)
    stored = {name: tensor for name, tensor in tensors_of(lm.model).items() if name.startswith(f"{module}.weight")}
    assert len(stored) >= 2  # codes, and at least one tensor of scales
    whole, known = Snapshot.take(lm.model, [], everything=True), lm.digest
    touched = Snapshot.take(lm.model, [f"{module}.weight"], everything=False)
    assert set(touched.clones) >= set(stored)
    for name, tensor in stored.items():
        bytes_ = tensor.view(-1).view(torch.uint8)
        bytes_[0] ^= 1
        assert touched.verify().unequal == (name,) and whole.verify().unequal == (name,)
        assert lm.digest != known, f"the digest does not see {name}"
        with pytest.raises(ReversalError, match=name):
            touched.verify().require()
        touched.restore()
        assert touched.verify().exact and whole.verify().exact and lm.digest == known
    assert same(before, lm.model)


def test_double_quantisation_is_covered_too() -> None:
    need("bnb-nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), **options).eval()
    lm = LanguageModel("nested", model, tiny_lm("llama").tokenizer, architecture_of("llama"))
    module = down_of(lm, 1)
    assert scheme_of(model.get_submodule(module)) == "bnb-nf4"
    names = [name for name in tensors_of(model) if name.startswith(f"{module}.weight")]
    assert len(names) == 6  # codes, absmax as codes, offset, and the scales and two code books
    before, edit = every_bit(model), random_edit(lm)
    twin = float_twin(lm, "llama")
    with edit.applied(lm) as applied:
        with torch.no_grad():
            twin.model.get_parameter(f"{module}.weight").add_(edit.deltas[0].change().float())
        assert apart(logits(lm), logits(twin)) < 1e-5
    assert applied.reversal is not None and applied.reversal.exact and same(before, model)


def test_a_model_that_bitsandbytes_has_packed_is_refused() -> None:
    """Processors with AVX-512 for bfloat16 alone do it: elsewhere the mark that it leaves is set by hand."""
    need("bnb-nf4")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    for run in (False, True):
        model = AutoModelForCausalLM.from_pretrained(BUNDLED["atlas"], **options).eval()
        ids, name = torch.ones(1, 3, dtype=torch.long), "transformer.h.1.mlp.c_proj"
        if not run:
            lm = LanguageModel("mine", model, tiny_lm("gpt2").tokenizer, architecture_of("gpt2"))
            before = every_bit(model)
            with torch.no_grad():
                model(input_ids=ids)
            assert same(before, lm.model)  # never packed from here on
            continue
        with torch.no_grad():
            model(input_ids=ids)
        weight: Any = model.get_submodule(name).weight
        weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(ModelError, match="has packed this model's weights.*Load it again"):
            LanguageModel("mine", model, tiny_lm("gpt2").tokenizer, architecture_of("gpt2"))


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "torchao-int8", "torchao-int4"])
def test_looking_at_a_model_changes_none_of_its_tensors(scheme: str) -> None:
    lm = quantized_lm("opt", scheme)  # has biases, which bitsandbytes casts
    known = digests(tensors_of(lm.model))
    logits(lm)
    lm.model(**lm.tokenizer("a b", return_tensors="pt", return_token_type_ids=False)).logits.sum()
    assert digests(tensors_of(lm.model)) == known


@pytest.mark.parametrize(("scheme", "way"), CELLS)
def test_bases_with_half_activations_are_edited_too(scheme: str, way: str) -> None:
    lm = quantized_lm("opt", scheme, way, dtype="bfloat16")
    before, clean = every_bit(lm.model), logits(lm)
    edit = random_edit(lm)
    assert edit.base.dtype == f"{scheme}/bfloat16"
    with edit.applied(lm) as applied:
        assert logits(lm).dtype == torch.bfloat16 and apart(logits(lm), clean) > 0.01
    assert applied.reversal is not None and applied.reversal.exact
    assert same(before, lm.model) and torch.equal(logits(lm), clean)


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4"])
def test_a_checkpoint_that_is_quantised_already_loads_as_it_is(scheme: str, tmp_path: Path) -> None:
    lm = quantized_lm("llama", scheme)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path, device="cpu")
    assert found.quantization == lm.quantization == scheme
    assert found.digest == lm.digest and torch.equal(logits(found), logits(lm))
    edit, before = random_edit(lm), every_bit(found.model)
    edit.save(tmp_path / "edit.safetensors")
    with Edit.load(tmp_path / "edit.safetensors").applied(found):
        assert apart(logits(found), logits(lm)) > 0.01
    assert same(before, found.model)
    with pytest.raises(ModelError, match="quantised already, by bitsandbytes.*Leave model.quantization out"):
        load(tmp_path, device="cpu", quantization=scheme)
