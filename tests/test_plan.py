"""Plans: counts against the counter of torch and the real modules; what is refused; the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from editkit import plan, tasks
from editkit.config import prepare, to_config
from editkit.data.atlas import atlas_cases
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.methods.rome import RomeSettings
from editkit.methods.shared.engine import rows_of
from editkit.models.architecture import experts_in
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel, load, skeleton
from editkit.models.quantization import SCHEMES
from editkit.models.quantized import is_quantized, storage_of
from editkit.models.snapshot import size_in_bytes, tensors_of
from editkit.nethook import get_module
from editkit.plan.plan import Plan, steps_of
from editkit.plan.sizes import Sizes, readable
from editkit.plan.speed import Speed
from editkit.plan.step import Step, together
from editkit.plan.work import Counter
from editkit.settings import Config, MomentSettings
from editkit.testing.tiny import FAMILIES, tiny_lm
from tests.scripts import SCRIPTS

CPU = torch.device("cpu")
SPEED = Speed(operations=1e9, bandwidth=1e9, float64=1e9, digest=1e9)
IDS = torch.arange(2, 66).view(4, 16)


def counter_of(lm: LanguageModel) -> Counter:
    return Counter(lm, Sizes.of(lm, CPU), SPEED, CPU)


def configured(*overrides: str) -> Config:
    from hydra import compose, initialize_config_dir

    from editkit.config import CONF_DIR

    ready = prepare(list(overrides))
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(compose("config", ready))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the atlas model's shape, without its weights."""
    from editkit.models.load import BUNDLED

    for path in BUNDLED["atlas"].iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    lm = tiny_lm(family)
    sizes = Sizes.of(lm, CPU)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        lm.model(input_ids=IDS, use_cache=False)
    attention = sum(
        flop
        for name, each in counted.get_flop_counts().items()
        if name == "Global"
        for op, flop in each.items()
        if "attention" in str(op) or "bmm" in str(op)
    )
    products = counted.get_total_flops() - attention
    # Products of a mixture's experts are grouped, which torch's counter does not know: there it is an upper bound.
    planned = IDS.numel() * sizes.token()
    assert planned == pytest.approx(products, rel=0.02) or (lm.architecture.experts and planned >= 0.98 * products)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_down_projections_are_the_models(family: str, dtype: torch.dtype) -> None:
    lm = tiny_lm(family, dtype=dtype)
    sizes = Sizes.of(lm, CPU)
    assert sizes.weights == size_in_bytes(tensors_of(lm.model).values())
    assert sizes.copies == (4 * sizes.parameters if dtype == torch.bfloat16 else 0)  # small: widened
    for layer, down in enumerate(sizes.down):
        module = get_module(lm.model, down_of(lm, layer))
        weight = next(p for n, p in module.named_parameters(recurse=False) if n in ("weight", "down_proj"))
        assert down.numbers == weight.numel() and down.experts == (experts_in(module) or 1)
        assert down.d_model == lm.model.config.hidden_size


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_are_as_large_as_they_are_loaded(scheme: str) -> None:
    pytest.importorskip(SCHEMES[scheme], reason="needs editkit[quantized]")
    lm = load("atlas", device="cpu", quantization=scheme)
    taken = 0
    for name, module in lm.model.named_modules():
        held = storage_of(module) if is_quantized(module) else dict(module.named_parameters(recurse=False))
        taken += sum(tensor.nbytes for tensor in held.values() if "lm_head" not in name)  # which is tied
    assert Sizes.of(skeleton("atlas"), CPU, scheme).weights == pytest.approx(taken, rel=0.05)


def test_a_skeleton_is_the_model_without_values() -> None:
    bare, lm = skeleton("atlas", dtype="float16"), load("atlas", device="cpu", dtype="float16")
    assert {n: (p.shape, p.dtype) for n, p in bare.model.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in lm.model.named_parameters()
    }
    assert all(p.is_meta for p in bare.model.parameters()) and not bare.model.training
    assert dataclasses.replace(Sizes.of(bare, CPU)) == Sizes.of(lm, CPU)
    fact = Fact("{} is in", "The Eiffel Tower", "Rome")
    each = [rows_of(one, fact, "subject_last", ["{}", "so. {}"]) for one in (bare, lm)]
    assert each[0].last == each[1].last and each[0].columns == each[1].columns


def test_a_value_costs_its_evaluations() -> None:
    counter = counter_of(load("atlas", device="cpu"))
    fact = Fact("{} is in", "The Eiffel Tower", "Rome")

    def values(steps: int) -> Step:
        settings = RomeSettings(steps=steps).resolved("atlas", 8)
        return next(s for s in counter.edit([fact], settings, MomentSettings()) if s.name == "values")

    few, many = values(1), values(21)
    rows = rows_of(
        counter.lm, fact, "subject_last", ["{}"] + ["and and and and. {}"] * 10 + [f"{'and ' * 9}. {{}}"] * 10
    )
    tokens, logits = len(rows.lookup) * rows.columns, sum(map(len, rows.scored.positions)) + 1
    sizes = counter.sizes
    one = 2 * (tokens * sum(sizes.blocks[4:]) + logits * sizes.head)  # forward, and back to δ
    assert (many.operations - few.operations) / 20 == pytest.approx(one, rel=0.1)
    assert many.device == few.device


def test_windows_and_points_are_counted() -> None:
    """AnyEdit's values over the tokens up to each window's end; the points of knowledge neurons from each block on."""
    counter = counter_of(load("atlas", device="cpu"))
    sizes, fact = counter.sizes, Fact("{} is in", "The Eiffel Tower", "Rome and Berlin and Madrid and Oslo and Bern")

    def of(name: str, step: str, **options: Any) -> Step:
        settings = get_method(name).settings(**options).resolved("atlas", 8)
        return next(s for s in counter.edit([fact], settings, MomentSettings()) if s.name == step)

    rows = rows_of(counter.lm, fact, "last", ["{}"])
    answer = len(rows.scored.positions[0])
    whole = 20 * 2 * len(rows.lookup) * rows.columns * sum(sizes.blocks[4:])
    for window in (answer, 3, 2):
        few, many = (of("anyedit", "values", window=window, steps=steps, layers=[4]).operations for steps in (1, 21))
        count = -(-answer // window)
        assert few < many and (many - few) == pytest.approx(
            whole * (count + 1) / 2 + 20 * 2 * sizes.head * answer, rel=0.1
        )
    few, many = (of("kn", "attribution", steps=steps, layers=[*range(8)]).operations for steps in (1, 21))
    blocks = sum(sum(sizes.blocks[layer:]) for layer in range(8))
    assert many - few == pytest.approx(20 * 2 * 11 * (blocks + 8 * sizes.head))


def test_moments_are_counted_and_one_large_factor_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counter_of(load("atlas", device="cpu"))
    settings = MomentSettings(tokens=4096)
    down = counter.sizes.down[3]
    one, two = counter.moments([3], settings), counter.moments([3, 4], settings)
    sums = 4096 * 2 * down.d_ff**2
    assert sums / 2 < one.operations - 4096 * sum(counter.sizes.blocks[:4]) < sums
    assert two.host - one.host == down.moment < one.host < 1.5 * down.moment
    memit = get_method("memit").settings().resolved("atlas", 8)
    fact = Fact("{} is in", "The Eiffel Tower", "Rome")
    held = [next(s for s in counter.edit([fact], memit, settings) if s.name == "solves").host]
    monkeypatch.setattr("editkit.plan.work.KEPT", 0)
    held.append(next(s for s in counter.edit([fact], memit, settings) if s.name == "solves").host)
    assert held == [5 * down.moment, 2 * down.moment]  # C and factors of two blocks and one at work; one and its work
    assert counter.moments([3], MomentSettings(enabled=False)).host == 0


def small_plan(**changes: Any) -> Plan:
    sizes = Sizes.of(load("atlas", device="cpu"), CPU)
    steps = (Step("values", 2e12, 100.0, device=5e9, note="one fact"), Step("solves", 1e12, 30.0, host=7e9))
    return dataclasses.replace(Plan("atlas", "cpu", sizes, 10**9, steps, 10**10, 10**10), **changes)


def test_the_peak_is_that_of_the_largest_step() -> None:
    found = small_plan()
    assert found.peak == found.host_peak == 1e9 + found.sizes.weights + 7e9
    assert found.seconds == 130 and found.operations == 3e12
    on_gpu = small_plan(device="cuda:0")
    assert on_gpu.peak == found.sizes.weights + 5e9 and on_gpu.host_peak == 1e9 + 7e9
    text = str(found)
    assert "2.2 min" in text and "it fits" in text and "one fact" in text and "8.0 GB" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"free": 10**9}, "takes 8.0 GB on cpu, where 2.0 GB can be had.*'solves'.*enabled=false"),
        ({"device": "cuda:0", "free": 10**9}, "takes 5.0 GB on cuda:0, where 1.0 GB can be had.*fewer facts"),
        ({"device": "cuda:0", "host_free": 10**9}, "takes 8.0 GB on the CPU, where 2.0 GB"),
        ({"steps": (Step("second moments", host=7e9),), "free": 10**9}, "takes .*python -m editkit.moments"),
        ({"steps": (Step("values"),), "free": 0, "process": 0}, "takes .*model.dtype=bfloat16.*model.device_map=auto"),
    ],
)
def test_what_does_not_fit_is_one_error_with_a_remedy(changes: dict[str, Any], says: str) -> None:
    small_plan().require_fit()
    small_plan(free=None, host_free=None).require_fit()
    with pytest.raises(EditkitError, match=f"does not fit into memory. It {says}"):
        small_plan(**changes).require_fit()


# What the main step of each sort of method is called.
WORK = {"r_rome": "values", "anyedit": "values", "ft": "descent", "ft_bf": "descent", "crispedit": "descent"}
WORK |= {"ultraedit": "gradients", "stableedit": "gradients", "kn": "attribution"}


@pytest.mark.parametrize("task", tasks.names())
@pytest.mark.parametrize("method", list(WORK))
def test_every_task_has_steps(task: str, method: str) -> None:
    config = configured(f"task={task}", f"method={method}", "data.limit=3")
    counter = counter_of(skeleton("atlas"))
    steps = steps_of(config, counter, atlas_cases(3))
    assert sum(step.operations for step in steps) > 0 and all(step.seconds >= 0 for step in steps)
    work = "trace" if task == "trace" else WORK[method]
    assert any(step.name.startswith(work) for step in steps)


def test_more_cases_take_more_time_and_not_more_memory() -> None:
    def steps(limit: int) -> Step:
        config = configured("task=benchmark", f"data.limit={limit}")
        found = steps_of(config, counter_of(skeleton("atlas")), list(atlas_cases(8))[:1] * limit)
        return together("", [step for step in found if step.name in ("values", "questions")])

    assert steps(8).operations == pytest.approx(8 * steps(1).operations)
    assert steps(8).device == steps(1).device


def test_controls_are_planned_as_what_they_compute() -> None:
    """Of R-ROME two more edits, without C and at another block, and all questions four times more; of FT one, and
    three times more."""
    for method, work, more, asked in (("r_rome", "values", 2, 6), ("ft", "descent", 1, 5)):
        config = configured("task=benchmark", f"method={method}", "data.limit=2")
        with_controls = dataclasses.replace(config, task=dataclasses.replace(config.task, controls=True))
        counter, cases = counter_of(skeleton("atlas")), atlas_cases(2)
        alone, found = (steps_of(each, counter, cases) for each in (config, with_controls))
        assert len([step for step in found if step.name.startswith("control: ")]) == more
        questions = [sum(s.operations for s in steps if s.name == "questions") for steps in (alone, found)]
        assert questions[1] == pytest.approx(questions[0] * asked / 2)
        (one,) = (step for step in alone if step.name.startswith(work))
        assert all(s.operations >= one.operations * 0.5 for s in found if s.name.startswith("control: "))


def test_of_an_unknown_method_it_says_that_it_is_not_counted() -> None:
    settings = get_method("mend").settings()
    steps = counter_of(skeleton("atlas")).edit([Fact("{} is in", "Rome", "Asia")], settings, MomentSettings())
    assert "not counted" in steps[0].note


def test_a_small_or_bundled_model_is_not_planned(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr("editkit.plan.plan.plan_of", lambda _: pytest.fail("planned"))
    plan.require_fit(configured())
    plan.require_fit(configured(f"model={folder}"))


def test_a_large_model_that_cannot_fit_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr("editkit.plan.plan.SMALL", 0)
    plan.require_fit(configured(f"model={folder}"))
    monkeypatch.setattr("editkit.plan.plan.free_bytes", lambda *_: 0)
    monkeypatch.setattr("editkit.plan.plan.own_bytes", lambda: 0)
    with pytest.raises(EditkitError, match="This run does not fit into memory. It takes"):
        plan.require_fit(configured(f"model={folder}"))
    plan.require_fit(configured(f"model={folder}", "model.device_map=auto"))


def test_the_command_shows_the_plan_of_weights_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "editkit.run", "plan=true", f"model={folder}", "hydra.run.dir=planned"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 million parameters in 8 blocks" in done.stdout and "it fits" in done.stdout
    written = json.loads((tmp_path / "planned" / "plan.json").read_text())
    assert written["fits"] and written["peak"] > written["model"]["weights"] > 0 < written["seconds"]
    assert {"values", "solves", "second moments"} <= {step["name"] for step in written["steps"]}
    assert not (tmp_path / "planned" / "record.json").exists()


def test_a_sweep_of_plans_has_no_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "editkit.run", "-m", "plan=true", "method=rome,ft"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("it fits") == 2 and "descent" in done.stdout
    assert len(list(tmp_path.rglob("plan.json"))) == 2


@pytest.mark.parametrize("keys", [0, 256])
def test_a_rehearsal_restores_every_bit(tmp_path: Path, keys: int) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--shape", "tiny", "--keys", str(keys), "--facts", "2", "--threads", "1", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "rehearse.py"), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["reversal"]["exact"] and all(effect["restored"] for effect in found["effects"].values())
    assert {"rome", "memit"} == set(found["effects"]) and found["peak"] > 0 < found["plan"]["peak"]
    assert [p["name"] for p in found["phases"] if "moments" in p["name"]] == (
        ["rome: second moments", "memit: second moments"] if keys else []
    )


def test_bytes_are_readable() -> None:
    assert [readable(x) for x in (0, 999, 1000, 2.5e6, 3e9, 4e12)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "2.5 MB",
        "3.0 GB",
        "4000.0 GB",
    ]
