"""How the cost of values grows with the edited block, the tokens before and behind the subject, and the facts.

    python experiments/cost/cost.py                 # about 5 minutes on two cores; writes results.json and cost.png

One quantity varies at a time around a GPT-2-small shape with random weights, block 5, eight rows of about 12 tokens
before the subject's end and 8 from there on, five steps. Each point is the median of three runs of replay, in turns
over the points; the full-depth engine is run once a point. The fits are by least squares on the medians.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench import STEPS
from machine import processor
from shapes import contexts_of, model_of

from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.value import compute_deltas
from editkit.models.load import LanguageModel

HERE = Path(__file__).parent
LAYERS = (0, 2, 4, 6, 8, 10, 11)
BEFORE = (4, 8, 16, 32, 64)  # tokens of the contexts in front of the prompt
BEHIND = (1, 4, 8, 16, 32)  # words between the subject and the target
FACTS = (1, 2, 4, 8, 16)
REPEATS = 3
SUBJECTS = ("Berlin", "Rome", "Vienna", "Prague")


def point(lm: LanguageModel, *, layer: int = 5, before: int = 8, behind: int = 6, facts: int = 1) -> dict[str, Any]:
    """What one point optimises, and how many tokens its rows have before and from the lookup token on."""
    contexts = contexts_of(lm, [before] * 7)
    words = " ".join((["is", "now", "in", "the", "city", "of"] * 11)[:behind])
    asked = [Fact(f"The town {{}} {words}", SUBJECTS[i % 4], "Oslo") for i in range(facts)]
    rows = [rows_of(lm, fact, "subject_last", contexts) for fact in asked]
    return {
        "layer": layer,
        "facts": facts,
        "blocks_above": lm.layers - 1 - layer,
        "tokens_before": statistics.mean(at for each in rows for at in each.lookup),
        "columns": statistics.mean(max(b - a for a, b in zip(r.lookup, r.last, strict=True)) + 1 for r in rows),
        "rows": rows,
    }


def seconds(lm: LanguageModel, at: dict[str, Any], engine: str) -> float:
    steps: dict[str, Any] = STEPS | {"steps": 5}
    settings = RRomeSettings(layer=at["layer"], engine=engine, **steps)
    site, rows = lm.architecture.down(at["layer"]), at["rows"]
    began = time.perf_counter()
    compute_deltas(lm, at["layer"], [site], rows, torch.ones(len(rows), 1), settings, name="", progress=False)
    return time.perf_counter() - began


def fitted(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of y over x by least squares."""
    a = torch.tensor([[1.0, value] for value in x], dtype=torch.double)
    found = torch.linalg.lstsq(a, torch.tensor(y, dtype=torch.double)[:, None]).solution[:, 0]
    return found[0].item(), found[1].item()


def main() -> None:
    lm, _ = model_of("gpt2-small")
    grids = {
        "blocks_above": [point(lm, layer=layer) for layer in LAYERS],
        "tokens_before": [point(lm, before=n) for n in BEFORE],
        "columns": [point(lm, behind=n) for n in BEHIND],
        "facts": [point(lm, facts=n) for n in FACTS],
    }
    points = [at for grid in grids.values() for at in grid]
    seconds(lm, points[0], "replay")  # warm up
    for at in tqdm(points, desc="full depth"):
        at["full_seconds"] = seconds(lm, at, "full")
    order, rng = list(range(len(points))) * REPEATS, random.Random(0)
    rng.shuffle(order)
    for i in tqdm(order, desc="replay"):
        points[i].setdefault("runs", []).append(seconds(lm, points[i], "replay"))
    found: dict[str, Any] = {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for axis, grid in grids.items():
        for at in grid:
            at.pop("rows", None)
            at["seconds"] = statistics.median(at["runs"])
        x, y = [at[axis] for at in grid], [at["seconds"] for at in grid]
        base, slope = fitted(x, y)
        full_base, full_slope = fitted(x, [at["full_seconds"] for at in grid])
        found[axis] = {
            "points": grid,
            "fit": {"seconds_at_0": base, "seconds_each": slope},
            "full_fit": {"seconds_at_0": full_base, "seconds_each": full_slope},
        }
        print(f"{axis:14} replay {base:.3f} s + {slope:.4f} s each; full {full_base:.3f} s + {full_slope:.4f} s each")
    write_text(HERE / "results.json", json.dumps(found, indent=1) + "\n")
    draw(found)


def draw(found: dict[str, Any]) -> None:
    """Four panels: seconds of both engines over each quantity."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "blocks_above": "blocks above the edited one",
        "tokens_before": "tokens before the lookup token",
        "columns": "tokens from the lookup token on",
        "facts": "facts in a batch",
    }
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for panel, (axis, title) in zip(panels, titles.items(), strict=True):
        grid = found[axis]["points"]
        x = [at[axis] for at in grid]
        panel.plot(x, [at["full_seconds"] for at in grid], "s--", color="#d55e00", label="full depth")
        panel.plot(x, [at["seconds"] for at in grid], "o-", color="#0072b2", label="replay")
        panel.set_xlabel(title)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds for 5 steps")
    panels[0].legend()
    figure.savefig(HERE / "cost.png", dpi=110)


if __name__ == "__main__":
    main()
