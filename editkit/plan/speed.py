"""What a device does in a second, measured on products of a model's own sizes: a fraction of a second in all."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from editkit.models.products import quick_products
from editkit.plan.sizes import Sizes

ROWS = 128  # of a product that is no longer bound by reading its weight
DIGESTED = 32 << 20  # bytes
SQUARE = 768  # of a float64 product
RUNS, SPENT = 3, 0.05  # of each product, at least so many and so many seconds


@dataclass(frozen=True)
class Speed:
    """Of one device and the machine that it is in."""

    operations: float  # a second, in products of many rows
    bandwidth: float  # bytes of weights a second, in products of one row
    float64: float  # operations a second of the CPU, for second moments and solves
    digest: float  # bytes a second

    @classmethod
    def measured(cls, sizes: Sizes, device: torch.device) -> "Speed":
        """`sizes`: of the model whose products are timed, in the dtype that it runs in."""
        d_model, d_ff = sizes.d_model, sizes.down[-1].d_ff
        weight = torch.ones(d_ff, d_model, dtype=sizes.runs_in, device=device)
        many, one = (torch.ones(rows, d_model, dtype=sizes.runs_in, device=device) for rows in (ROWS, 1))
        square = torch.ones(SQUARE, SQUARE, dtype=torch.float64)
        data = bytes(DIGESTED)

        with torch.inference_mode(), quick_products():
            return cls(
                2 * ROWS * d_model * d_ff / _seconds(lambda: torch.nn.functional.linear(many, weight), device),
                weight.nbytes / _seconds(lambda: torch.nn.functional.linear(one, weight), device),
                2 * SQUARE**3 / _seconds(lambda: square @ square),
                DIGESTED / _seconds(lambda: hashlib.sha256(data)) * torch.get_num_threads(),
            )


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """The least of some runs, after one that is not timed. On the CPU by this thread's own clock, so that other
    processes do not count."""
    on_cpu = device is None or device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    found: list[float] = []
    while len(found) <= RUNS or sum(found) < SPENT:
        began = clock()
        work()
        if not on_cpu:
            torch.accelerator.synchronize(device)
        found.append(clock() - began)
    return min(found[1:])
