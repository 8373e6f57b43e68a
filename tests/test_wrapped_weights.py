"""Weights under PEFT's adapters, tied, computed from others, or without values: edited, or refused in one line."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from editkit import Edit, EditkitError, Fact, Session
from editkit.edits import base_of, low_rank_delta
from editkit.errors import ModelError
from editkit.methods.memit import MemitSettings, memit
from editkit.models.load import LanguageModel
from editkit.models.wrapped import plain_name
from editkit.nethook import get_module, get_parameter
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.editing import edited
from tests.test_session import SETTINGS as SESSION_SETTINGS
from tests.test_wrapped import FACT, FAMILIES, MOMENTS, OTHER, checkpointed, compiled_block, state

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys

VALUES = ("rome", "r_rome", "memit", "pmet", "alphaedit", "emmet", "anyedit")
METHODS = (*VALUES, "ft", "ft_l", "mend", "ultraedit", "stableedit", "crispedit", "ft_bf", "kn")
SIGNS = ("ft", "ft_l", "ft_bf", "crispedit")  # Adam on a weight: its first steps are the signs of small gradients
OTHERS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"]}
DOWN = {"gpt2": ["mlp.c_proj"], "llama": ["down_proj"]}


def adapted(family: str, targets: list[str], *, start: bool = False, **options: Any) -> tuple[LanguageModel, Any]:
    """A tiny model with LoRA adapters, and the PeftModel around it. B is not 0, unless `start`."""
    lm = tiny_lm(family)
    options = {"lora_dropout": 0.5} | options
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options)
    outer: Any = peft.get_peft_model(lm.model, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in outer.named_parameters():
        if "lora_B" in name and not start:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    outer.train()
    return replace(lm, model=outer), outer


WHERE: dict[str, tuple[dict[str, list[str]], dict[str, Any]]] = {
    "on other modules": (OTHERS, {}),
    "on the down-projections": (DOWN, {}),
    "and a copy of the head": (OTHERS, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.cells
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_under_an_adapter_the_edit_is_that_of_the_merged_model(
    family: str, where: str, method: str, tmp_path: Path
) -> None:
    """The model that is edited is the one with its adapters; the oracle has them in its weights."""
    targets, options = WHERE[where]
    lm, outer = adapted(family, targets[family], **options)
    merged: Any = copy.deepcopy(outer).merge_and_unload()
    before, outer_modes = state(lm.model), state(outer)
    if method == "kn" and targets is DOWN:
        with pytest.raises(ModelError, match="its weight is not all that a unit writes"):
            edited(lm, method, tmp_path)
        return
    edit = edited(lm, method, tmp_path)
    assert state(lm.model) == before and state(outer) == outer_modes
    oracle = edited(replace(lm, model=merged), method, tmp_path)
    assert [delta.module for delta in edit.deltas] == [lm.architecture.down(layer) for layer in _layers(edit)]
    for ours, wanted in zip(edit.deltas, oracle.deltas, strict=True):
        assert (ours.module, ours.orientation, ours.bias) == (wanted.module, wanted.orientation, wanted.bias)
        apart = (ours.change() - wanted.change()).norm() / wanted.change().norm()
        assert apart < (0.02 if method in SIGNS else 1e-3)
    ids = torch.tensor([[5, 6, 7, 8]])
    outer.eval()
    merged.eval()
    in_merged = edit.applied(replace(lm, model=merged), check=False)
    with torch.no_grad(), edit.applied(lm, everything=True) as applied, in_merged:
        torch.testing.assert_close(outer(ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-3)
    assert applied.reversal is not None and applied.reversal.exact
    outer.train()
    assert state(lm.model) == before


def _layers(edit: Edit) -> list[int]:
    return [int(next(part for part in delta.module.split(".") if part.isdecimal())) for delta in edit.deltas]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_does_nothing_changes_an_edit_by_rounding_alone(family: str, tmp_path: Path) -> None:
    """Its zeros are one term more in the sums of gradients, so that these are summed in another order."""
    plain = edited(tiny_lm(family), "r_rome", tmp_path)
    lm, outer = adapted(family, DOWN[family], start=True)
    edit = edited(lm, "r_rome", tmp_path)
    for a, b in zip(edit.deltas, plain.deltas, strict=True):
        assert (a.change() - b.change()).norm() < 2e-6 * b.change().norm()
    assert edit.base != plain.base  # adapters are a part of the model, so its digest is another
    with pytest.raises(EditkitError, match="other weights than the edited ones differ"), plain.applied(lm):
        pass
    with plain.applied(lm, check=False) as applied:  # who knows that they do nothing may say so
        weight = get_parameter(lm.model, plain.deltas[0].parameter)
        assert weight is get_parameter(outer.get_base_model(), f"{plain.deltas[0].module}.base_layer.weight")
    assert applied.reversal is not None and applied.reversal.exact
    unloaded: Any = outer.unload()
    assert edited(replace(lm, model=unloaded), "r_rome", tmp_path).digest == plain.digest


def test_adapters_and_compiled_blocks_added_while_an_edit_is_applied_do_not_keep_it(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    start, edit = lm.digest, edited(lm, "r_rome", tmp_path)
    with edit.applied(lm, everything=True) as applied:
        outer: Any = peft.get_peft_model(lm.model, peft.LoraConfig(target_modules=DOWN["gpt2"]))
        compiled_block(lm)
    assert applied.reversal is not None and applied.reversal.exact
    assert replace(lm, model=outer.unload()).digest == start


def test_a_session_under_adapters_undoes_each_step_and_leaves_the_adapter() -> None:
    lm, outer = adapted("gpt2", DOWN["gpt2"])
    before = state(outer)
    with Session(lm, "r_rome", SESSION_SETTINGS["r_rome"], moments=MOMENTS, progress=False) as session:
        session.edit(FACT)
        first = lm.digest
        session.edit(OTHER)
        session.undo(1)
        assert lm.digest == first
        with outer.disable_adapter():
            assert lm.digest == first  # nothing but a switch
    assert state(outer) == before


def test_an_adapter_merged_elsewhere_is_no_hindrance(tmp_path: Path) -> None:
    lm, outer = adapted("gpt2", OTHERS["gpt2"])
    wanted = edited(lm, "r_rome", tmp_path)
    outer.merge_adapter()
    before = state(outer)
    found = edited(lm, "r_rome", tmp_path)
    apart = (found.deltas[0].change() - wanted.deltas[0].change()).norm() / wanted.deltas[0].change().norm()
    assert apart < 1e-3 and state(outer) == before


def test_a_mixture_is_edited_under_adapters_of_attention_and_refused_under_those_of_its_experts(tmp_path: Path) -> None:
    lm, outer = adapted("mixtral", ["q_proj", "v_proj"])
    merged: Any = copy.deepcopy(outer).merge_and_unload()
    oracle = edited(replace(lm, model=merged), "r_rome", tmp_path).deltas[0]
    before = state(outer)
    found = edited(lm, "r_rome", tmp_path).deltas[0]
    assert (found.change() - oracle.change()).norm() / oracle.change().norm() < 1e-3
    assert (found.module, found.experts) == (oracle.module, oracle.experts) and state(outer) == before
    lm, outer = adapted("mixtral", [], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)
    for method in ("r_rome", "ft"):
        with pytest.raises(ModelError, match=r"no plain LoRA \(.*ParamWrapper\).*merge_and_unload"):
            edited(lm, method, tmp_path)


def test_adapters_compiled_blocks_and_checkpoints_together(tmp_path: Path) -> None:
    lm, outer = adapted("gpt2", DOWN["gpt2"])
    wanted = edited(lm, "memit", tmp_path).digest
    compiled_block(checkpointed(True)(lm))
    both: Any = torch.compile(outer, backend="eager")
    lm = replace(lm, model=both)
    before = state(lm.model)
    assert edited(lm, "memit", tmp_path).digest == wanted
    assert state(lm.model) == before


# What is refused


def merged_adapter(lm: LanguageModel) -> LanguageModel:
    model, outer = adapted("gpt2", DOWN["gpt2"])
    outer.merge_adapter()
    return model


def dora(lm: LanguageModel) -> LanguageModel:
    return adapted("gpt2", DOWN["gpt2"], use_dora=True)[0]


def scaled(lm: LanguageModel) -> LanguageModel:
    config = peft.IA3Config(target_modules=["mlp.c_proj"], feedforward_modules=["mlp.c_proj"])
    outer: Any = peft.get_peft_model(lm.model, config)
    return replace(lm, model=outer)


def copied(lm: LanguageModel) -> LanguageModel:
    return adapted("gpt2", ["c_attn"], modules_to_save=["mlp.c_proj"])[0]


def normed(lm: LanguageModel) -> LanguageModel:
    parametrizations.weight_norm(get_module(lm.model, lm.architecture.down(1)))
    return lm


def pruned(lm: LanguageModel) -> LanguageModel:
    prune.random_unstructured(get_module(lm.model, lm.architecture.down(1)), "weight", 0.5)
    return lm


def empty(lm: LanguageModel) -> LanguageModel:
    down = get_module(lm.model, lm.architecture.down(1))
    down.weight = nn.Parameter(torch.empty(64, 32, device="meta"))
    return lm


REFUSED: dict[str, tuple[Callable[[LanguageModel], LanguageModel], str]] = {
    "a merged adapter": (merged_adapter, r"the adapter default is merged into it.*model\.unmerge_adapter\(\) first"),
    "DoRA": (dora, r"no plain LoRA \(DoraLinearVariant\).*merge_and_unload"),
    "IA3": (scaled, r"no plain LoRA \(peft\.tuners\.ia3.*merge_and_unload"),
    "a copy of PEFT's": (copied, r"PEFT trains a copy of it.*merge_and_unload"),
    "a parametrised weight": (normed, r"computed from other parameters \(_WeightNorm\).*remove_parametrizations"),
    "a pruned weight": (pruned, r"computed from others \(.*weight_orig.*prune\.remove"),
    "no values": (empty, "it lies on the meta device.*Load the model with its weights"),
}


@pytest.mark.parametrize("method", ["r_rome", "memit", "ft", "lora", "mend", "ultraedit", "ft_bf", "crispedit"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_weight_that_cannot_be_edited_truly_is_refused_at_once(
    what: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap, message = REFUSED[what]
    lm = wrap(tiny_lm("gpt2"))
    before = None if what == "no values" else state(lm.model)
    with pytest.raises(EditkitError, match=message) as caught:
        edited(lm, method, tmp_path)
    assert "\n" not in str(caught.value)
    assert before is None or state(lm.model) == before


@pytest.mark.parametrize("what", REFUSED)
def test_an_edit_is_not_written_there_either(what: str, tmp_path: Path) -> None:
    edit = edited(tiny_lm("gpt2"), "r_rome", tmp_path)
    lm = REFUSED[what][0](tiny_lm("gpt2"))
    before = None if what == "no values" else state(lm.model)
    for check in (True, False):
        with pytest.raises(EditkitError, match=REFUSED[what][1]), edit.applied(lm, check=check):
            pass
    assert before is None or state(lm.model) == before


def test_an_adapter_merged_in_the_middle_of_a_session_stops_it() -> None:
    lm, outer = adapted("gpt2", DOWN["gpt2"])
    session = Session(lm, "r_rome", SESSION_SETTINGS["r_rome"], moments=MOMENTS, progress=False)
    session.edit(FACT)
    outer.merge_adapter()
    with pytest.raises(ModelError, match="is merged into it"):
        session.reset()
    outer.unmerge_adapter()


def test_lora_wants_a_model_without_adapters(tmp_path: Path) -> None:
    lm, outer = adapted("gpt2", OTHERS["gpt2"])
    before = state(outer)
    with pytest.raises(EditkitError, match="holds adapters of peft already.*merge_and_unload"):
        edited(lm, "lora", tmp_path)
    assert state(outer) == before


def test_virtual_tokens_are_refused() -> None:
    lm = tiny_lm("gpt2")
    outer: Any = peft.get_peft_model(lm.model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match=r"'default' of PEFT is of kind PROMPT_TUNING.*model\.get_base_model\(\)"):
        replace(lm, model=outer)


def test_a_model_without_any_values_is_refused(tmp_path: Path) -> None:
    for method in ("r_rome", "ft", "lora"):
        lm = tiny_lm("gpt2")
        lm.model.to("meta")  # pyright: ignore[reportArgumentType]
        with pytest.raises(EditkitError, match="meta device.*Load the model with its weights"):
            edited(lm, method, tmp_path)


def test_a_parametrised_weight_elsewhere_is_no_hindrance(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    parametrizations.weight_norm(get_module(lm.model, lm.architecture.attention.format(0) + ".c_attn"))
    before = state(lm.model)
    edit = edited(lm, "r_rome", tmp_path)
    wanted = edited(tiny_lm("gpt2"), "r_rome", tmp_path)
    torch.testing.assert_close(edit.deltas[0].change(), wanted.deltas[0].change(), rtol=1e-2, atol=1e-3)
    with edit.applied(lm) as applied:
        pass
    assert applied.reversal is not None and applied.reversal.exact and state(lm.model) == before


# Tied weights


def test_an_edit_of_a_tied_head_changes_both_and_comes_off() -> None:
    lm = tiny_lm("gpt2")
    head = lm.model.get_parameter("lm_head.weight")
    assert head is lm.model.get_parameter("transformer.wte.weight")
    before, rows = state(lm.model), head.detach().clone()
    torch.manual_seed(0)
    delta = low_rank_delta(lm, "lm_head", torch.randn(len(lm.tokenizer), 1), torch.randn(1, 32))
    edit = Edit((delta,), base_of(lm))
    with edit.applied(lm, everything=True) as applied:
        now = lm.model.get_parameter("transformer.wte.weight")
        assert now is lm.model.get_parameter("lm_head.weight") is head
        torch.testing.assert_close(now - rows, delta.matrix(), rtol=1e-3, atol=1e-5)
    assert applied.reversal is not None and applied.reversal.exact and state(lm.model) == before


def test_blocks_that_share_one_weight() -> None:
    lm = tiny_lm("llama")
    first, second = (get_module(lm.model, lm.architecture.down(layer)) for layer in (0, 1))
    second.weight = first.weight
    before = state(lm.model)
    options: dict[str, Any] = {"moments": MomentSettings(enabled=False), "contexts": ["{}"], "progress": False}
    asked: dict[str, Any] = {"steps": 2, "lr": 0.1, "weight_decay": 0.1, "clamp": 4.0}
    with pytest.raises(ModelError, match=r"layers\.0.* and .*layers\.1.* are one tied weight.*Give one of the blocks"):
        memit(lm, Fact(FACT.prompt, FACT.subject, "Rome"), MemitSettings(layers=[0, 1], **asked), **options)
    with pytest.warns(UserWarning, match=r"layers\.1\.mlp\.down_proj\.weight is tied to model\.layers\.0"):
        edit = memit(lm, FACT, MemitSettings(layers=[1], **asked), **options)
    with edit.applied(lm, everything=True) as applied:
        assert first.weight is second.weight
    assert applied.reversal is not None and applied.reversal.exact and state(lm.model) == before


def test_plain_names() -> None:
    assert plain_name("a._orig_mod.b.base_layer.weight") == "a.b.weight" == plain_name("a.b.weight")
