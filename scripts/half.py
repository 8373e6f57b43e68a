"""Half precision on a CPU: half arithmetic against float32 copies of the weights (editkit/models/precision.py).

    python scripts/half.py                                    # the atlas model; about 5 minutes
    python scripts/half.py --shape gpt2-small --blocks 4      # random weights
    python scripts/half.py --json FILE

For each dtype the same work is done in half arithmetic, as it was before, and in float32, in turns, beside a float32
model:

    keys/s      second moment at one block, the text and the copies of the weights included
    steps/s     the loop of one fact's value: 21 rows, --steps of Adam

Times are those of this process's own work on one core, so that other work on the machine counts little. A processor
with instructions for bfloat16 does it quickly; ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 shows one without.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from bench import STEPS
from machine import processor
from shapes import SHAPES, cases_of, contexts_of, model_of
from timing import CLOCKS

from editkit.files import write_text
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.shared import value
from editkit.methods.shared.engine import rows_of
from editkit.models import precision
from editkit.models.load import LanguageModel
from editkit.moments.collect import collect
from editkit.settings import MomentSettings

Rate = Callable[[], float]  # does the work once, and returns its rate


def in_half(rate: Rate) -> float:
    """The rate in half arithmetic: no memory is allowed for float32 copies."""
    share, precision.SHARE = precision.SHARE, 0.0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*float32 copies")
            return rate()
    finally:
        precision.SHARE = share


def keys_a_second(lm: LanguageModel, layer: int, tokens: int, clock: Callable[[], float]) -> float:
    began = clock()
    sums = collect(lm, [lm.architecture.down(layer)], MomentSettings(tokens=tokens), progress=False)
    return sums.count / (clock() - began)


def steps_a_second(lm: LanguageModel, layer: int, steps: int, clock: Callable[[], float]) -> float:
    rows = rows_of(lm, cases_of(1)[0].fact, "subject_last", contexts_of(lm, [4] * 10 + [9] * 10))
    constants: dict[str, Any] = STEPS
    settings = replace(RRomeSettings(layer=layer, **constants), steps=steps)
    loop = value._together
    seconds: list[float] = []

    def timed(*given: Any) -> list[value.Optimised]:
        began = clock()
        found = loop(*given)
        seconds.append(clock() - began)
        return found

    site = lm.architecture.down(layer)
    with mock.patch.object(value, "_together", timed):
        (result,) = value.compute_deltas(lm, layer, [site], [rows], None, settings, name="", progress=False)
    return len(result.steps) / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "atlas"], default="atlas")
    parser.add_argument("--blocks", type=int, default=None, help="only so many of the shape's blocks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keys", type=int, default=4096, help="in half arithmetic; ten times as many in float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="keys/s,steps/s")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = CLOCKS[options.clock]

    models = {
        dtype: model_of(options.shape, "cpu", dtype, blocks=options.blocks)
        for dtype in ("float32", "float16", "bfloat16")
    }
    lm, layer = models["float32"]
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "clock": options.clock,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sizes = {
        "shape": options.shape,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "blocks": lm.layers,
        "steps": options.steps,
        "layer": layer,
        "repeats": options.repeats,
    }
    for title, said in (("machine", machine), ("sizes", sizes)):
        print(f"{title:8}" + ", ".join(f"{name} {value}" for name, value in said.items()))

    rates: dict[str, dict[str, list[float]]] = {unit: {} for unit in options.only.split(",")}
    for _ in range(options.repeats + 1):  # the first is a warm-up
        for dtype, (lm, layer) in models.items():
            few, many = (partial(keys_a_second, lm, layer, n * options.keys, clock) for n in (1, 10))
            loop = partial(steps_a_second, lm, layer, options.steps, clock)
            works: dict[str, tuple[Rate, Rate]] = {"keys/s": (few, many), "steps/s": (loop, loop)}
            for unit in options.only.split(","):
                slow, quick = works[unit]
                if dtype != "float32":
                    rates[unit].setdefault(f"{dtype} before", []).append(in_half(slow))
                rates[unit].setdefault(dtype, []).append(quick())

    found: dict[str, dict[str, float]] = {}
    print(
        f"\n{'':10}{'float32':>10}" + "".join(f"{d + ' before':>17}{'now':>10}{'ratio':>7}" for d in list(models)[1:])
    )
    for unit, each in rates.items():
        found[unit] = {way: statistics.median(values[1:]) for way, values in each.items()}
        line = f"{unit:10}{found[unit]['float32']:10,.1f}"
        for dtype in list(models)[1:]:
            before, now = found[unit][f"{dtype} before"], found[unit][dtype]
            line += f"{before:17,.1f}{now:10,.1f}{now / before:7.1f}"
        print(line, flush=True)
    if options.json:
        runs = {unit: {way: values[1:] for way, values in each.items()} for unit, each in rates.items()}
        whole = {"machine": machine, "sizes": sizes, "medians": found, "runs": runs}
        write_text(options.json, json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()
