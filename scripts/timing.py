"""Two ways of doing one thing, timed in turns: seconds, operations, evaluations of values and memory of each."""

import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from machine import commit, processor
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from editkit.methods.shared.engine import FullDepth, Replayed
from editkit.models.products import by_onednn, faster

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu leaves out the time that others had the core
Work = Callable[[], Any]


@dataclass(frozen=True)
class Way:
    """One way of doing a thing to `count` facts (records)."""

    work: Work
    count: int = 1


class Bench:
    """Times two ways of doing one thing, in turns after a warm-up; what is done to many facts, once."""

    def __init__(self, device: str, dtype: torch.dtype, repeats: int, clock: str) -> None:
        """`dtype`: that of the model's products. A half model on the CPU runs in float32."""
        self.device, self.repeats, self._clock = device, repeats, CLOCKS[clock]
        self.rate = self.matrix_rate(dtype)
        self.quick_rate = self.matrix_rate(dtype, by_onednn) if device == "cpu" and faster() else self.rate

    def seconds(self, work: Work) -> float:
        self.wait()
        began = self._clock()
        work()
        self.wait()
        return self._clock() - began

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def matrix_rate(self, dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> float:
        """Floating-point operations a second of a large product."""
        size = 1536 if self.device == "cpu" else 8192
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        product(a, a)
        return 2 * size**3 / statistics.median(self.seconds(lambda: product(a, a)) for _ in range(9))

    def peak(self, work: Work) -> tuple[float | None, float]:
        """MiB at the highest that were not in use before (None where the system does not tell), and seconds."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = self.seconds(work)
            return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand back what earlier work had freed
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
            before = _status("VmRSS")
        except OSError:
            return None, self.seconds(work)
        seconds = self.seconds(work)
        return (_status("VmHWM") - before) / 1024, seconds

    def compare(self, full: Way, fast: Way) -> dict[str, Any]:
        """What each way costs a fact, and their ratios."""
        # 1) Once each: memory and evaluations. Operations apart: the counter keeps what passes through until it is
        # collected.
        costs: list[dict[str, Any]] = []
        firsts = []
        for way in (full, fast):
            with evaluations() as counted:
                peak, first = self.peak(way.work)
            firsts.append(first)
            flop = _operations(way.work)
            costs.append({"facts": way.count, "flop": flop / way.count, "peak_mib": peak})
            costs[-1]["evaluations"] = counted[0] / way.count if counted[0] else None
        # 2) In turns.
        times: tuple[list[float], list[float]] = ([], [])
        if fast.count > 1:
            times = [firsts[0]], [firsts[1]]
        for _ in tqdm(range(self.repeats if fast.count == 1 else 0), desc="repeats", leave=False, delay=1):
            for way, into in zip((full, fast), times, strict=True):
                into.append(self.seconds(way.work))
        # 3) A fact's share.
        for way, cost, own in zip((full, fast), costs, times, strict=True):
            cost |= {"seconds": statistics.median(own) / way.count, "runs": sorted(own)}
        return ratios(costs[0], costs[1], self.rate, self.quick_rate)


def ratios(full: dict[str, Any], fast: dict[str, Any], rate: float, quick_rate: float) -> dict[str, Any]:
    """One row: both costs with their share of the floor, and how many times less the fast way costs.

    - `full`, `fast`: seconds, flop and evaluations of a fact.
    - `rate`, `quick_rate`: operations a second of a large product, as full depth and as the fast way multiply.
    """
    found: dict[str, Any] = {"ratio": full["seconds"] / fast["seconds"], "ratio_counted": full["flop"] / fast["flop"]}
    found["share_of_counted"] = found["ratio"] / found["ratio_counted"]
    for way, own in ((full, rate), (fast, quick_rate)):
        way["share_of_floor"] = way["flop"] / own / way["seconds"]
    found["share_of_floor"] = fast["share_of_floor"]
    if full["evaluations"] and fast["evaluations"]:
        found["ratio_an_evaluation"] = found["ratio"] * fast["evaluations"] / full["evaluations"]
    return found | {"full": full, "fast": fast}


@contextlib.contextmanager
def evaluations() -> Iterator[list[int]]:
    """In the body, [how many evaluations of a fact's value both engines have run]."""
    count = [0]

    def counting(kind: type[FullDepth] | type[Replayed]) -> Any:
        run = kind.logits

        def logits(self: Any, delta: Tensor) -> Tensor:
            count[0] += len(self.batch.facts)
            return run(self, delta)

        return mock.patch.object(kind, "logits", logits)

    with counting(FullDepth), counting(Replayed):
        yield count


def _operations(work: Work) -> int:
    """Floating-point operations, oneDNN's products included."""
    own = {torch.ops.mkldnn._linear_pointwise: _of_linear} if faster() else {}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    found: int = counter.get_total_flops()
    del counter
    gc.collect()
    return found


def _of_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(prod(x)) * int(weight[0])


def machine_of(bench: Bench, clock: str) -> dict[str, Any]:
    """What the figures were measured on."""
    load = Path("/proc/loadavg")
    return {
        "cpu": processor(),
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": clock,
        "load_before": load.read_text(encoding="ascii").split()[0] if load.exists() else None,
        "matrix_gflops": bench.rate / 1e9,
        "quick_matrix_gflops": bench.quick_rate / 1e9,
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _status(field: str) -> int:
    """KiB, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
