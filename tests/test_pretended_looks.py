"""Sessions, second moments, tracing, lenses, activations, measurements and tasks on the pretended accelerator: they
give what they give on the CPU, and edits go from one device to another."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Edit, Fact, Session, trace
from editkit.activations.probes import activation_norms, features, fit_probe
from editkit.activations.shaping import ActivationPenalty, rank_one
from editkit.data.cases import make_case
from editkit.edits.spectra import spectra
from editkit.lenses import attention_to_subject, logit_lens, side_effects, stream_change
from editkit.methods.memit import MemitSettings, memit
from editkit.methods.shared.likelihood import nll_of_rows, targets_after_prompts
from editkit.metrics.measure import look
from editkit.metrics.running_text import Drift
from editkit.models.generate import generate, generate_batch
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot, digests, tensors_of
from editkit.moments import second_moments
from editkit.nethook import select
from editkit.settings import TRACE_KINDS, ContextSettings, MeasureSettings, MomentSettings, TraceSettings
from editkit.testing.tiny import tiny_lm
from editkit.tracing import average_trace
from tests import pretended
from tests.run_folders import FAST, TRACED, really_run, record_of
from tests.test_session import SETTINGS as SESSION_SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore:the update of", "ignore:C has")  # tiny models: large updates, few keys

FACTS = [
    Fact("The city of {}", "The Eiffel Tower", "Rome"),
    Fact("The capital of {} is", "France", "Madrid"),
]
FEW = ContextSettings(lengths=(4,), counts=(2,))
MOMENTS = MomentSettings(tokens=1000)
TEXTS = ["The old town", "Rain", "The capital of the country"]


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    with pretended.accelerator(), pretended.same_kernels():
        yield


def on(device: str, family: str = "gpt2") -> LanguageModel:
    lm = tiny_lm(family)
    lm.model.to(device)  # pyright: ignore[reportArgumentType]
    return lm


def plain(value: Any) -> Any:
    """Tensors as lists and dataclasses as dicts, so that two results can be compared."""
    if isinstance(value, Tensor):
        assert not isinstance(value, pretended.Pretended), "a result was left on the accelerator"
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def edit_of(lm: LanguageModel) -> Edit:
    settings = MemitSettings(layers=[0, 1], steps=2, lr=0.1, mom2_update_weight=1.0, contexts=FEW)
    return memit(lm, FACTS, settings, moments=MOMENTS, progress=False)


def moments(lm: LanguageModel, folder: Path) -> Any:
    return second_moments(lm, [0, 1], MOMENTS, cache=folder, progress=False)


def traced(lm: LanguageModel, folder: Path) -> Any:
    kinds = TraceSettings(samples=2, window=2, kinds=TRACE_KINDS)
    both = [trace(lm, FACTS[1], kinds, progress=False)]
    both += [trace(lm, FACTS[1], TraceSettings(samples=2, engine="full", kinds=("state",)), progress=False)]
    return both, average_trace(lm, FACTS, TraceSettings(samples=2, kinds=("state", "mlp")), progress=False)


def lenses(lm: LanguageModel, folder: Path) -> Any:
    edit = edit_of(lm)
    return (
        logit_lens(lm, FACTS[1].text, ["Rome", "Oslo"]),
        attention_to_subject(lm, FACTS[1]),
        side_effects(lm, edit, TEXTS, ["Rome", "Oslo", "Madrid"]),
        stream_change(lm, edit, TEXTS[2]),
        spectra(edit, lm),
    )


def activations(lm: LanguageModel, folder: Path) -> Any:
    sites = select(lm.model, lm.architecture.block.format("*"))
    data = features(lm, TEXTS * 4, sites, path=folder / "features.parquet", position="mean", progress=False)
    labelled = data.add_column("label", ["a", "b", "b"] * 4)
    probe = fit_probe(labelled, sites[0], "label")
    scored = targets_after_prompts(lm, FACTS[:1])

    def loss() -> Tensor:
        return nll_of_rows(lm.model(**scored.rows.inputs(), use_cache=False).logits, scored).mean()

    with ActivationPenalty(lm.model, sites, "l2") as penalty:
        lm.model(**scored.rows.inputs(), use_cache=False)
        shaped = penalty(scored.rows.mask).detach().cpu()
    one = rank_one(lm.model, lm.architecture.down(1), loss)
    return activation_norms(lm, TEXTS[2], sites), data[:], probe, shaped, one.weight_grad().cpu()


def measured(lm: LanguageModel, folder: Path) -> Any:
    case = make_case(FACTS[1], paraphrases=["France has the capital"], neighborhood=["The capital of Spain is"])
    drift = Drift.take(lm, tokens=256, length=64)
    with edit_of(lm).applied(lm):
        return (
            look(lm, case, MeasureSettings(generate=2, fluency=12)),
            generate(lm, TEXTS[:2], 4, top_k=5),
            generate_batch(lm, TEXTS, 4),
            drift.measure(lm),
        )


LOOKS: dict[str, Callable[[LanguageModel, Path], Any]] = {
    "moments": moments,
    "tracing": traced,
    "lenses": lenses,
    "activations": activations,
    "measurements": measured,
}


@pytest.mark.cells
@pytest.mark.parametrize(
    ("family", "device", "name"),
    [("gpt2", "pretended:1", name) for name in LOOKS]
    + [("llama", "pretended:0", name) for name in ("tracing", "measurements")],
)
def test_what_is_seen_is_what_the_cpu_sees(family: str, device: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "there").mkdir()
    wanted = LOOKS[name](on("cpu", family), tmp_path / "cpu")
    lm = on(device, family)
    before = digests(tensors_of(lm.model))
    assert repr(plain(LOOKS[name](lm, tmp_path / "there"))) == repr(plain(wanted))  # NaN is NaN there
    assert digests(tensors_of(lm.model)) == before


def test_a_session_is_the_cpus_and_is_opened_on_another_device(tmp_path: Path) -> None:
    weights = {}
    for device in ("cpu", "pretended:0"):
        lm, folder = on(device), tmp_path / device.replace(":", "")
        start = lm.digest
        with Session(lm, "r_rome", SESSION_SETTINGS["r_rome"], moments=MOMENTS, progress=False) as session:
            for fact in FACTS:
                session.edit(fact)
            both = lm.digest
            session.save(folder)
            session.undo(0)
            weights[device] = start, both, lm.digest
        assert lm.digest == start
    assert weights["cpu"] == weights["pretended:0"] and len({*weights["cpu"]}) == 3
    for device in ("cpu", "pretended:0", "pretended:1"):
        lm = on(device)
        with Session.load(tmp_path / "pretended0", lm):
            assert lm.digest == weights["cpu"][1]
        assert lm.digest == weights["cpu"][0]


def test_an_edit_goes_from_any_device_to_any(tmp_path: Path) -> None:
    places = ("cpu", "pretended:0", "pretended:1")
    models = {place: on(place) for place in places}
    start, edited = models["cpu"].digest, set()
    for made in places:
        edit = Edit.load(edit_of(models[made]).save(tmp_path / "edit.safetensors"))
        assert all(
            tensor.device.type == "cpu"
            for delta in edit.deltas
            for tensor in (delta.left, delta.right)
            if tensor is not None
        )
        for used in places:
            with edit.applied(models[used]) as applied:
                edited.add(models[used].digest)
            assert applied.reversal is not None and applied.reversal.exact and models[used].digest == start
    assert len(edited) == 1 and start not in edited


def test_a_snapshot_lies_where_its_parameter_does_and_sees_one_bit() -> None:
    lm = on("pretended:1")
    name = f"{lm.architecture.down(1)}.weight"
    snapshot = Snapshot.take(lm.model, [name])
    assert str(snapshot.clones[name].device) == "pretended:1"
    with torch.no_grad():
        lm.model.get_parameter(name)[0, 0] = -0.0
    assert snapshot.verify().unequal == (name,)
    snapshot.restore()
    assert snapshot.verify().exact


FEWER = (*FAST, "method.steps=2", "task.measure.generate=0", "task.measure.distracted=false")
TASKS = {  # a benchmark is what task=edit does too, and lifelong a session with the same measurements
    "edit": ("edit=gpt2_fact", "task.continuation=2", *FEWER),
    "average": ("task=trace", "data=atlas", "data.limit=1", *TRACED),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_writes_the_cpus_scores(task: str, tmp_path: Path) -> None:
    cpu, there = (
        record_of(really_run(tmp_path / name, *TASKS[task], f"device={device}"))
        for name, device in (("cpu", "cpu"), ("there", "pretended:1"))
    )
    assert (cpu["model"]["device"], there["model"]["device"]) == ("cpu", "pretended:1")
    assert there["scores"] == cpu["scores"]
    assert there["model"]["digest"] == cpu["model"]["digest"]
