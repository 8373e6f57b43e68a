"""What a Trace costs on the atlas model's forward pass: ratios to the bare call, beside hand-written hooks.

    python scripts/nethook_overhead.py                       # about half a minute on an idle core

Each repeat runs every way once, in a new random order, so that whatever else the machine does falls on all alike.
What is timed is the whole use: setting up, the forward pass, and taking down. Ratios are medians, over repeats, of a
way's time divided by the bare call's in the same repeat. Compare ratios within one run only, and on idle cores.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from torch import Tensor, nn
from tqdm import tqdm

from editkit.files import write_text
from editkit.models.load import load
from editkit.nethook import Trace, get_module, select

BARE = "bare call"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu leaves out the time that others had the core


def bare(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def traced(options: dict[str, Any], sites: list[str], model: nn.Module, ids: Tensor) -> None:
    with Trace(model, sites, **options):
        model(input_ids=ids, use_cache=False)


def storing(sites: list[str], positions: int | None, model: nn.Module, ids: Tensor) -> None:
    """A hook as one writes it by hand, removed afterwards."""
    kept: dict[str, Tensor] = {}

    def store(site: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        kept[site] = output.detach() if positions is None else output.detach()[:, positions].clone()

    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(get_module(model, site).register_forward_hook(partial(store, site)).remove)
        model(input_ids=ids, use_cache=False)


def editing(site: str, model: nn.Module, ids: Tensor) -> None:
    def changed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return change(output)

    handle = get_module(model, site).register_forward_hook(changed)
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()


def change(h: Tensor) -> Tensor:
    return h * 1.01


def ways(one: str, every: list[str]) -> dict[str, Callable[[nn.Module, Tensor], None]]:
    many = f"{len(every)} MLPs"
    return {
        BARE: bare,
        f"{BARE}, again": bare,  # what the measurement itself cannot tell apart
        "empty Trace, 1 MLP": partial(traced, {"outputs": False}, [one]),
        "hook stores, 1 MLP": partial(storing, [one], None),
        "Trace captures, 1 MLP": partial(traced, {}, [one]),
        f"hooks store, {many}": partial(storing, every, None),
        f"Trace captures, {many}": partial(traced, {}, every),
        f"hooks store token -1, {many}": partial(storing, every, -1),
        f"Trace captures token -1, {many}": partial(traced, {"positions": -1}, every),
        "hook edits, 1 MLP": partial(editing, one),
        "Trace edits, 1 MLP": partial(traced, {"edit": change, "outputs": False}, [one]),
        "Trace edits and captures, 1 MLP": partial(traced, {"edit": change}, [one]),
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def measure(
    timed: dict[str, Callable[..., Any]],
    model: nn.Module,
    ids: Tensor,
    repeats: int,
    clock: Callable[[], float],
    bar: tqdm,
) -> dict[str, dict[str, list[float]]]:
    """For each way the quartiles of its milliseconds, of its ratio to the bare call, and of the difference in ms."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    names, order = list(timed), random.Random(0)
    for repeat in range(-3, repeats):  # the first three warm up
        order.shuffle(names)
        for name in names:
            began = clock()
            timed[name](model, ids)
            if repeat >= 0:
                taken[name].append(1e3 * (clock() - began))
            bar.update()
    found = {}
    for name, each in taken.items():
        pairs = list(zip(each, taken[BARE], strict=True))
        found[name] = {
            "ms": quartiles(each),
            "ratio": quartiles([a / b for a, b in pairs]),
            "difference_ms": quartiles([a - b for a, b in pairs]),
        }
    return found


def size(text: str) -> tuple[int, int]:
    try:
        rows, _, tokens = text.partition("x")
        found = int(rows), int(tokens)
    except ValueError:
        found = 0, 0
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': give rows x tokens, as in 8x64")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="+", default=[(1, 16), (8, 64)], metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=100, help="at each size; default: 100")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: 1")
    parser.add_argument("--grad", action="store_true", help="with gradients on; default: under torch.no_grad()")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: where the cores are busy; default: wall")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if options.repeats < 2 or options.threads < 1:
        parser.error("--repeats takes 2 or more, --threads 1 or more")

    torch.set_num_threads(options.threads)
    lm = load("atlas", device="cpu")
    every = select(lm.model, "transformer.h.*.mlp")
    longest = lm.model.config.n_positions
    if too_long := [tokens for _, tokens in options.sizes if tokens > longest]:
        parser.error(f"--sizes: {too_long[0]} tokens; atlas has {longest} positions")
    timed = ways(every[len(every) // 2], every)
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "load_before": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items()))
    gradients = "on" if options.grad else "off"
    print(
        f"atlas: {lm.layers} blocks, d_model {lm.model.config.n_embd}; gradients {gradients}; {options.repeats} repeats"
    )

    found: dict[str, Any] = {"machine": machine, "gradients": gradients, "repeats": options.repeats, "sizes": {}}
    total = len(options.sizes) * len(timed) * (options.repeats + 3)
    with (
        torch.set_grad_enabled(options.grad),
        tqdm(total=total, desc="runs", delay=3, mininterval=1, leave=False) as bar,
    ):
        for rows, tokens in options.sizes:
            ids = torch.randint(lm.model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
            result = measure(timed, lm.model, ids, options.repeats, CLOCKS[options.clock], bar)
            found["sizes"][f"{rows}x{tokens}"] = result
            bar.clear()
            print(
                f"\n{f'{rows} x {tokens} tokens':32}{'ms':>8}{'quartiles':>17}{'ratio':>9}{'quartiles':>15}{'+ ms':>8}"
            )
            for name, figures in result.items():
                (a, ms, b), (low, ratio, high) = figures["ms"], figures["ratio"]
                print(
                    f"{name:32}{ms:8.3f}{f'{a:.3f} – {b:.3f}':>17}{ratio:9.3f}{f'{low:.3f} – {high:.3f}':>15}"
                    f"{figures['difference_ms'][1]:8.3f}",
                    flush=True,
                )
    if options.json:
        write_text(options.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
