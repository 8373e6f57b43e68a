"""editkit.testing: sound methods and families pass it; each planted fault is named."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from editkit import testing
from editkit.edits import Edit, base_of, low_rank_delta
from editkit.errors import ConfigError, EditkitError
from editkit.facts import Fact
from editkit.methods import register, unregister
from editkit.methods.ft import FtSettings
from editkit.models import architecture
from editkit.models.load import LanguageModel
from editkit.nethook import get_parameter
from editkit.settings import MethodSettings
from editkit.testing.of_method import FACTS
from editkit.testing.tiny import build, llama_like_tokenizer, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:The second moment at")


@dataclass(frozen=True)
class NudgeSettings(MethodSettings):
    """How far to go along the gradient."""

    layer: int = 1
    fault: str = ""


def nudge(
    lm: LanguageModel, facts: Fact | Sequence[Fact], settings: NudgeSettings, *, seed: int = 0, progress: bool = True
) -> Edit:
    """A step up the gradient of log p(target_new), with a fault that is asked for."""
    fact = facts if isinstance(facts, Fact) else facts[0]
    site = lm.architecture.down(settings.layer)
    weight = get_parameter(lm.model, f"{site}.weight")
    if settings.fault == "refuses":
        raise EditkitError("nudge takes no such model. Choose another.")
    if settings.fault == "writes":
        with torch.no_grad():
            weight[0, 0] += 1
    if settings.fault == "hook":
        lm.model.register_forward_hook(lambda *_: None)
    rows = lm.tokenizer(f"{fact.text} {fact.target_new}", return_tensors="pt")["input_ids"]
    prompt = len(lm.tokenizer(fact.text)["input_ids"])
    with torch.enable_grad():
        logits = lm.model(input_ids=rows).logits[0].float().log_softmax(-1)
        loss = -logits[torch.arange(prompt - 1, rows.shape[1] - 1), rows[0, prompt:]].mean()
        (gradient,) = torch.autograd.grad(loss, weight)
    step = -2.0 * gradient.float()
    step = step if architecture.orientation(lm.model.get_submodule(site), site) == "out_in" else step.T
    if settings.fault == "unseeded":
        step = step + 1e-4 * torch.randn_like(step)
    if settings.fault == "down":
        step = -step
    u, s, vt = torch.linalg.svd(step, full_matrices=False)
    return Edit((low_rank_delta(lm, site, u[:, :4] * s[:4], vt[:4]),), base_of(lm), {"method": "nudge"})


@contextlib.contextmanager
def registered() -> Iterator[None]:
    register("nudge", nudge, NudgeSettings)
    try:
        yield
    finally:
        unregister("nudge")


def check(fault: str = "") -> testing.Conformance:
    with registered():
        settings, facts = NudgeSettings(fault=fault), [Fact("{} is in", "Rome", "Spain")]
        return testing.check_method("nudge", settings, families=["llama"], dtypes=[torch.float32], facts=facts)


def test_a_sound_method_passes_every_check() -> None:
    found = check().require()
    assert [each.check for each in found.findings] == [
        "untouched",
        "seeded",
        "shapes",
        "saved",
        "restored",
        "effective",
    ]
    assert str(found) == "method 'nudge': 6 checks hold, 0 fail, 0 cells refused"


@pytest.mark.parametrize(
    ("fault", "named"), [("writes", "untouched"), ("hook", "untouched"), ("unseeded", "seeded"), ("down", "effective")]
)
def test_a_planted_fault_is_named(fault: str, named: str) -> None:
    found = check(fault)
    assert named in {each.check for each in found.failed}
    with pytest.raises(AssertionError, match=f"llama in float32: {named}"):
        found.require()


def test_a_refusal_is_no_failure() -> None:
    found = check("refuses")
    assert [each.check for each in found.refused] == ["computed"] and found.require() is found
    assert "refused llama in float32: computed: nudge takes no such model" in str(found)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match="No method"):
        testing.check_method("nugde")


def test_our_own_method_passes_in_half_precision_too() -> None:
    settings = FtSettings(layer=1, steps=3, lr=5e-3)
    testing.check_method("ft", settings, families=["gpt2", "mixtral"], facts=FACTS[:1]).require()


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "qwen2_moe"])
def test_our_families_pass(family: str) -> None:
    lm = tiny_lm(family)
    found = testing.check_family(lm.model, lm.tokenizer).require()
    assert "replayed" in {each.check for each in found.findings}


def test_a_wrong_name_of_a_family_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The up-projection in place of the down-projection."""
    wrong = replace(architecture.architecture_of("llama"), down_projection="model.layers.{}.mlp.up_proj")
    monkeypatch.setattr("editkit.testing.of_family.architecture_of", lambda family: wrong)
    found = testing.check_family(build("llama", vocab_size=512), llama_like_tokenizer())
    assert [each.check for each in found.failed] == ["named"] and "d_model is 32" in found.failed[0].problem
