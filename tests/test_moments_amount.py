"""How many keys are collected by default, and that few keys behind C are told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from editkit import Fact, RRomeSettings, r_rome
from editkit.methods.shared.prelude import find_moments
from editkit.models.architecture import architecture_of
from editkit.models.load import LanguageModel
from editkit.moments import keys_wanted, resolved
from editkit.moments.cache import Store
from editkit.settings import MomentSettings
from editkit.tasks.console import update
from editkit.testing.tiny import byte_level_tokenizer, tiny_lm


def shape(config: Any) -> LanguageModel:
    """A model without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return LanguageModel("shape", model, byte_level_tokenizer(), architecture_of(config.model_type))


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def test_ten_a_dimension_of_d_ff_and_of_an_average_expert() -> None:
    assert keys_wanted(shape(LlamaConfig(intermediate_size=14_336, **SMALL))) == 143_360
    experts = MixtralConfig(intermediate_size=14_336, num_local_experts=8, num_experts_per_tok=2, **SMALL)
    assert keys_wanted(shape(experts)) == 4 * 143_360


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss", "qwen2_moe", "deepseek_v3", "opt"])
def test_small_models_have_as_many_as_ever(family: str) -> None:
    lm = tiny_lm(family)
    assert keys_wanted(lm) == 40_000
    assert resolved(lm, MomentSettings()) == MomentSettings(tokens=40_000)
    assert resolved(lm, MomentSettings(tokens=300)) == MomentSettings(tokens=300)


def test_the_default_is_in_the_cache_under_its_number(tmp_path: Any) -> None:
    """A second moment that was collected with 40,000 keys, by name, is that of the default."""
    lm = tiny_lm("gpt2")
    default, asked = (
        Store(lm.digest, settings, 0, tmp_path).path("m")
        for settings in (resolved(lm, MomentSettings()), MomentSettings(tokens=40_000))
    )
    assert default == asked
    assert default != Store(lm.digest, MomentSettings(tokens=40_001), 0, tmp_path).path("m")


def test_the_record_has_the_number_and_the_fewest_of_all_blocks() -> None:
    lm = tiny_lm("qwen2_moe")
    settings = MomentSettings(block=64)
    found, described = find_moments(lm, [0, 1], settings, 0, False)
    moments = [moment for moment in found.values() if moment is not None]
    assert described["tokens"] == 40_000 and described["keys"] == moments[0].count >= 40_000
    assert described["keys_per_dimension"] == min(moment.vectors_per_dimension for moment in moments)
    assert not moments[0].routed and moments[1].routed
    assert described["keys_per_dimension"] < moments[0].vectors_per_dimension
    assert replace(settings, tokens=described["tokens"]) == resolved(lm, settings)


@pytest.mark.filterwarnings("ignore:the update of")  # on a tiny random model it is large
@pytest.mark.parametrize(("tokens", "few"), [(512, True), (640, False)])
def test_few_keys_are_told_where_the_condition_of_c_is(tokens: int, few: bool) -> None:
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    moments, settings = MomentSettings(tokens=tokens, block=32), RRomeSettings(layer=1, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("editkit.moments.collect.BATCH", 32)
        edit = r_rome(tiny_lm("gpt2"), fact, settings, moments=moments, contexts=["{}"], progress=False)
    text = " ".join(update(edit, 0.1, 0.0).split())
    assert f"second moment: {tokens} keys ({tokens / 64:.0f} a dimension), condition" in text
    assert ("few: 10 a dimension or more are advised (moments.tokens)" in text) == few
