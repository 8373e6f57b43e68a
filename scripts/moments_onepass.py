"""Second moments of all layers in one pass against one pass a layer, on the atlas model: the results and the times.

    python scripts/moments_onepass.py                        # about two minutes on an idle core

Each repeat does both once, in a new random order. Compare ratios within one run only, and on idle cores. The counted
ratio is what matrix products alone would give: a forward pass up to block L costs L + 1 blocks, the sums the same in
both, and a float64 operation as much as two in float32.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from timing import CLOCKS
from tqdm import tqdm

from editkit.files import write_text
from editkit.models.load import LanguageModel, load
from editkit.moments.collect import PANELS, Sums, collect
from editkit.nethook import get_module, get_parameter
from editkit.settings import MomentSettings


def in_one_pass(lm: LanguageModel, modules: list[str], settings: MomentSettings) -> list[Sums]:
    return [collect(lm, modules, settings, progress=False)]


def a_pass_each(lm: LanguageModel, modules: list[str], settings: MomentSettings) -> list[Sums]:
    return [collect(lm, [module], settings, progress=False) for module in modules]


def largest_difference(modules: list[str], one: list[Sums], each: list[Sums]) -> float:
    """Over modules, the largest |C - C'| in units of the largest |C|."""
    found = []
    for module, alone in zip(modules, each, strict=True):
        a, b = (sums.pop(module, "", {}).matrix for sums in (one[0], alone))
        found.append(((a - b).abs().max() / a.abs().max()).item())
    return max(found)


def counted(lm: LanguageModel, layers: Sequence[int], block: int, double: float = 2.0) -> float:
    """The ratio that multiplications give.

    - `layers`: whose moments are collected. `block`: tokens of a row.
    - `double`: float32 operations that one in float64 costs.
    """
    first = get_module(lm.model, lm.architecture.block.format(0))
    d = lm.model.config.get_text_config().hidden_size
    # Of a token: projections and MLP; then attention scores and their use.
    one_block = sum(p.numel() for p in first.parameters() if p.ndim == 2) + 2 * block * d
    depths = [layer + 1 for layer in layers]
    sums = double * operations_of_sums(lm, layers) / 2
    ratio: float = (sum(depths) * one_block + sums) / (max(depths) * one_block + sums)
    return ratio


def operations_of_sums(lm: LanguageModel, layers: Sequence[int]) -> float:
    """Floating-point operations of Σ k kᵀ, in float64, for one token: panels over the lower triangle."""
    return len(layers) * 2 * d_ff_of(lm) ** 2 * (PANELS + 1) / (2 * PANELS)


def d_ff_of(lm: LanguageModel) -> int:
    """The length of a key."""
    weight = get_parameter(lm.model, f"{lm.architecture.down(0)}.weight")
    return weight.numel() // int(lm.model.config.get_text_config().hidden_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="keys a layer; default: 20000")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where the cores are busy; default: wall")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if min(options.repeats, options.threads, options.tokens) < 1:
        parser.error("--repeats, --threads and --tokens take 1 or more")

    torch.set_num_threads(options.threads)
    lm = load("atlas", device="cpu")
    modules = [lm.architecture.down(layer) for layer in range(lm.layers)]
    settings = MomentSettings(tokens=options.tokens)
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load_before": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items()))

    ways = {"one pass": in_one_pass, "a pass a layer": a_pass_each}
    clock, order, names = CLOCKS[options.clock], random.Random(0), list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Sums]] = {}
    for repeat in tqdm(range(-1, options.repeats), desc="repeats", delay=1, leave=False):  # the first warms up
        order.shuffle(names)
        for name in names:
            began = clock()
            results[name] = ways[name](lm, modules, settings)
            if repeat >= 0:
                seconds[name].append(clock() - began)
    taken = zip(seconds["one pass"], seconds["a pass a layer"], strict=True)
    ratios = [each / one for one, each in taken]
    found: dict[str, Any] = {
        "machine": machine,
        "layers": len(modules),
        "keys": results["one pass"][0].count,
        "repeats": options.repeats,
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": sorted(ratios),
        "ratio_counted": counted(lm, range(lm.layers), settings.block),
        "largest_relative_difference": largest_difference(modules, results["one pass"], results["a pass a layer"]),
    }
    print(f"atlas: {found['layers']} layers, {found['keys']:,} keys each; {options.repeats} repeats, medians")
    for name, each in found["seconds"].items():
        print(f"{name:16}{each:8.2f} s")
    print(f"ratio           {found['ratio']:8.2f}    counted {found['ratio_counted']:.2f}")
    print(f"largest relative difference {found['largest_relative_difference']:.1e}")
    if options.json:
        write_text(options.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
