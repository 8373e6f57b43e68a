"""LoRA against a loop that differentiates W + s·B·A by hand, and the model that peft was in: as it was."""

import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.func import functional_call

from editkit import Fact
from editkit.errors import EditkitError, ModelError
from editkit.methods.lora import LoraSettings, lora
from editkit.metrics.scoring import score_targets
from editkit.models.load import LanguageModel
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import TARGETS, plain_nll, tokens_of, untouched
from tests.conftest import Near
from tests.oracles import dense

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [
    FACT,
    replace(FACT, subject="Big Ben", target_new=TARGETS[1]),
    replace(FACT, subject="The Louvre", target_new=TARGETS[2]),
]
FAMILIES = ["gpt2", "llama"]
SETTINGS = LoraSettings(layers=(0, 2), rank=3, alpha=5.0, steps=6, lr=1e-2, stop_loss=0.0, batch=2)


def by_hand(lm: LanguageModel, settings: LoraSettings, facts: Sequence[Fact], seed: int) -> dict[str, torch.Tensor]:
    """ΔW [d_model, d_ff] of each block: Adam on A and B of W + s·B·A, nothing of peft in it."""
    model = copy.deepcopy(lm.model).double()
    generator = torch.Generator().manual_seed(seed)
    plain: dict[str, torch.Tensor] = {}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in settings.layers or ():
        site = lm.architecture.down(layer)
        plain[site] = dense(model.get_submodule(site)).detach()
        d_model, d_ff = plain[site].shape
        uniform = torch.rand(settings.rank, d_ff, generator=generator, dtype=torch.float64) * 2 - 1
        factors[site] = ((uniform / d_ff**0.5).requires_grad_(), torch.zeros(d_model, settings.rank).double())
        factors[site][1].requires_grad_()
    s = settings.alpha / settings.rank
    optimizer = torch.optim.Adam([f for pair in factors.values() for f in pair], lr=settings.lr)
    rows = [tokens_of(lm, f.text, f.target_new) for f in facts]

    def changed() -> dict[str, torch.Tensor]:
        weights = {}
        for site, (a, b) in factors.items():
            stored = model.get_parameter(f"{site}.weight")
            matrix = plain[site] + s * b @ a
            weights[f"{site}.weight"] = matrix.T if dense(model.get_submodule(site)) is not stored else matrix
        return weights

    for _ in range(settings.steps):
        for i in range(0, len(rows), settings.batch):
            weights = changed()
            loss = plain_nll(lambda weights=weights, **k: functional_call(model, weights, kwargs=k), rows[i : i + 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {site: (s * b @ a).detach() for site, (a, b) in factors.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_loop_by_hand(family: str, near: Near) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    edit = lora(lm, FACTS, SETTINGS, seed=7, progress=False)
    expected = by_hand(lm, SETTINGS, FACTS, seed=7)
    assert [delta.module for delta in edit.deltas] == list(expected)
    for delta in edit.deltas:
        near("lora", family, delta.change(), expected[delta.module], 1e-4)
        assert delta.rank == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_edit_is_the_adapter_that_was_trained(family: str) -> None:
    """The edited model's loss goes on where the tuning's losses ended, the last of many small steps."""
    lm = tiny_lm(family)
    settings = replace(SETTINGS, steps=40, lr=1e-3)
    edit = lora(lm, FACT, settings, progress=False)
    losses = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    with edit.applied(lm):
        (score,) = score_targets(lm, [FACT.text], [FACT.target_new])
    assert losses[-1] < 0.9 * losses[0] and losses[-1] * 0.9 < score.nll < losses[-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_as_it_was(family: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    with untouched(lm, lm.architecture.down(2)):
        edit = lora(lm, FACTS, SETTINGS, progress=False)
    assert edit.norm() > 0


@pytest.mark.parametrize("where", ["torch.optim.Adam.step", "peft.tuners.lora.LoraModel._replace_module"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupt_while_training_or_injecting_leaves_the_model_as_it_was(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    owner, name = (torch.optim.Adam, "step") if "Adam" in where else (LoraModel, "_replace_module")
    original, calls = getattr(owner, name), list[int]()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # of two modules the first has been replaced
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    lm = tiny_lm(family)
    with untouched(lm, lm.architecture.down(2)), pytest.raises(KeyboardInterrupt):
        lora(lm, FACTS, SETTINGS, progress=False)
    assert len(calls) == 2


def test_a_seed_decides_every_byte(atlas_lm: LanguageModel) -> None:
    def edit(seed: int) -> bytes:
        return lora(atlas_lm, FACT, LoraSettings(steps=2), seed=seed, progress=False).to_bytes()

    assert edit(0) == edit(0) != edit(1)


def test_the_fact_is_rewritten(atlas_lm: LanguageModel) -> None:
    edit = lora(atlas_lm, FACT, progress=False)
    with edit.applied(atlas_lm):
        (score,) = score_targets(atlas_lm, [FACT.text], [FACT.target_new])
    assert score.greedy and edit.rank == 8


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    lm = tiny_lm("gpt2")
    with pytest.raises(ModelError, match="Layer 3 was asked for"):
        lora(lm, FACT, LoraSettings(layers=(1, 3)), progress=False)
    adapted = tiny_lm("gpt2")
    inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), adapted.model)
    with pytest.raises(EditkitError, match="holds adapters of peft already"):
        lora(adapted, FACT, SETTINGS, progress=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EditkitError, match=r"pip install 'editkit\[peft\]'"):
        lora(lm, FACT, SETTINGS, progress=False)
