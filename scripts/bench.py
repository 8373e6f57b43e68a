"""What an edit costs: the full-depth engine against replay, on models of GPT-2's shapes with random weights.

    python scripts/bench.py                                   # GPT-2-small's shape on all cores; about 35 minutes
    python scripts/bench.py --shape gpt2-medium --json FILE   # gpt2-small, gpt2-medium, gpt2-xl, atlas
    python scripts/bench.py --only edit,evaluation --device cuda --dtype bfloat16
    python scripts/bench.py --threads 1 --clock cpu           # where the cores are busy with other work

The full-depth engine does what the reference code does: all rows, tokens, blocks and logits, one fact at a time. Both
engines take the same 20 steps on the same rows, C is the identity, and contexts are given, so that neither covariance
nor sampling is in the times. Ratios compare medians within one run only. "counted" is the ratio of the floating-point
operations that torch counts in both; "of the floor" is how near replay comes to the time that its own operations take
at the rate of a large matrix product on this machine. Second moments: a pass a layer against one pass for all layers,
with the count of moments_onepass.py, where a float64 operation is two.

Without --tokenizer the atlas tokenizer is used, whose texts have more tokens than GPT-2's.
"""

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from moments_onepass import CLOCKS, a_pass_each, counted, in_one_pass
from torch.nn.functional import log_softmax
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from editkit.corpora import atlas_prose
from editkit.data.atlas import atlas_cases
from editkit.data.cases import Case
from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods.memit import MemitSettings
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.rome import rome, rome_each
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.prelude import prepare
from editkit.methods.shared.spread import compute_z
from editkit.methods.shared.value import compute_deltas
from editkit.metrics.scoring import score_probes
from editkit.models.architecture import architecture_of
from editkit.models.load import BUNDLED, DTYPES, LanguageModel, load
from editkit.models.tokens import encode_with_targets, spaced
from editkit.settings import MomentSettings, TraceSettings
from editkit.tracing import trace

# blocks, d_model, heads, and the block that is edited
SHAPES = {"gpt2-small": (12, 768, 12, 5), "gpt2-medium": (24, 1024, 16, 8), "gpt2-xl": (48, 1600, 25, 17)}
NO_MOMENTS = MomentSettings(enabled=False)
# Never stops early.
STEPS: dict[str, Any] = {"steps": 20, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0, "stop_loss": -1.0}
PARTS = ("edit", "loop", "batch", "memit", "evaluation", "trace", "moments")


def model_of(shape: str, tokenizer: str | None, device: str, dtype: str) -> tuple[LanguageModel, int]:
    """A model of that shape with seeded random weights, and the block to edit."""
    if shape == "atlas":
        return load("atlas", device=device, dtype=dtype), 4
    blocks, width, heads, layer = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(n_layer=blocks, n_embd=width, n_head=heads)).eval()
    model.to(dtype=DTYPES[dtype])  # pyright: ignore[reportCallIssue]  # the wrapper around `to` hides its `self`
    found = AutoTokenizer.from_pretrained(tokenizer or BUNDLED["atlas"])
    return LanguageModel(f"random {shape}", model, found, architecture_of("gpt2")), layer


def contexts_of(lm: LanguageModel, lengths: Sequence[int]) -> list[str]:
    """The bare prompt, and texts of so many tokens in front of it."""
    ids = lm.tokenizer(" ".join(atlas_prose()))["input_ids"]
    texts, at = ["{}"], 0
    for length in lengths:
        text = str(lm.tokenizer.decode(ids[at : at + length]))
        texts.append(text.replace("{", " ").replace("}", " ").strip() + ". {}")
        at += length
    return texts


def facts_of(count: int) -> list[Case]:
    """Cases of different prompts."""
    cases = {case.fact.text: case for case in atlas_cases(2 * count)}
    return list(cases.values())[:count]


def evaluated_as_the_reference(lm: LanguageModel, case: Case) -> list[float]:
    """A record in one batch of whole rows, with logits of every token."""
    asked = [(p.prompt, target) for p in case.probes for target in (p.target_new, p.target_true) if target]
    scored = encode_with_targets(lm, [prompt for prompt, _ in asked], [spaced(target) for _, target in asked])
    row, at, token = scored.pick()
    with torch.inference_mode():
        logits = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at].float()
        log_p = log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
    return (torch.zeros(len(asked)).index_add(0, row.cpu(), -log_p.cpu()) / torch.bincount(row.cpu())).tolist()


class Bench:
    """Times two ways of doing one thing, in turns after a warm-up; what is done to many facts, once."""

    def __init__(self, device: str, repeats: int, clock: str) -> None:
        self.device, self.repeats, self.clock = device, repeats, CLOCKS[clock]
        self.rate = self.matrix_rate()

    def seconds(self, work: Callable[[], Any]) -> float:
        began = self.clock()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock() - began

    def matrix_rate(self, dtype: torch.dtype = torch.float32) -> float:
        """Floating-point operations a second of a large product."""
        size = 1536 if self.device == "cpu" else 8192
        a = torch.randn(size, size, device=self.device, dtype=dtype)
        return 2 * size**3 / statistics.median(self.seconds(lambda: a @ a) for _ in range(9))

    def peak(self, work: Callable[[], Any]) -> tuple[float | None, float]:
        """MiB at the highest that were not in use before (None where the system does not tell), and seconds."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            seconds = self.seconds(work)
            return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand back what earlier work had freed
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
            before = status("VmRSS")
        except OSError:
            return None, self.seconds(work)
        seconds = self.seconds(work)
        return (status("VmHWM") - before) / 1024, seconds

    def compare(
        self, full: Callable[[], Any], fast: Callable[[], Any], *, full_facts: int = 1, fast_facts: int = 1
    ) -> dict[str, Any]:
        """Seconds and operations for each fact (record) either way."""
        # Peaks first: the counter keeps what passes through until it is collected.
        (full_peak, full_first), (fast_peak, fast_first) = self.peak(full), self.peak(fast)
        counts = []
        for work in (full, fast):
            with FlopCounterMode(display=False) as counter:
                work()
            counts.append(counter.get_total_flops())
            del counter
            gc.collect()
        times: tuple[list[float], list[float]] = ([], [])
        if fast_facts > 1:
            times = [full_first], [fast_first]
        for _ in tqdm(range(self.repeats if fast_facts == 1 else 0), desc="repeats", leave=False, delay=1):
            for work, into in zip((full, fast), times, strict=True):
                into.append(self.seconds(work))
        slow, quick = (statistics.median(each) / n for each, n in zip(times, (full_facts, fast_facts), strict=True))
        flops = counts[0] / full_facts, counts[1] / fast_facts
        return {
            "full_seconds": slow,
            "seconds": quick,
            "ratio": slow / quick,
            "ratio_counted": flops[0] / flops[1],
            "share_of_counted": slow / quick / (flops[0] / flops[1]),
            "gflop": flops[1] / 1e9,
            "of_the_floor": flops[1] / self.rate / quick,
            "full_of_the_floor": flops[0] / self.rate / slow,
            "peak_mib": fast_peak,
            "full_peak_mib": full_peak,
            "runs": {"full": sorted(times[0]), "replay": sorted(times[1])},
        }


def status(field: str) -> int:
    """KiB, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "atlas"], default="gpt2-small")
    parser.add_argument("--layer", type=int, default=None, help="block that is edited; default: by shape")
    parser.add_argument("--tokenizer", default=None, help="a folder with a tokenizer; default: the atlas model's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread, on busy cores")
    parser.add_argument("--keys", type=int, default=2560, help="of each layer's second moment")
    parser.add_argument("--facts", type=int, default=50, help="in a batch; MEMIT takes twice as many")
    parser.add_argument("--sample", type=int, default=2, help="facts that stand for a batch at full depth")
    parser.add_argument("--records", type=int, default=50, help="evaluated")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; found {', '.join(sorted(unknown))}")
    if options.threads:
        torch.set_num_threads(options.threads)

    lm, proposed = model_of(options.shape, options.tokenizer, options.device, options.dtype)
    layer = lm.check_layer(proposed if options.layer is None else options.layer)
    cases = facts_of(max(2 * options.facts, options.records))
    facts = [case.fact for case in cases]
    contexts, few = contexts_of(lm, [4] * 10 + [9] * 10), contexts_of(lm, [10] * 5)
    bench = Bench(options.device, options.repeats, options.clock)
    rows = [rows_of(lm, fact, "subject_last", contexts) for fact in facts[: options.facts]]
    lengths = [len(offsets) for each in rows for offsets in each.scored.rows.offsets]
    columns = [each.columns for each in rows]
    machine = {
        "cpu": processor(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load_before": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
        "matrix_gflops": bench.rate / 1e9,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sizes = {
        "shape": options.shape,
        "dtype": options.dtype,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "blocks": lm.layers,
        "layer": layer,
        "rows": len(contexts) + 1,
        "tokens_a_row": statistics.mean(lengths),
        "columns_replayed": statistics.mean(columns),
        "steps": STEPS["steps"],
        "repeats": options.repeats,
    }
    for title, said in (("machine", machine), ("sizes", sizes)):
        print(f"{title:8}" + ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in said.items()))

    given: dict[str, Any] = {"moments": NO_MOMENTS, "contexts": contexts, "progress": False}
    fast = RRomeSettings(layer=layer, **STEPS)
    full = replace(fast, engine="full")
    site = lm.architecture.down(layer)

    def loop(settings: RRomeSettings) -> Callable[[], Any]:
        norms = torch.ones(1, 1)
        return lambda: compute_deltas(lm, layer, [site], rows[:1], norms, settings, name="", progress=False)

    def values(settings: MemitSettings, some: Sequence[Fact]) -> Callable[[], Any]:
        target_site = lm.architecture.target_site(layer)
        facts = prepare(lm, some, settings, seed=0, moments=NO_MOMENTS, contexts=few, progress=False)
        return lambda: compute_z(lm, facts, [site], target_site, progress=False)

    memit = MemitSettings(layers=[layer], **STEPS)
    first, n = facts[0], options.facts
    works: dict[str, tuple[str, Callable[[], Any], Callable[[], Any], int, int]] = {
        "edit": ("one ROME edit", lambda: rome(lm, first, full, **given), lambda: rome(lm, first, fast, **given), 1, 1),
        "loop": ("its value alone", loop(full), loop(fast), 1, 1),
        "batch": (
            f"{n} ROME edits, each",
            lambda: rome_each(lm, facts[: options.sample], full, **given),
            lambda: rome_each(lm, facts[:n], fast, **given),
            options.sample,
            n,
        ),
        "memit": (
            f"{2 * n} values of MEMIT, each",
            values(replace(memit, engine="full"), facts[: options.sample]),
            values(memit, facts[: 2 * n]),
            options.sample,
            2 * n,
        ),
        "evaluation": (
            f"{options.records} records, each",
            lambda: [evaluated_as_the_reference(lm, case) for case in cases[:5]],
            lambda: [score_probes(lm, case.probes) for case in cases[: options.records]],
            5,
            options.records,
        ),
    }
    how = TraceSettings(kinds=("state",))
    works["trace"] = (
        "a trace of one prompt",
        lambda: trace(lm, first, replace(how, engine="full"), progress=False),
        lambda: trace(lm, first, how, progress=False),
        1,
        1,
    )
    moments, modules = MomentSettings(tokens=options.keys), [lm.architecture.down(i) for i in range(lm.layers)]
    works["moments"] = (
        f"{lm.layers} second moments",
        lambda: a_pass_each(lm, modules, moments),
        lambda: in_one_pass(lm, modules, moments),
        1,
        1,
    )
    found: dict[str, Any] = {"machine": machine, "sizes": sizes, "results": {}}
    print(
        f"\n{'':28}{'full s':>9}{'replay s':>9}{'ratio':>7}{'counted':>8}{'share':>7}{'floor':>7}"
        f"{'MiB':>7}{'full MiB':>9}"
    )
    for name in PARTS:
        if name not in only:
            continue
        title, slow, quick, slow_count, quick_count = works[name]
        with nullcontext() if name == "evaluation" else torch.enable_grad():
            each = bench.compare(slow, quick, full_facts=slow_count, fast_facts=quick_count)
        if name == "moments":
            count = counted(lm, moments.block)
            each |= {"ratio_counted": count, "share_of_counted": each["ratio"] / count}
            each |= dict.fromkeys(("of_the_floor", "full_of_the_floor"))  # its sums are in float64
        found["results"][name] = {"what": title} | each
        peaks = [f"{each[key]:.0f}" if each[key] is not None else "-" for key in ("peak_mib", "full_peak_mib")]
        print(
            f"{title:28}{each['full_seconds']:9.3f}{each['seconds']:9.3f}{each['ratio']:7.2f}"
            f"{each['ratio_counted']:8.2f}{each['share_of_counted']:7.2f}"
            f"{each['of_the_floor'] if each['of_the_floor'] is not None else math.nan:7.2f}"
            f"{peaks[0]:>7}{peaks[1]:>9}",
            flush=True,
        )
        if options.json:
            write_text(options.json, json.dumps(found, indent=2) + "\n")


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
