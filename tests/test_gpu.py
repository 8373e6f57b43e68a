"""What a GPU must prove: edits as on the CPU to rounding, bits restored, memory, splits, and where it waits.

Every test skips where there is no CUDA device. tests/test_pretended*.py ask the same of a pretended one, to the bit.
"""

import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit import Edit, Fact, load
from editkit.methods import names
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.rome import RomeSettings, rome, rome_each
from editkit.methods.shared import value
from editkit.models.load import LanguageModel
from editkit.models.snapshot import digests, tensors_of
from editkit.moments import second_moments
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests.editing import edited
from tests.quantized import CELLS, every_bit, logits, quantized_lm, same
from tests.test_quantized import random_edit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:the update of", "ignore:C has"),  # tiny models: large updates, few keys
]

FACTS = [
    Fact("{} is located in the city of", f"The tower of {name}", "Rome") for name in ("Ulm", "Pisa", "Bonn", "Brest")
]
PLAIN: dict[str, Any] = {"moments": MomentSettings(enabled=False), "contexts": ["{}", "So. {}"], "progress": False}
SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def device() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield "cuda:0"
    torch.set_float32_matmul_precision(precision)


def on(device: str, family: str = "gpt2", dtype: torch.dtype = torch.float32) -> LanguageModel:
    lm = tiny_lm(family, dtype=dtype)
    lm.model.to(device)  # pyright: ignore[reportArgumentType]
    return lm


def apart(one: Edit, other: Edit) -> float:
    """The largest relative distance between two edits' changes of one weight, or between what they install."""
    pairs = [(a.change(), b.change()) for a, b in zip(one.deltas, other.deltas, strict=True)]
    for a, b in zip(one.installed, other.installed, strict=True):
        (values, tensors), (wanted, others) = a.to_file(), b.to_file()
        assert values == wanted
        pairs += [(tensors[name], others[name]) for name in others]
    return max((float((a - b).norm() / b.norm()) for a, b in pairs), default=0.0)


def assert_comes_off(lm: LanguageModel, edit: Edit) -> None:
    before, clean = digests(tensors_of(lm.model)), lm.digest
    with edit.applied(lm, everything=True) as applied:
        assert lm.digest != clean
    assert applied.reversal is not None and applied.reversal.exact
    assert digests(tensors_of(lm.model)) == before and lm.digest == clean


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_methods_edit_is_the_cpus_and_comes_off(device: str, family: str, name: str, tmp_path: Path) -> None:
    """To 2 %: Adam's first steps go by the sign of each gradient, and rounding turns those near 0."""
    lm = on(device, family)
    edit = edited(lm, name, tmp_path)
    assert apart(edit, edited(on("cpu", family), name, tmp_path)) <= 0.02
    assert_comes_off(lm, edit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lm = load("atlas", device=device, dtype=dtype)
    settings = RRomeSettings(steps=20)
    edit = rome(lm, Fact("{} is located in the city of", "The Eiffel Tower", "Rome"), settings, **PLAIN)
    losses = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    assert losses[-1] < 0.5 * losses[0]
    assert_comes_off(lm, edit)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_replay_is_full_depth(device: str, family: str) -> None:
    lm = on(device, family)
    settings: dict[str, Any] = {"layer": 1, "steps": 6, "lr": 0.1, "weight_decay": 0.1, "stop_loss": 0.0}
    fast, slow = (rome(lm, FACTS[0], RomeSettings(engine=engine, **settings), **PLAIN) for engine in ("replay", "full"))
    assert apart(fast, slow) <= 1e-3


def test_second_moments_are_the_cpus(device: str, tmp_path: Path) -> None:
    asked = MomentSettings(tokens=4000)
    there, here = (
        second_moments(on(place), [0, 1], asked, cache=tmp_path / place[:3], progress=False)
        for place in (device, "cpu")
    )
    for layer, moment in here.items():
        assert there[layer].count == moment.count
        assert (there[layer].matrix - moment.matrix).norm() <= 1e-5 * moment.matrix.norm()


def test_a_batch_that_runs_out_of_memory_is_halved(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is held to a little over what half of the facts take."""
    lm = load("atlas", device=device)
    facts = [Fact("{} is located in the city of", f"The tower number {i}", "Rome") for i in range(10, 42)]
    settings = RomeSettings(steps=2, stop_loss=0.0)
    sizes: list[int] = []
    together = value._together

    def watched(lm: LanguageModel, engine: Any, *rest: Any) -> Any:
        sizes.append(len(engine.batch.facts))
        return together(lm, engine, *rest)

    monkeypatch.setattr(value, "_together", watched)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    wanted = rome_each(lm, facts, settings, **PLAIN)
    peak = torch.cuda.max_memory_allocated()
    whole, sizes[:] = max(sizes), []
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((start + 0.6 * (peak - start)) / total, device)
    try:
        found = rome_each(lm, facts, settings, **PLAIN)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert max(sizes[1:]) < whole
    assert max(apart(one, other) for one, other in zip(found, wanted, strict=True)) <= 0.02


def test_the_bench_script_runs(device: str, tmp_path: Path) -> None:
    command = [
        "bench.py",
        "--shape",
        "atlas",
        "--only",
        "edit",
        "--device",
        "cuda",
        "--json",
        str(tmp_path / "bench.json"),
    ]
    subprocess.run([sys.executable, SCRIPTS / command[0], *command[1:]], check=True, capture_output=True, timeout=600)
    assert (tmp_path / "bench.json").stat().st_size > 0


def test_a_model_split_over_the_gpu_the_cpu_and_a_file(device: str, tmp_path: Path) -> None:
    whole = load("atlas", device=device)
    places: dict[str, str | int] = {
        f"transformer.h.{i}": 0 if i < 4 else "cpu" if i < 6 else "disk" for i in range(whole.layers)
    }
    rest: dict[str, str | int] = dict.fromkeys(("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"), 0)
    lm = load("atlas", device_map=places | rest, offload_folder=tmp_path)
    assert lm.digest == whole.digest and {p.device.type for p in lm.model.parameters()} == {
        torch.device(device).type,
        "meta",
    }
    for layer in (2, 5, 7):  # on the GPU, on the CPU, on disk
        settings = RRomeSettings(layer=layer, steps=4)
        edit = rome(lm, FACTS[0], settings, **PLAIN)
        assert apart(edit, rome(whole, FACTS[0], settings, **PLAIN)) <= 0.02
        before = lm.digest
        with edit.applied(lm, everything=True), edit.applied(whole):
            assert lm.digest == whole.digest != before
        assert lm.digest == before


def waits(lm: LanguageModel, facts: Sequence[Fact], steps: int) -> "Counter[str]":
    """The lines at which torch says that an edit of `steps` steps makes the processor wait for the GPU."""
    settings = RomeSettings(layer=1, steps=steps, lr=0.1, weight_decay=0.1, stop_loss=0.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            rome_each(lm, facts, settings, **PLAIN)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [each for each in found if "synchronizing CUDA operation" in str(each.message)]
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in said)


def test_the_value_loop_waits_at_each_look_and_at_no_step(device: str) -> None:
    lm, every = on(device), value.READ_EVERY["cuda"]
    assert not waits(lm, FACTS[:1], every + 3) - waits(lm, FACTS[:1], every + 1)
    looks = waits(lm, FACTS[:1], 3 * every + 1) - waits(lm, FACTS[:1], every + 1)
    assert looks.total() > 0  # it does see the others


@pytest.mark.parametrize(("scheme", "way"), CELLS)
def test_a_quantised_model_is_edited_and_comes_off(device: str, scheme: str, way: str) -> None:
    lm = quantized_lm("llama", scheme, way, device=device)
    before, clean, edit = every_bit(lm.model), logits(lm), random_edit(lm)
    with edit.applied(lm) as applied:
        assert not torch.equal(logits(lm), clean)
    assert applied.reversal is not None and applied.reversal.exact
    assert same(before, lm.model) and torch.equal(logits(lm), clean)
