"""A half model on the CPU runs in float32 while its weights keep their bits; every other model is left alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit import LanguageModel
from editkit.edits.base import base_of
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.memit import MemitSettings, memit
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.rome import RomeSettings, rome
from editkit.methods.shared.contexts import context_templates
from editkit.methods.shared.sites import at_lookup
from editkit.metrics.scoring import score_targets
from editkit.models import precision
from editkit.models.experts import down_of
from editkit.models.generate import generate, generate_batch
from editkit.models.load import load
from editkit.models.precision import HALF, wide, widened
from editkit.models.products import multiplies
from editkit.moments import second_moments
from editkit.nethook import Trace, get_module, get_parameter
from editkit.session import Session
from editkit.settings import ContextSettings, MomentSettings, TraceSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import everything, untouched
from editkit.tracing import trace
from tests.conftest import inputs_of
from tests.oracles import rome_update, second_moment
from tests.test_snapshot import random_edit

FAMILIES = list(SITES)
NO_MOMENTS = MomentSettings(enabled=False)
CONTEXTS = ["{}", "The old town. {}", "Because I was there for a long time then. {}"]
FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
OTHER = Fact("{} was born in", "Marie Curie", "Oslo", "Warsaw")
SETTINGS = RRomeSettings(layer=1, steps=4, lr=0.3, weight_decay=0.1, clamp=2.0, stop_loss=0.0)
IDS = torch.arange(3, 40).view(1, -1)


@pytest.fixture(params=HALF, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def in_half(patch: pytest.MonkeyPatch) -> None:
    """As if no memory were free for the float32 copies."""
    patch.setattr(precision, "free_bytes", lambda: 0)


def logits(lm: LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(input_ids=IDS).logits
    return found


@pytest.mark.cells
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_it_is_the_float32_model_and_outside_the_half_one(family: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    before, other = logits(lm), copy.deepcopy(lm)
    other.model.float()
    digest = lm.digest
    with untouched(lm, down_of(lm, 1)), widened(lm):
        assert lm.dtype == torch.float32
        inside = logits(lm)
    assert inside.dtype == torch.float32 and torch.equal(inside, logits(other))
    assert torch.equal(logits(lm), before) and before.dtype == dtype
    assert lm.digest == digest


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_modules_hold_their_own_weights(raised: type[BaseException]) -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    with untouched(lm, lm.architecture.down(1)), pytest.raises(raised), widened(lm):
        logits(lm)
        raise raised


def test_tied_weights_share_a_copy_and_flags_are_kept() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    head, embedding, norm = "lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"
    get_parameter(lm.model, norm).requires_grad_(False)
    with widened(lm):
        assert get_parameter(lm.model, head) is get_parameter(lm.model, embedding)
        assert get_parameter(lm.model, head).requires_grad and not get_parameter(lm.model, norm).requires_grad
        names = [name for name, _ in lm.model.named_parameters()]
    assert names == [name for name, _ in lm.model.named_parameters()]
    assert get_parameter(lm.model, head) is get_parameter(lm.model, embedding)
    assert get_parameter(lm.model, head).dtype == torch.float16


def test_hooks_of_the_caller_take_part() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    with widened(lm):
        plain = logits(lm)
        with Trace(lm.model, "transformer.h.1", edit=lambda h: 2 * h) as inside:
            logits(lm)
    with Trace(lm.model, "transformer.h.1", edit=lambda h: 2 * h) as around, widened(lm):
        assert not torch.equal(logits(lm), plain)
    assert inside.output.dtype == around.output.dtype == torch.float32
    assert torch.equal(inside.output, around.output)


def test_the_copies_are_of_the_weights_as_they_are_now() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    site = lm.architecture.down(1)
    weight = lm.model.get_parameter(f"{site}.weight")

    def same() -> bool:
        now = weight.float()
        with widened(lm):
            return torch.equal(lm.model.get_parameter(f"{site}.weight"), now)

    assert same()
    with random_edit(lm).applied(lm):
        assert same()
    assert same()
    weight.data.mul_(2)  # no version counter sees this
    assert same()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_keys_are_those_of_the_edited_model(family: str, dtype: torch.dtype) -> None:
    """As layer-wise methods need them between two writes."""
    lm = tiny_lm(family, dtype=dtype)
    site = lm.architecture.down(2)
    clean = at_lookup(lm, site, [FACT], CONTEXTS, "subject_last")
    with random_edit(lm).applied(lm):
        found = at_lookup(lm, site, [FACT], CONTEXTS, "subject_last")
        other = copy.deepcopy(lm)
    other.model.float()
    wanted = at_lookup(other, site, [FACT], CONTEXTS, "subject_last")
    assert torch.equal(found.input, wanted.input) and torch.equal(found.output, wanted.output)
    assert not torch.equal(found.input, clean.input)


def test_a_later_edit_is_computed_on_the_earlier_one(dtype: torch.dtype) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    options: dict[str, Any] = {"moments": NO_MOMENTS, "contexts": CONTEXTS, "progress": False}
    first = rome(lm, FACT, SETTINGS, **options)
    with first.applied(lm):
        second = rome(lm, OTHER, SETTINGS, **options)
    both = rome(lm, [FACT, OTHER], SETTINGS, **options).deltas[0]
    assert torch.equal(both.left, torch.cat([first.deltas[0].left, second.deltas[0].left], 1))
    assert not torch.equal(second.deltas[0].left, rome(lm, OTHER, SETTINGS, **options).deltas[0].left)
    contexts = context_templates(lm, SETTINGS.contexts, 0)
    with Session(lm, "r_rome", SETTINGS, moments=NO_MOMENTS, progress=False) as session:
        session.edit(FACT)
        wanted = rome(copy.deepcopy(lm), OTHER, SETTINGS, moments=NO_MOMENTS, contexts=contexts, progress=False)
        assert torch.equal(session.edit(OTHER).deltas[0].left, wanted.deltas[0].left)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bloom"])
def test_an_edit_is_seeded_to_the_byte_and_leaves_the_half_model_as_it_was(family: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    settings = replace(SETTINGS, contexts=ContextSettings(lengths=(4,), counts=(2,)))
    base, bits = base_of(lm), everything(lm.model)
    edits = [rome(lm, FACT, settings, moments=NO_MOMENTS, seed=3, progress=False) for _ in range(2)]
    assert edits[0].to_bytes() == edits[1].to_bytes()
    assert edits[0].base == base == base_of(lm) and base.dtype == str(dtype).removeprefix("torch.")
    with edits[0].applied(lm) as applied:
        assert lm.dtype == dtype
        score_targets(lm, [FACT.text], ["Rome"])
    assert applied.reversal is not None and applied.reversal.exact
    assert all(torch.equal(before, everything(lm.model)[name]) for name, before in bits.items())


def test_layer_wise_methods_leave_the_half_model_as_it_was(dtype: torch.dtype) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    settings = MemitSettings(
        layers=[0, 1], steps=4, lr=0.3, weight_decay=0.1, clamp=2.0, stop_loss=0.0, mom2_update_weight=10.0
    )
    with untouched(lm, lm.architecture.down(1)):
        edit = memit(lm, [FACT, OTHER], settings, moments=NO_MOMENTS, contexts=CONTEXTS, progress=False)
    assert len(edit.deltas) == 2


def test_values_are_nearer_to_exact_arithmetic_than_those_of_half(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both against the float64 oracle on the very same half weights, with contexts given and C = I."""
    lm = load("atlas", device="cpu", dtype=dtype)
    settings = RomeSettings(layer=4, steps=5, lr=0.5, clamp=4.0, weight_decay=0.5, stop_loss=0.0)
    rows, kl_row = inputs_of(lm, FACT, CONTEXTS)
    names = ("steps", "lr", "weight_decay", "kl_factor", "clamp", "stop_loss")
    constants = {name: getattr(settings, name) for name in names}
    site, identity = lm.architecture.down(4), torch.eye(768, dtype=torch.float64)
    wanted, _ = rome_update(lm.model, site, rows, kl_row, identity, mixed=True, **constants)

    def error() -> float:
        edit = rome(lm, FACT, settings, moments=NO_MOMENTS, contexts=CONTEXTS, progress=False)
        return float((edit.deltas[0].change() - wanted).norm() / wanted.norm())

    in_float32 = error()
    in_half(monkeypatch)
    with pytest.warns(UserWarning, match="less exact"):
        assert in_float32 <= 1e-3 and 10 * in_float32 < error()


def test_second_moments_are_nearer_to_exact_arithmetic_than_those_of_half(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    settings = MomentSettings(tokens=320, block=32)
    blocks: list[list[int]] = []
    embedding = get_module(lm.model, "transformer.wte")
    handle = embedding.register_forward_pre_hook(lambda _, args: blocks.extend(args[0].tolist()))
    found = second_moments(lm, [1], settings, progress=False, cache=tmp_path / "float32")[1]
    handle.remove()
    other = copy.deepcopy(lm.model)
    wanted = second_moment(other, other.get_submodule(lm.architecture.down(1)), blocks)
    in_half(monkeypatch)
    with pytest.warns(UserWarning, match="less exact"):
        half = second_moments(lm, [1], settings, progress=False, cache=tmp_path / "half")[1]
    near, far = ((each.matrix - wanted).norm() for each in (found, half))
    assert near <= 1e-5 * wanted.norm() and 10 * near < far


def test_scores_texts_and_traces_are_those_of_the_float32_model(dtype: torch.dtype) -> None:
    lm = load("atlas", device="cpu", dtype=dtype)
    other = copy.deepcopy(lm)
    other.model.float()
    settings = TraceSettings(kinds=("state",), samples=2, sigma=0.1)
    for one in (
        lambda lm: score_targets(lm, [FACT.text, OTHER.text], ["Paris", "Warsaw"]),
        lambda lm: generate(lm, [FACT.text], 5, top_k=5, seed=1),
        lambda lm: generate_batch(lm, [FACT.text, OTHER.text], 5),
        lambda lm: trace(lm, FACT, settings, progress=False).probability["state"].tolist(),
    ):
        assert one(lm) == one(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_model_is_left_alone(dtype: torch.dtype) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    before = list(lm.model.parameters())
    with widened(lm):
        assert all(a is b for a, b in zip(lm.model.parameters(), before, strict=True))


def test_a_model_that_is_not_all_plain_and_on_the_cpu_is_left_alone() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    assert precision._places(lm.model)
    elsewhere = copy.deepcopy(lm.model)
    get_module(elsewhere, "transformer.h.2").to("meta")  # as a GPU is: another device
    assert not precision._places(elsewhere)
    quantised = copy.deepcopy(lm.model)
    module = get_module(quantised, "transformer.h.0.mlp.c_fc")
    weight = get_parameter(module, "weight").to(torch.int8)
    module.register_parameter("weight", torch.nn.Parameter(weight, requires_grad=False))
    assert not precision._places(quantised)


def test_within_another_it_does_nothing() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    with widened(lm):
        before = list(lm.model.parameters())
        with widened(lm):
            assert all(a is b for a, b in zip(lm.model.parameters(), before, strict=True))
        assert all(a is b for a, b in zip(lm.model.parameters(), before, strict=True))


def test_where_memory_is_short_it_runs_in_half_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    monkeypatch.setattr(precision, "free_bytes", lambda: int(4 * count / precision.SHARE) - 4)
    with pytest.warns(UserWarning, match="float16 on the CPU, which is slow"), widened(lm):
        assert lm.dtype == torch.float16
    monkeypatch.setattr(precision, "free_bytes", lambda: int(4 * count / precision.SHARE) + 4)
    with widened(lm):
        assert lm.dtype == torch.float32
    monkeypatch.setattr(precision, "free_bytes", lambda: None)
    with widened(lm):
        assert lm.dtype == torch.float32


@pytest.mark.parametrize(("native", "small", "as_it_is"), [(True, 0, True), (True, 2**40, False), (False, 0, False)])
@pytest.mark.parametrize("dtype", HALF)
def test_a_large_model_runs_as_it_is_where_the_processor_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, native: bool, small: int, as_it_is: bool
) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "SMALL", small)
    multiplies.cache_clear()
    try:
        with widened(lm):
            assert lm.dtype == (dtype if as_it_is and dtype == torch.bfloat16 else torch.float32)
    finally:
        multiplies.cache_clear()


def test_a_write_to_a_copy_is_an_error() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    before = everything(lm.model)
    edit = random_edit(lm)
    with pytest.raises(EditkitError, match=r"weight of 'tiny-gpt2' was written while .* is lost"), widened(lm):
        edit.apply(lm, check=False)
    assert all(torch.equal(bits, everything(lm.model)[name]) for name, bits in before.items())


def test_copies_made_in_inference_mode_take_gradients() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    with torch.inference_mode(), widened(lm), torch.inference_mode(False), torch.enable_grad():
        torch.autograd.backward(lm.model(input_ids=IDS).logits.sum())
        assert get_parameter(lm.model, "lm_head.weight").grad is not None
    assert get_parameter(lm.model, "lm_head.weight").grad is None


def test_the_dtype_of_sums() -> None:
    assert [wide(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)] == [torch.float32] * 3
    assert wide(torch.float64) == torch.float64
