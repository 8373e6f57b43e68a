"""UltraEdit's solve in tokens × tokens against the authors' in p × p: seconds, edits a second, and the difference.

    python scripts/ultraedit.py                                  # atlas and GPT-2-small's shape; a minute
    python scripts/ultraedit.py --shapes llama-3-8b --parts gate # one block's gate projection alone, 4 GB

ΔWᵀ = (HᵀH + αI)⁻¹ Hᵀ V = Hᵀ (HHᵀ + αI)⁻¹ V for one block's weight [q, p], H [T, p] and V [T, q] (methods/ultraedit.py).
The slow side forms ΔW, as the authors' code does; the fast side gives its factors, which are the Edit. Both are in
float64 and in one run, in turns. With --whole, for a model that is made here, an edit as a whole too: the pass of
the model, the statistics, and either solve. Inputs are a real batch's there, and random at shapes without a model.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from shapes import SHAPES, cases_of, model_of
from timing import Bench, machine_of
from torch import Tensor

from editkit.edits import dense_delta
from editkit.files import write_text
from editkit.methods.shared.gradients import answer_pairs
from editkit.methods.ultraedit import UltraEditSettings, ridge, ultraedit
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel

ALPHA = 1.0
TOKENS = 3  # of an answer, at shapes without a model


@dataclass(frozen=True)
class Weight:
    """One block's weight [q, p]."""

    part: str
    q: int
    p: int


def weights_of(shape: str) -> list[Weight]:
    """The MLP's weights of one block of that shape; of the atlas model and GPT-2's kind the up- and down-projection."""
    if shape == "atlas":
        return [Weight("up", 768, 192), Weight("down", 192, 768)]
    sizes = SHAPES[shape].sizes
    width = sizes.get("n_embd") or sizes["hidden_size"]
    inner = sizes.get("intermediate_size") or 4 * width
    found = [Weight("up", inner, width), Weight("down", width, inner)]
    return [Weight("gate", inner, width), *found] if "intermediate_size" in sizes else found


def as_the_authors(inputs: Tensor, values: Tensor, alpha: float) -> tuple[Tensor, None]:
    """ΔW [q, p] by the p × p system, and no second factor."""
    gram = inputs.T @ inputs + alpha * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    return torch.linalg.solve(gram, inputs.T @ values).T, None


def compared(bench: Bench, slow: Callable[[], Any], fast: Callable[[], Any], facts: int) -> dict[str, Any]:
    """Both in turns, once each to warm up unless there is one repeat only: medians and their ratio."""
    ways = (slow, fast)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(bench.repeats + (bench.repeats > 1)):
        for way, into in zip(ways, times, strict=True):
            seconds = bench.seconds(way)
            if number or bench.repeats == 1:
                into.append(seconds)
    medians = [statistics.median(each) for each in times]
    return {
        "slow_seconds": medians[0],
        "fast_seconds": medians[1],
        "ratio": medians[0] / medians[1],
        "edits_a_second": facts / medians[1],
        "slow_edits_a_second": facts / medians[0],
    }


def solve_of(bench: Bench, weight: Weight, inputs: Tensor, values: Tensor, facts: int) -> dict[str, Any]:
    """The row of one weight's solve, with the relative difference of the two ΔW."""
    row = compared(bench, lambda: as_the_authors(inputs, values, ALPHA), lambda: ridge(inputs, values, ALPHA), facts)
    left, right = ridge(inputs, values, ALPHA)
    change, _ = as_the_authors(inputs, values, ALPHA)
    # A strip of rows at a time: ΔW itself may be large.
    apart = sum((a @ right - b).square().sum() for a, b in zip(left.split(1024), change.split(1024), strict=True))
    size = {"part": weight.part, "q": weight.q, "p": weight.p, "tokens": len(inputs), "facts": facts}
    return size | row | {"difference": float(torch.as_tensor(apart).sqrt() / change.norm())}


def whole_of(bench: Bench, lm: LanguageModel, layer: int, count: int) -> dict[str, Any]:
    """The row of whole edits of `count` facts, at one block's down-projection."""
    facts = [case.fact for case in cases_of(count)]
    settings = UltraEditSettings(layers=(layer,), lr=1e-6, alpha=ALPHA)

    def dense(lm: LanguageModel, name: str, change: Tensor, _: None) -> Any:
        return dense_delta(lm, name, change)

    def slow() -> None:
        with (
            mock.patch("editkit.methods.ultraedit.ridge", as_the_authors),
            mock.patch("editkit.methods.ultraedit.low_rank_delta", dense),
        ):
            ultraedit(lm, facts, settings)

    return {"part": "whole edit", "facts": len(facts)} | compared(
        bench, slow, lambda: ultraedit(lm, facts, settings), len(facts)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["atlas", *SHAPES]
    parser.add_argument("--shapes", default="atlas,gpt2-small", help=f"one or more of {', '.join(known)}")
    parser.add_argument("--parts", default="gate,up,down", help="whose solves are timed")
    parser.add_argument("--edits", type=int, default=100, help="facts in a batch")
    parser.add_argument("--whole", action="store_true", help="whole edits too, on a model of the shape")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: with one thread, on busy cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after each shape")
    options = parser.parse_args()
    shapes, parts = options.shapes.split(","), options.parts.split(",")
    if unknown := sorted({*shapes} - {*known} | {*parts} - {"gate", "up", "down"}):
        parser.error(f"unknown {', '.join(unknown)}: see --shapes and --parts")
    if min(options.edits, options.repeats) < 1:
        parser.error("--edits and --repeats take 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench("cpu", torch.float32, options.repeats, options.clock)
    found: dict[str, Any] = {"machine": machine_of(bench, options.clock), "shapes": {}}
    print(f"{'':28}{'p × p s':>10}{'dual s':>10}{'ratio':>8}{'edits/s':>10}{'difference':>12}")
    for shape in shapes:
        rows = rows_of(bench, shape, parts, options.edits, whole=options.whole)
        found["shapes"][shape] = rows
        for row in rows:
            size = f" {row['q']} x {row['p']}" if "q" in row else ""
            apart = f"{row['difference']:12.1e}" if "difference" in row else f"{'-':>12}"
            print(
                f"{shape + ', ' + row['part'] + size:28}{row['slow_seconds']:10.4f}{row['fast_seconds']:10.4f}"
                f"{row['ratio']:8.1f}{row['edits_a_second']:10.0f}{apart}",
                flush=True,
            )
        if options.json:
            write_text(options.json, json.dumps(found, indent=2) + "\n")


def rows_of(bench: Bench, shape: str, parts: list[str], edits: int, *, whole: bool) -> list[dict[str, Any]]:
    """The rows of one shape."""
    rows = []
    lm, layer = model_of(shape, blocks=None if shape == "atlas" else 2) if whole else (None, 0)
    for weight in (each for each in weights_of(shape) if each.part in parts):
        draw = torch.Generator().manual_seed(0)
        if lm is not None and weight.part == "down":
            facts = [case.fact for case in cases_of(edits)]
            site = down_of(lm, layer)
            inputs, gradients = answer_pairs(lm, [site], facts)[0][site]
            values = -1e-3 * gradients
        else:
            inputs = torch.randn(TOKENS * edits, weight.p, generator=draw, dtype=torch.float64)
            values = torch.randn(TOKENS * edits, weight.q, generator=draw, dtype=torch.float64)
        rows.append(solve_of(bench, weight, inputs, values, edits))
    if lm is not None:
        rows.append(whole_of(bench, lm, layer, edits))
    return rows


if __name__ == "__main__":
    main()
