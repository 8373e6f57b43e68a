"""Every method, a session, files and the command on quantised models; what is left when they are quantised again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from editkit import Edit, Session, apply_files
from editkit.edits import base_of, compressed, low_rank_delta, requantized, spectra
from editkit.errors import EditkitError
from editkit.methods import names
from editkit.methods.shared.likelihood import descend
from editkit.models.experts import down_of
from editkit.models.quantized import Beside, dequantized, quantized_again
from editkit.runs.names import EDITS
from editkit.testing.tiny import tiny_lm
from tests.editing import edited, method_families
from tests.quantized import CELLS, apart, every_bit, float_twin, logits, need, parts, quantized_lm, same
from tests.run_folders import FAST, really_run, record_of
from tests.test_quantized import edited as r_rome_edit
from tests.test_quantized import random_edit
from tests.test_session import FACTS, MOMENTS
from tests.test_session import SETTINGS as SESSION_SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys

SIX = [cell for cell in CELLS if cell[0] in ("bnb-8bit", "bnb-nf4", "torchao-int4")]


@pytest.mark.cells
@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_every_method_lands_and_comes_off(method: str, scheme: str, way: str, tmp_path: Path) -> None:
    lm = quantized_lm("llama" if method in ("lora", "ft", "memit") else "gpt2", scheme, way)
    before = every_bit(lm.model)
    logits(lm)
    cell = method_families.check(lm, method, tmp_path)
    assert cell["failures"] == []
    assert method == "ike" or cell["rise"] > (0.3 if method == "mend" else 0.5)  # random weights; one step of SGD
    assert same(before, lm.model)


@pytest.mark.parametrize("method", ["ft", "lora", "memit"])
def test_other_methods_give_what_they_give_on_the_float_model(method: str, tmp_path: Path) -> None:
    for way in ("adapter", "wide"):
        lm = quantized_lm("llama", "bnb-nf4", way)
        twin = float_twin(lm, "llama")
        found, wanted = edited(lm, method, tmp_path), edited(twin, method, tmp_path)
        assert [delta.module for delta in found.deltas] == [delta.module for delta in wanted.deltas]
        assert all(apart(a.change(), b.change()) < 1e-3 for a, b in zip(found.deltas, wanted.deltas, strict=True))


@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_a_method_that_fails_midway_leaves_every_bit(
    scheme: str, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lm = quantized_lm("llama", scheme, way)
    before = every_bit(lm.model)

    def broken(*args: object, **kwargs: object) -> object:
        descend(*args, **kwargs)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    for name in ("ft", "lora"):
        monkeypatch.setattr(f"editkit.methods.{name}.descend", broken)
        with pytest.raises(KeyboardInterrupt):
            edited(lm, name, tmp_path)
        assert same(before, lm.model)


@pytest.mark.parametrize("transform", [None, "prune"])
@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_a_session_undoes_any_step(scheme: str, way: str, transform: str | None) -> None:
    lm = quantized_lm("llama", scheme, way)
    twin = float_twin(lm, "llama")
    before = every_bit(lm.model)
    options = {"moments": MOMENTS, "progress": False, "transform": transform}
    with Session(lm, "r_rome", SESSION_SETTINGS["r_rome"], **options) as session:  # type: ignore[arg-type]
        states = [lm.digest]
        for fact in FACTS:
            session.edit(fact)
            states.append(lm.digest)
        assert len({*states}) == 4
        total = session.total()
        module = total.deltas[0].module
        with torch.no_grad():
            twin.model.get_parameter(f"{module}.weight").add_(total.deltas[0].change().float())
        assert apart(logits(lm), logits(twin)) < (0.05 if scheme == "bnb-8bit" else 1e-5)
        session.undo(2)
        assert lm.digest == states[2]
        again = session.undo(0, rerun=True)
        assert again.distance is not None
        session.undo(0)
        assert lm.digest == states[0] and same(before, lm.model)
        session.edit(FACTS[0])
        assert lm.digest == states[1]
    assert same(before, lm.model)


@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_a_session_is_saved_and_gone_on_with(scheme: str, way: str, tmp_path: Path) -> None:
    lm = quantized_lm("llama", scheme, way)
    before = every_bit(lm.model)
    with Session(lm, "r_rome", SESSION_SETTINGS["r_rome"], moments=MOMENTS, progress=False) as session:
        session.edit(FACTS[0])
        session.edit(FACTS[1])
        state = lm.digest
        session.save(tmp_path)
    assert same(before, lm.model)
    with Session.load(tmp_path, lm, moments=MOMENTS, progress=False) as session:
        assert lm.digest == state and len(session.steps) == 2
    assert same(before, lm.model)


@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_files_of_edits_apply_on_the_same_quantised_base_alone(scheme: str, way: str, tmp_path: Path) -> None:
    lm = quantized_lm("llama", scheme, way)
    edit = random_edit(lm)
    path = edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(path).base.dtype == f"{scheme}/float32"
    with edit.applied(lm):
        wanted = lm.digest
    other = quantized_lm("llama", scheme, way)  # loaded again
    with apply_files([path], other):
        assert other.digest == wanted
    with Edit.load(path).applied(quantized_lm("llama", scheme, "wide" if way == "adapter" else "adapter")):
        pass  # the way is the model's, not the edit's
    with pytest.raises(EditkitError, match=f"Load the base it was made for .dtype {scheme}/float32"):
        Edit.load(path).apply(tiny_lm("llama"))
    with pytest.raises(EditkitError, match="other weights|the weight in"):
        Edit.load(path).apply(quantized_lm("llama", "bnb-fp4"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_of_the_float_base_applies_on_the_quantised_one_when_asked(family: str) -> None:
    lm, base = quantized_lm(family, "bnb-nf4"), tiny_lm(family)
    edit = r_rome_edit(base)
    before = every_bit(lm.model)
    with pytest.raises(EditkitError, match="edit.in_dtype_of"):
        edit.apply(lm)
    there = edit.in_dtype_of(lm)
    assert there.base.dtype == "bnb-nf4/float32" and there.provenance["computed_for"]["dtype"] == "float32"
    clean = logits(lm)
    with there.applied(lm):
        assert apart(logits(lm), clean) > 0.01
    assert same(before, lm.model)
    back = there.in_dtype_of(base)
    assert torch.equal(back.deltas[0].change(), edit.deltas[0].change())
    with pytest.raises(EditkitError, match="both bnb-nf4/float32"):
        there.in_dtype_of(lm)


def nearest(weight: Tensor, values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(values, codes) of 4-bit quantisation in blocks, written out: each entry goes to the nearest of absmax · code."""
    flat = weight.double().reshape(-1, block)
    scales = flat.abs().amax(1, keepdim=True)
    codes = ((flat / scales)[..., None] - values.double()).abs().argmin(-1)
    return (values.double()[codes] * scales).view_as(weight), codes


def test_what_is_left_of_an_edit_is_what_the_quantiser_leaves() -> None:
    lm = quantized_lm("llama", "bnb-nf4")
    edit = random_edit(lm)
    module = lm.model.get_submodule(edit.deltas[0].module)
    weight, change = dequantized(module).double(), edit.deltas[0].change()
    values = parts(module, module.get_parameter("weight"))["code"]
    (before, codes), (after, others) = nearest(weight, values, 64), nearest(weight + change, values, 64)
    left = after - before
    found = requantized(lm, edit)
    assert found is not None
    assert found.kept == pytest.approx(((left * change).sum() / change.square().sum()).item(), rel=1e-3)
    assert found.error == pytest.approx(((left - change).norm() / change.norm()).item(), rel=1e-3)
    assert found.codes_changed == pytest.approx((codes != others).double().mean().item(), abs=2e-3)
    # A change that is small beside the steps of the quantiser moves next to nothing.
    small = requantized(lm, edit * 1e-4)
    assert small is not None and small.codes_changed < 0.02


@pytest.mark.parametrize("scheme", ["bnb-8bit", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4"])
def test_more_bits_leave_more_of_an_edit(scheme: str) -> None:
    lm = quantized_lm("llama", scheme)
    edit = random_edit(lm)
    before = every_bit(lm.model)
    found = requantized(lm, edit)
    assert found is not None and same(before, lm.model)
    assert (found.error < 0.1) == (scheme in ("bnb-8bit", "torchao-int8"))
    assert 0.5 < found.kept < 1.5 and 0 < found.codes_changed <= 1
    # What the model holds is left as it is, but by torchao's int4, whose scales are absmax / 7.5 while codes are whole.
    name = edit.deltas[0].module
    weight = dequantized(lm.model.get_submodule(name))
    again = quantized_again(lm.model, name, weight)
    assert again is not None and apart(again[0], weight) < (0.07 if scheme == "torchao-int4" else 0.01)
    assert requantized(tiny_lm("llama"), replace(edit, deltas=())) is None


@pytest.mark.parametrize(("scheme", "way"), SIX)
def test_edits_are_read_cut_and_exported_as_on_any_base(scheme: str, way: str, tmp_path: Path) -> None:
    lm = quantized_lm("gpt2", scheme, way)
    edit = random_edit(lm)
    (spectrum,) = spectra(edit, lm)
    weight = dequantized(lm.model.get_submodule(edit.deltas[0].module))
    assert spectrum.relative_norm == pytest.approx(edit.norm() / weight.norm().item())
    assert spectrum.rounding_error is not None and spectrum.rounding_error < 1e-5
    assert compressed(edit, 1).rank == 1 and (edit + edit).norm() == pytest.approx(2 * edit.norm())
    assert edit.to_peft(tmp_path / "adapter") == {edit.parameters[0]: 0.0}


def test_a_peft_adapter_of_the_edit_does_what_the_edit_does(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lm = quantized_lm("gpt2", "bnb-nf4")
    edit = random_edit(lm)
    edit.to_peft(tmp_path)
    with edit.applied(lm):
        wanted = logits(lm)
    adapted = replace(lm, model=peft.PeftModel.from_pretrained(lm.model, str(tmp_path)))
    assert apart(logits(adapted), wanted) < 1e-5


def test_the_way_decides_what_takes_the_place_of_a_module() -> None:
    for way, kind in (("adapter", Beside), ("wide", nn.Linear)):
        lm = quantized_lm("llama", "torchao-int8", way)
        edit = random_edit(lm)
        name = edit.deltas[0].module
        module, held = lm.model.get_submodule(name), lm.model.get_submodule(name).weight
        with edit.applied(lm):
            found = lm.model.get_submodule(name)
            assert type(found) is kind
            if isinstance(found, Beside):
                assert found.base is module
            else:
                assert apart(found.weight, dequantized(module) + edit.deltas[0].change().float()) < 1e-6
        assert lm.model.get_submodule(name) is module and module.weight is held


@pytest.mark.parametrize("way", ["adapter", "wide"])
def test_the_command_edits_and_benchmarks_a_quantised_model(way: str, tmp_path: Path) -> None:
    need("bnb-nf4")
    asked = ("model.quantization=bnb-nf4", f"model.edited={way}", "device=cpu", *FAST)
    record = record_of(really_run(tmp_path / "edit", "edit=gpt2_fact", *asked))
    assert record["model"] | {"quantization": "bnb-nf4", "edited": way} == record["model"]
    assert record["reversal"]["exact"] and any("absmax" in name for name in record["reversal"]["touched"])
    assert 0 < record["edit"]["requantized_error"] < 2
    assert record["edit"]["provenance"]["method"] == "r_rome"
    small = ("data.limit=2", "task.measure.fluency=0", "task.measure.generate=0")
    bench = really_run(tmp_path / "bench", "task=benchmark", *small, *asked)
    record = record_of(bench)
    assert record["reversal"]["exact"] and record["reversal"]["digested"] == record["reversal"]["tensors"] == 164
    pandas = pytest.importorskip("pandas")
    columns = pandas.read_parquet(bench / EDITS)
    for name in ("requantized_kept", "requantized_error", "requantized_codes_changed"):
        assert record["edit"][name] == pytest.approx(columns[name].mean())


def test_low_rank_factors_that_do_not_fit_are_refused() -> None:
    lm = quantized_lm("llama", "bnb-nf4")
    with pytest.raises(EditkitError, match=r"W is \[32, 64\]"):
        low_rank_delta(lm, down_of(lm, 0), torch.ones(3, 1), torch.ones(1, 3))
    assert base_of(lm).dtype == "bnb-nf4/float32"
