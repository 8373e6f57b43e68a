"""Whether a run fits, and about how long it takes: counted on the meta device, before anything is loaded or computed.

    python -m editkit.run plan=true model=meta-llama/Meta-Llama-3-8B model.dtype=bfloat16

A run of a large model is planned before it starts, and refused where its weights, second moments and snapshots cannot
fit; plan=true shows the plan of any run, and starts none.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from editkit.data import load_cases
from editkit.data.cases import Case, case_of
from editkit.errors import EditkitError
from editkit.methods.shared.controls import Control, null_controls
from editkit.models.load import BUNDLED, LanguageModel, resolve_device, skeleton
from editkit.models.memory import free_bytes, own_bytes
from editkit.models.quantization import method_of
from editkit.plan.sizes import Sizes, readable
from editkit.plan.speed import Speed
from editkit.plan.step import Step, together
from editkit.plan.work import Counter
from editkit.settings import (
    CONTROLS,
    BenchmarkSettings,
    Config,
    LifelongSettings,
    MethodSettings,
    MomentSettings,
    TraceTaskSettings,
    ValueSettings,
    WeightlessSettings,
)

SMALL = 1 << 30  # bytes of a checkpoint up to which a run is not planned unless it is asked for


@dataclass(frozen=True)
class Plan:
    """What a run will take. All memory in bytes."""

    model: str
    device: str
    sizes: Sizes
    process: int  # what this process takes already
    steps: tuple[Step, ...]
    free: int | None  # on the device; None where it is not known
    host_free: int | None  # of the CPU's memory

    @property
    def one_memory(self) -> bool:
        """Whether the device is the CPU, with one memory for all."""
        return self.device == "cpu"

    @property
    def peak(self) -> float:
        """The most memory on the device."""
        own = self.process if self.one_memory else 0
        beside = max((s.device + (s.host if self.one_memory else 0) for s in self.steps), default=0.0)
        return own + self.sizes.weights + self.sizes.copies + beside

    @property
    def host_peak(self) -> float:
        """The most of the CPU's memory."""
        return self.peak if self.one_memory else self.process + max((step.host for step in self.steps), default=0.0)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def operations(self) -> float:
        return sum(step.operations for step in self.steps)

    @property
    def too_much(self) -> str:
        """Why it cannot fit, and what to change; "" where it fits."""
        for peak, free, on_device in ((self.peak, self.free, True), (self.host_peak, self.host_free, False)):
            own = self.process if self.one_memory or not on_device else 0
            if free is not None and peak > free + own:
                where = self.device if on_device else "the CPU"
                had = f"{readable(free + own)} can be had"
                return f"It takes {readable(peak)} on {where}, where {had}. {self._remedy(on_device)}"
        return ""

    def _remedy(self, on_device: bool) -> str:
        """What to change so that less is taken of the device's memory, or of the CPU's."""

        def taken(step: Step) -> float:
            return (step.device if on_device or self.one_memory else 0) + (
                step.host if not on_device or self.one_memory else 0
            )

        largest = max(self.steps, key=taken)
        ways = []
        if self.sizes.weights > taken(largest):
            halves = self.sizes.dtype.itemsize > 2
            ways += ["model.dtype=bfloat16, which halves the weights"] if halves else []
            ways.append("model.quantization=bnb-nf4, which keeps them in 4 bits")
            ways.append("model.device_map=auto, which splits them over devices and files")
        if largest.name == "second moments":
            ways.append("collecting one block at a time with `python -m editkit.moments`, or editing fewer blocks")
        elif largest.host > largest.device:
            ways.append("moments.enabled=false, which takes the identity for C")
        ways = ways or ["fewer facts at once, or another machine"]
        return f"The largest step is '{largest.name}'. What helps: {'; '.join(ways)}."

    def require_fit(self) -> None:
        """Raise EditkitError where the run cannot fit."""
        if why := self.too_much:
            raise EditkitError(f"This run does not fit into memory. {why}")

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON."""
        sizes = self.sizes
        return {
            "model": {
                "name": self.model,
                "parameters": sizes.parameters,
                "dtype": str(sizes.dtype).removeprefix("torch."),
                "weights": sizes.weights,
                "float32_copies": sizes.copies,
            },
            "device": self.device,
            "free": self.free,
            "process": self.process,
            "steps": [asdict(step) for step in self.steps],
            "peak": self.peak,
            "host_peak": self.host_peak,
            "operations": self.operations,
            "seconds": self.seconds,
            "fits": not self.too_much,
        }

    def __str__(self) -> str:
        sizes = self.sizes
        dtype = str(sizes.dtype).removeprefix("torch.")
        lines = [
            f"plan     {self.model}: {sizes.parameters / 1e6:,.0f} million parameters in {len(sizes.blocks)} blocks, "
            f"{dtype}",
            "",
            f"{'':<26}{'memory':>10}{'operations':>14}{'about':>10}",
            f"{'this process':<26}{readable(self.process):>10}",
            f"{'weights':<26}{readable(sizes.weights):>10}",
        ]
        if sizes.copies:
            lines.append(f"{'their float32 copies':<26}{readable(sizes.copies):>10}")
        for step in self.steps:
            row = f"{step.name:<26}{readable(step.device + step.host):>10}{_tera(step.operations):>14}"
            lines.append(f"{row}{_time(step.seconds):>10}   {step.note}".rstrip())
        total = f"{'in all, at most':<26}{readable(self.peak):>10}{_tera(self.operations):>14}"
        lines += [f"{total}{_time(self.seconds):>10}", ""]
        free = "not known" if self.free is None else readable(self.free)
        lines.append(f"free     {free} on {self.device}: {'it does not fit' if self.too_much else 'it fits'}")
        return "\n".join(lines)


def plan_of(config: Config) -> Plan:
    """The plan of a run. Reads the model's configuration, its tokenizer and the cases; loads no weight.

    Raises EditkitError for what the run itself would raise before it loads the model.
    """
    settings = config.model
    lm = skeleton(
        settings.name,
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )
    cases = _cases(config)
    found = planned(
        lm, resolve_device(config.device), lambda counter: steps_of(config, counter, cases), settings.quantization
    )
    # How accelerate will split a model is its own decision, and how large a checkpoint is that others have quantised
    # is not known here: no verdict then.
    unknown = settings.device_map is not None or method_of(lm.model.config) is not None
    return replace(found, free=None, host_free=None) if unknown else found


def planned(
    lm: LanguageModel,
    device: torch.device,
    steps: Callable[[Counter], Sequence[Step]],
    quantization: str | None = None,
) -> Plan:
    """The plan of `steps`, which are counted with the Counter of a model.

    - `lm`: a skeleton, or a model that is in memory already: what it takes is not counted twice.
    - `device`: where it will be. `quantization`: how a skeleton's weights will be loaded.
    """
    sizes = Sizes.of(lm, device, quantization)
    held = 0 if lm.device.type == "meta" else sizes.weights
    free, host_free = free_bytes(device), free_bytes()
    process = own_bytes() - (held if device.type == "cpu" else 0)
    counter = Counter(lm, sizes, Speed.measured(sizes, device), device)
    room = None if free is None else free + held
    host_room = host_free if device.type != "cpu" else room
    return Plan(lm.name, str(device), sizes, max(0, process), tuple(steps(counter)), room, host_room)


def steps_of(config: Config, counter: Counter, cases: Sequence[Case]) -> list[Step]:
    """The steps of a run over `cases`; of a task that plans do not know, none."""
    task, name, moments = config.task, counter.lm.name, config.moments
    if isinstance(task, TraceTaskSettings):
        how = task.trace
        traces = [counter.trace(case.fact, len(how.kinds), how.samples) for case in cases]
        return [together("traces", traces), counter.digests(3)]
    settings = config.method.resolved(name, counter.lm.layers)
    before = [counter.contexts(settings), *counter.of_base(settings)]
    if isinstance(settings, ValueSettings):
        before.insert(0, counter.moments(settings.blocks, moments))
    measure = getattr(task, "measure", None)
    looks = [counter.look(case, measure) for case in cases] if measure else []

    def edits(size: int, settings: MethodSettings = settings, moments: MomentSettings = moments) -> list[Step]:
        """The steps of an edit, over all groups of so many cases; the first group stands for all."""
        facts = [fact for case in cases[:size] for fact in case.facts]
        return [step.times(len(cases) / size) for step in counter.edit(facts, settings, moments)]

    if getattr(task, "ability", None):
        before.append(Step("general ability", note="not counted: tasks of lm-evaluation-harness"))
    if isinstance(task, BenchmarkSettings):
        size = min(task.size or len(cases), len(cases))
        steps = [*before, *edits(size)]
        controls = _controls(config, counter) if task.controls else []
        for control in controls:
            if control.settings is not None and not isinstance(control.settings, WeightlessSettings):
                assert control.moments is not None
                own = control.settings.resolved(name, counter.lm.layers)
                made = [counter.moments(own.blocks, control.moments), *edits(size, own, control.moments)]
                steps.append(together(f"control: {CONTROLS[control.name]}", made))
        return [*steps, together("questions", looks).times(2 + len(controls)), counter.digests(2)]
    if isinstance(task, LifelongSettings):
        count = config.data.stream or len(cases)
        asked = min(1.0, (task.retention + task.untouched) / len(cases)) * len(task.points(count))
        made = [step.times(count / len(cases)) for step in edits(min(task.step, len(cases)))]
        return [*before, *made, together("questions", looks).times(asked)]
    text = counter.passes("continuations", 2 * (getattr(task, "continuation", 0) + 1), 1, logits=1)
    return [*before, *edits(len(cases)), together("questions", looks).times(2), text, counter.digests(2)]


def _controls(config: Config, counter: Counter) -> list[Control]:
    """The null controls that the run measures."""
    lm = counter.lm
    found = null_controls(config.method_name, config.method, config.moments, lm.name, lm.layers)
    return [control for control in found if not control.skipped]


def _cases(config: Config) -> Sequence[Case]:
    """The cases that the run edits or traces."""
    task = config.task
    average = isinstance(task, TraceTaskSettings) and task.average
    if average or isinstance(task, BenchmarkSettings | LifelongSettings):
        return load_cases(replace(config.data, stream=None), seed=config.seed).cases
    return [case_of(config.edit)]


def require_fit(config: Config) -> None:
    """Raise EditkitError for a run of a large model that cannot fit into memory. A small one is not planned."""
    if config.model.device_map is None and _large(config.model.name):
        plan_of(config).require_fit()


def _large(name: str) -> bool:
    folder = Path(name).expanduser()
    if name in BUNDLED:
        return False
    return not folder.is_dir() or sum(path.stat().st_size for path in folder.glob("*.safetensors")) > SMALL


def _tera(operations: float) -> str:
    return f"{operations / 1e12:,.2f} TFLOP"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
