"""A rehearsal on random weights of a real model's shape: one ROME edit, one MEMIT of ten facts, each restored.

    python scripts/rehearse.py --shape gpt2-xl
    python scripts/rehearse.py --shape llama-3-8b --dtype bfloat16 --json FILE      # 16 GB of weights, no download

It shows, before a model is downloaded, that this machine can edit it, and beside what was measured the plan that
`python -m editkit.run plan=true` counts. The constants are those published for the model; random weights know no fact,
so a value takes all of its steps, as it would in the plan. C is collected for real, of few keys (--keys) and a larger
ridge, one block at a time: the solves are those of the real size.
With --steps a rehearsal is shorter, and takes the same memory.

Memory is that of this process without mapped files (RssAnon), or the allocator's on CUDA; "weights" are made before the
first figure is taken, and are in all of them. The digests of all weights before and after everything are compared.
"""

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from machine import commit, processor
from shapes import SHAPES, cases_of, model_of

from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods import get_method
from editkit.metrics.scoring import score_targets
from editkit.models.load import DTYPES, LanguageModel
from editkit.models.memory import own_bytes
from editkit.models.snapshot import Snapshot
from editkit.models.tokens import spaced
from editkit.moments import second_moments
from editkit.plan import Plan, planned
from editkit.plan.sizes import readable
from editkit.plan.step import Step, together
from editkit.plan.work import Counter
from editkit.settings import MomentSettings

# The models whose published constants are taken.
NAMES = {"gpt-j-6b": "gpt-j-6b", "llama-3-8b": "Llama-3-8B", "qwen2.5-7b": "Qwen2.5-7B"}
EVERY = 0.02  # seconds between two looks at the memory


@dataclass
class Phase:
    """One phase as it was measured: seconds, and the most memory in bytes."""

    name: str
    seconds: float
    peak: int


@dataclass
class Watch:
    """Times phases and looks at the memory meanwhile."""

    device: torch.device
    phases: list[Phase] = field(default_factory=list)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body is one phase."""
        ended = threading.Event()
        most = [own_bytes()]

        def look() -> None:
            while not ended.wait(EVERY):
                most[0] = max(most[0], own_bytes())

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            ended.set()
            thread.join()
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else most[0]
        self.phases.append(Phase(name, seconds, peak))
        print(f"{name:<34}{seconds:>9.1f} s{readable(peak):>12}", flush=True)


class Rehearsal:
    """One model, and what is done to it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.moments = MomentSettings(tokens=max(1, options.keys), ridge=options.ridge, enabled=options.keys > 0)
        self.facts = [case.fact for case in cases_of(options.facts)]
        self.skeleton, _ = model_of(options.shape, "meta", options.dtype)
        self.settings = {name: self._settings(name) for name in ("rome", "memit")}

    def _settings(self, method: str) -> Any:
        shape: str = self.options.shape
        name = NAMES.get(shape, shape)
        found: Any = get_method(method).settings().resolved(name, self.skeleton.layers)
        return found if self.options.steps is None else replace(found, steps=self.options.steps)

    def facts_of(self, method: str) -> list[Fact]:
        return self.facts[:1] if method == "rome" else self.facts

    def plan(self) -> Plan:
        """What it will take, counted before a weight is made."""

        def steps(counter: Counter) -> list[Step]:
            found = [counter.digests()]
            for method, settings in self.settings.items():
                if self.moments.enabled:
                    alone = [counter.moments([layer], self.moments) for layer in settings.blocks]
                    found.append(together(f"{method}: second moments", alone))
                edit = [counter.contexts(settings), *counter.edit(self.facts_of(method), settings, self.moments)]
                found.append(together(method, edit))
            return [*found, counter.digests()]

        return planned(self.skeleton, self.device, steps)

    def run(self, lm: LanguageModel, watch: Watch, cache: Path) -> dict[str, Any]:
        """Both edits, each applied, looked at, restored; what was proved."""
        with watch.phase("digests of all weights"):
            everything = Snapshot.take(lm.model, [], everything=True)
        effects = {}
        for method, settings in self.settings.items():
            given: Any = self.moments
            if self.moments.enabled:
                with watch.phase(f"{method}: second moments"):
                    given = {}
                    for layer in settings.blocks:  # one at a time: the sums of one block are in memory at once
                        given |= second_moments(lm, [layer], self.moments, cache=cache)
            facts = self.facts_of(method)
            with watch.phase(method):
                edit = get_method(method)(lm, facts, settings, moments=given, progress=True)
            effects[method] = self._applied(lm, edit, facts)
        with watch.phase("digests of all weights"):
            reversal = everything.verify().require()
        return {"effects": effects, "reversal": asdict(reversal) | {"exact": reversal.exact}}

    def _applied(self, lm: LanguageModel, edit: Edit, facts: Sequence[Fact]) -> dict[str, Any]:
        before = self._target(lm, facts)
        with edit.applied(lm, check=False, everything=False) as applied:
            after = self._target(lm, facts)
        assert applied.reversal is not None
        print(f"  log p(target_new) a token {before:.2f} → {after:.2f}; restored: {applied.reversal}", flush=True)
        return {"before": before, "after": after, "norm": edit.norm(), "restored": applied.reversal.exact}

    def _target(self, lm: LanguageModel, facts: Sequence[Fact]) -> float:
        scores = score_targets(lm, [f.text for f in facts], [spaced(f.target_new) for f in facts])
        return -sum(score.nll for score in scores) / len(scores)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rehearsal = Rehearsal(options)
    plan = rehearsal.plan()
    print(plan, "\n", sep="\n", flush=True)
    plan.require_fit()
    watch = Watch(rehearsal.device)
    with watch.phase("weights"):
        lm, _ = model_of(options.shape, options.device, options.dtype)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        found = rehearsal.run(lm, watch, Path(scratch))
    peak = max(phase.peak for phase in watch.phases)
    wanted = plan.peak - (plan.process if rehearsal.device.type == "cuda" else 0)
    print(f"peak: {readable(peak)} measured, {readable(wanted)} planned ({wanted / peak - 1:+.0%})")
    print(f"bits: {found['reversal']['tensors']} parameters and buffers are as they were")
    if options.json:
        figures: dict[str, Any] = {"options": vars(options), "commit": commit(), "cpu": processor()}
        figures["threads"] = torch.get_num_threads()
        figures["steps"] = {name: settings.steps for name, settings in rehearsal.settings.items()}
        figures |= {"plan": plan.to_json(), "phases": [asdict(phase) for phase in watch.phases], "peak": peak, **found}
        write_text(Path(options.json), json.dumps(figures, indent=2, default=str) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2-xl")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--facts", type=int, default=10, help="of the MEMIT edit")
    parser.add_argument("--steps", type=int, help="evaluations of a value; default: the published number")
    parser.add_argument("--keys", type=int, default=2048, help="keys of each second moment; 0: the identity for C")
    parser.add_argument("--ridge", type=float, default=1e-2, help="added to C's diagonal, as a fraction of its mean")
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--scratch", help="a folder with room for the second moments; default: the system's")
    parser.add_argument("--json", help="a file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except EditkitError as error:
        raise SystemExit(f"error: {error}") from None
