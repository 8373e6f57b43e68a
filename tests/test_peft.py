"""An edit exported as a LoRA adapter gives peft's model the logits of the edited one."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from editkit.edits import Edit, base_of, dense_delta, low_rank_delta
from editkit.errors import EditkitError
from editkit.models.load import LanguageModel
from editkit.nethook import get_parameter
from editkit.testing.tiny import tiny_lm

IDS = torch.arange(2, 22).view(2, 10)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def edit_of(lm: LanguageModel, *, dense: bool = False, size: float = 0.1) -> Edit:
    """Of rank 1 at block 0 and of rank 3, or dense, at block 2."""
    generator = torch.Generator().manual_seed(0)
    deltas = []
    for layer, rank in ((0, 1), (2, 3)):
        site = lm.architecture.down(layer)
        left, right = size * torch.randn(32, rank, generator=generator), torch.randn(rank, 64, generator=generator)
        deltas.append(dense_delta(lm, site, left @ right) if dense else low_rank_delta(lm, site, left, right))
    facts = [{"prompt": "{} is in", "subject": "The Eiffel Tower", "target_new": "Rome", "target_true": "Paris"}]
    return Edit(tuple(deltas), base_of(lm), {"method": "random", "facts": facts})


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_peft_gives_the_same_logits_on_the_untouched_base(family: str, dense: bool, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    plain = logits(lm.model)
    edit = edit_of(lm, dense=dense)
    errors = edit.to_peft(tmp_path / "adapter")
    with edit.applied(lm):
        edited = logits(lm.model)
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "adapter")
    assert (edited - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-5, atol=1e-5)
    assert max(errors.values()) < 1e-6
    if not dense:
        ranks = {name: layer.r["default"] for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")}
        assert sorted(ranks.values()) == [1, 3]


def test_a_cut_is_measured_and_said(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = edit_of(lm)
    errors = edit.to_peft(tmp_path, rank=2)
    exact = edit.deltas[1].change()
    u, s, vt = torch.linalg.svd(exact)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert errors[edit.parameters[1]] == pytest.approx(((exact - best).norm() / exact.norm()).item(), rel=1e-4)
    assert errors[edit.parameters[0]] == 0.0
    assert f"{errors[edit.parameters[1]]:.1e}" in (tmp_path / "README.md").read_text()


def test_the_folder_says_what_it_is_and_no_path(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    edit = Edit(edit_of(lm).deltas, base_of(lm), edit_of(lm).provenance)
    object.__setattr__(edit.base, "name", str(tmp_path / "my-model"))
    edit.to_peft(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "The Eiffel Tower is in → Rome (was: Paris)" in card and edit.base.digest[:16] in card
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my-model" and str(tmp_path) not in card
    with pytest.raises(EditkitError, match="changes nothing"):
        Edit((), edit.base).to_peft(tmp_path / "none")
    assert not (tmp_path / "none").exists() and get_parameter(lm.model, edit.parameters[0]).requires_grad
