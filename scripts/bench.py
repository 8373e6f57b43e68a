"""What an edit costs: full depth with Adam against what editkit does, on models of real sizes with random weights.

    python scripts/bench.py --json FILE                            # GPT-2-small's shape on all cores; about 30 minutes
    python scripts/bench.py --solver descent --rows one_edit,memit
    python scripts/bench.py --device cuda --dtype bfloat16 --shapes gpt2-xl,llama-3-8b
    python scripts/bench.py --threads 1 --clock cpu                # where the cores are busy with other work

Weights are made on the device, so nothing is downloaded. The slow side does what the reference code does: full depth
(all rows, tokens, blocks and logits), Adam, one fact at a time, torch's own products. The fast side is the replay
engine with --solver (default: the method's own). C is the identity and contexts are given, so that neither covariance
nor sampling is in the times. A row of the JSON has, for `full` and `fast`, seconds, operations and evaluations
(forward and backward) of a fact, and

    ratio                 seconds of full depth / seconds of the fast side
    ratio_counted         the same of the floating-point operations that torch counts
    share_of_counted      ratio / ratio_counted
    share_of_floor        how near the fast side comes to the time of its own operations at the rate of a large product
    ratio_an_evaluation   the ratio if both sides had run as many evaluations: what is left without the solver

Medians, within one run only; what is done to many facts is done once, and few facts stand for many at full depth.

How many evaluations a value takes depends on the model, and random weights know no facts: the stop says nothing here.
So the counts are fixed (--evaluations ADAM,DESCENT): 20 are the steps that the authors' constants give Adam for GPT-2,
and 7 are the most that the rule of experiments/solver allows descent, a third. The row states what each side ran.
--evaluations own lets each side stop by itself.

`moments` has no evaluations: a pass of the model for each block against one pass for all (moments_onepass.py).
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from moments_onepass import a_pass_each, counted, d_ff_of, in_one_pass, operations_of_sums
from shapes import SHAPES, cases_of, contexts_of, model_of
from timing import CLOCKS, Bench, Way, machine_of
from torch.nn.functional import log_softmax
from tqdm import tqdm

from editkit.data.cases import Case
from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods.memit import MemitSettings
from editkit.methods.r_rome import RRomeSettings
from editkit.methods.rome import rome, rome_each
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.prelude import prepare
from editkit.methods.shared.spread import compute_z, lookups_of
from editkit.metrics.scoring import score_probes
from editkit.models.load import DTYPES, LanguageModel
from editkit.models.precision import wide
from editkit.models.tokens import encode_with_targets, spaced
from editkit.settings import MomentSettings, TraceSettings
from editkit.settings.methods import ADAMS, SOLVERS
from editkit.tracing import trace

NO_MOMENTS = MomentSettings(enabled=False)
CONSTANTS: dict[str, Any] = {"steps": 20, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0}  # the authors' for GPT-2
STEPS = CONSTANTS | {"stop_loss": -1.0}  # all of them are taken: the loss never falls under the stop
EVALUATIONS = "20,7"
ROWS = ("one_edit", "many_edits", "memit", "evaluation", "trace", "moments")
MOMENTS_BYTES = 8e9  # that the sums of one run of `moments` may take; larger models have fewer of their blocks summed


def evaluated_as_the_reference(lm: LanguageModel, case: Case) -> list[float]:
    """A record in one batch of rows that are not shared, with logits of every token."""
    asked = [(p.prompt, target) for p in case.probes for target in (p.target_new, p.target_true) if target]
    scored = encode_with_targets(lm, [prompt for prompt, _ in asked], [spaced(target) for _, target in asked])
    row, at, token = scored.pick()
    with torch.inference_mode():
        logits = lm.model(**scored.rows.inputs(), use_cache=False).logits[row, at].float()
        log_p = log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
    return (torch.zeros(len(asked)).index_add(0, row.cpu(), -log_p.cpu()) / torch.bincount(row.cpu())).tolist()


class Rows:
    """What is compared, on one model."""

    def __init__(self, lm: LanguageModel, layer: int, options: argparse.Namespace) -> None:
        self.lm, self.layer, self.options = lm, layer, options
        self.cases = cases_of(max(2 * options.edits, options.records))
        self.facts = [case.fact for case in self.cases]
        self.contexts, self.few = contexts_of(lm, [4] * 10 + [9] * 10), contexts_of(lm, [10] * 5)
        self.given: dict[str, Any] = {"moments": NO_MOMENTS, "contexts": self.contexts, "progress": False}

    def settings(self, kind: Callable[..., Any], **more: Any) -> tuple[Any, Any]:
        """Of full depth with Adam, and of the fast side."""
        counts = None if self.options.evaluations == "own" else _counts(self.options.evaluations)
        ends = {} if counts is None else {"steps": counts[0], "stop_loss": -1.0}  # the loss never falls under that
        adam = kind(**CONSTANTS | ends, **more, solver="adam")
        fast = adam
        solver = self.options.solver or kind(**more).resolved(self.lm.name, self.lm.layers).solver
        if solver == "descent":  # at a stop of 0, which is what it aims at, it does not stop either
            ends = {} if counts is None else {"steps": counts[1], "stop_loss": 0.0}
            left = {key: value for key, value in CONSTANTS.items() if key not in ADAMS}
            fast = kind(**left | ends, **more, solver=solver)
        return replace(adam, engine="full"), fast

    def sizes(self) -> dict[str, Any]:
        """What the times depend on."""
        rows = [rows_of(self.lm, fact, "subject_last", self.contexts) for fact in self.facts[: self.options.edits]]
        return {
            "parameters": sum(p.numel() for p in self.lm.model.parameters()),
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "blocks": self.lm.layers,
            "layer": self.layer,
            "rows": len(self.contexts) + 1,
            "tokens_a_row": statistics.mean(len(offsets) for each in rows for offsets in each.scored.rows.offsets),
            "columns_replayed": statistics.mean(each.columns for each in rows),
        }

    def one_edit(self) -> tuple[str, Way, Way]:
        full, fast = self.settings(RRomeSettings, layer=self.layer)
        first = self.facts[0]
        return (
            "one ROME edit",
            Way(lambda: rome(self.lm, first, full, **self.given)),
            Way(lambda: rome(self.lm, first, fast, **self.given)),
        )

    def many_edits(self) -> tuple[str, Way, Way]:
        full, fast = self.settings(RRomeSettings, layer=self.layer)
        few, many = self.facts[: self.options.sample], self.facts[: self.options.edits]
        return (
            f"{len(many)} ROME edits, each",
            Way(lambda: rome_each(self.lm, few, full, **self.given), len(few)),
            Way(lambda: rome_each(self.lm, many, fast, **self.given), len(many)),
        )

    def memit(self) -> tuple[str, Way, Way]:
        full, fast = self.settings(MemitSettings, layers=[self.layer])
        few, many = self.facts[: self.options.sample], self.facts[: 2 * self.options.edits]

        def values(settings: MemitSettings, some: Sequence[Fact]) -> Way:
            site, target = self.lm.architecture.down(self.layer), self.lm.architecture.target_site(self.layer)
            given = prepare(self.lm, some, settings, seed=0, moments=NO_MOMENTS, contexts=self.few, progress=False)

            def compute() -> None:
                lookups = lookups_of(self.lm, given, [site], target)
                compute_z(self.lm, given, [site], target, lookups, progress=False)
                lookups.keys(self.layer)

            return Way(compute, len(some))

        return f"{len(many)} MEMIT keys and values, each", values(full, few), values(fast, many)

    def evaluation(self) -> tuple[str, Way, Way]:
        few, many = self.cases[:5], self.cases[: self.options.records]
        return (
            f"{len(many)} records, each",
            Way(lambda: [evaluated_as_the_reference(self.lm, case) for case in few], len(few)),
            Way(lambda: [score_probes(self.lm, case.probes) for case in many], len(many)),
        )

    def trace(self) -> tuple[str, Way, Way]:
        how = TraceSettings(kinds=("state",))
        full = replace(how, engine="full")
        first = self.facts[0]
        return (
            "a trace of one prompt",
            Way(lambda: trace(self.lm, first, full, progress=False)),
            Way(lambda: trace(self.lm, first, how, progress=False)),
        )

    def moments(self) -> tuple[str, Way, Way]:
        settings = MomentSettings(tokens=self.options.keys)
        modules = [self.lm.architecture.down(layer) for layer in self._summed()]
        return (
            f"{len(modules)} second moments",
            Way(lambda: a_pass_each(self.lm, modules, settings)),
            Way(lambda: in_one_pass(self.lm, modules, settings)),
        )

    def _summed(self) -> range:
        """All blocks, or as many, evenly spread, as memory takes sums of."""
        fitting = max(1, int(MOMENTS_BYTES // (8 * d_ff_of(self.lm) ** 2)))
        step = -(-self.lm.layers // fitting)
        return range(step - 1, self.lm.layers, step)

    def measured(self, name: str, bench: Bench) -> dict[str, Any]:
        """The row `name`."""
        title, full, fast = getattr(self, name)()
        row: dict[str, Any] = {"what": title} | bench.compare(full, fast)
        if name == "moments":  # the sums are in float64, which has another rate; both sides multiply by torch
            layers, settings = self._summed(), MomentSettings(tokens=self.options.keys)
            rate = bench.matrix_rate(torch.float64)
            row["ratio_counted"] = counted(self.lm, layers, settings.block, bench.rate / rate)
            row["share_of_counted"] = row["ratio"] / row["ratio_counted"]
            sums = operations_of_sums(self.lm, layers) * self.options.keys
            for cost in (row["full"], row["fast"]):
                cost["share_of_floor"] = ((cost["flop"] - sums) / bench.rate + sums / rate) / cost["seconds"]
            row["share_of_floor"] = row["fast"]["share_of_floor"]
        return row


def _counts(text: str) -> tuple[int, int]:
    """ADAM,DESCENT."""
    adam, descent = map(int, text.split(","))
    if min(adam, descent) < 1:
        raise ValueError(text)
    return adam, descent


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SHAPES, "atlas"]
    parser.add_argument("--shapes", default="gpt2-small", help=f"one or more of {', '.join(names)}")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--solver", choices=SOLVERS, help="of the fast side; default: the method's own")
    parser.add_argument("--evaluations", default=EVALUATIONS, help=f"ADAM,DESCENT or own; default: {EVALUATIONS}")
    parser.add_argument("--edits", type=int, default=50, help="in many_edits; memit takes twice as many")
    parser.add_argument("--records", type=int, default=50, help="evaluated")
    parser.add_argument("--keys", type=int, default=2560, help="of each second moment")
    parser.add_argument("--sample", type=int, default=2, help="facts that stand for many at full depth")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layer", type=int, default=None, help="block that is edited; default: by shape")
    parser.add_argument("--tokenizer", default=None, help="a folder with a tokenizer; default: the atlas model's")
    parser.add_argument("--threads", type=int, default=None, help="of torch; default: all cores")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: with one thread, on busy cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after each row")
    options = parser.parse_args()
    for name, known in (("rows", ROWS), ("shapes", names)):
        asked = getattr(options, name).split(",")
        if unknown := sorted(set(asked) - set(known)):
            parser.error(f"--{name} takes {', '.join(known)}; found {', '.join(unknown)}")
        setattr(options, name, asked)
    if options.evaluations != "own":
        try:
            _counts(options.evaluations)
        except ValueError:
            parser.error(f"--evaluations takes two numbers, as in {EVALUATIONS}, or own; found {options.evaluations}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here; use cpu or auto")
    if min(options.edits, options.records, options.keys, options.sample, options.repeats) < 1:
        parser.error("--edits, --records, --keys, --sample and --repeats take 1 or more")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    bench = Bench(options.device, wide(dtype) if options.device == "cpu" else dtype, options.repeats, options.clock)
    found: dict[str, Any] = {
        "ratios": {},
        "machine": machine_of(bench, options.clock),
        "settings": vars(options) | {"json": None, "constants": CONSTANTS},
        "shapes": {},
    }
    _line("machine", found["machine"])
    for shape in options.shapes:
        lm, proposed = model_of(shape, options.device, options.dtype, tokenizer=options.tokenizer)
        rows = Rows(lm, lm.check_layer(proposed if options.layer is None else options.layer), options)
        own: dict[str, Any] = {"ratios": dict.fromkeys(ROWS), "sizes": rows.sizes(), "rows": {}}
        found["shapes"][shape] = own
        _line(shape, own["sizes"])
        print(HEADER)
        for name in tqdm(options.rows, desc=shape, leave=False, disable=None):
            try:
                row = rows.measured(name, bench)
            except torch.OutOfMemoryError as error:
                own["rows"][name] = {"failed": str(error)}
                tqdm.write(f"{name}: out of memory")
                continue
            own["rows"][name], own["ratios"][name] = row, row["ratio"]
            found["ratios"] = found["shapes"][options.shapes[0]]["ratios"]
            tqdm.write(_row(row))
            if options.json:
                write_text(options.json, json.dumps(found, indent=2) + "\n")
        del lm, rows


HEADER = (
    f"\n{'':32}{'full s':>9}{'fast s':>9}{'ratio':>7}{'counted':>8}{'share':>7}{'floor':>7}"
    f"{'evals':>10}{'an eval':>8}{'MiB':>7}{'full MiB':>9}"
)


def _row(row: dict[str, Any]) -> str:
    full, fast = row["full"], row["fast"]
    evals = "-" if fast["evaluations"] is None else f"{full['evaluations']:.3g}/{fast['evaluations']:.3g}"
    alike = f"{row['ratio_an_evaluation']:.2f}" if "ratio_an_evaluation" in row else "-"
    peaks = ["-" if each["peak_mib"] is None else f"{each['peak_mib']:.0f}" for each in (fast, full)]
    return (
        f"{row['what']:32}{full['seconds']:9.3f}{fast['seconds']:9.3f}{row['ratio']:7.2f}{row['ratio_counted']:8.2f}"
        f"{row['share_of_counted']:7.2f}{row['share_of_floor']:7.2f}{evals:>10}{alike:>8}{peaks[0]:>7}{peaks[1]:>9}"
    )


def _line(title: str, said: dict[str, Any]) -> None:
    values = ((k.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else v) for k, v in said.items())
    print(f"{title:12}" + ", ".join(f"{key} {value}" for key, value in values), flush=True)


if __name__ == "__main__":
    main()
