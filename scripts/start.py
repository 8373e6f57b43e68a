"""An edit from cold process to last line, and where the time goes.

    python scripts/start.py                              # five runs of edit=gpt2_fact, and five that are watched
    python scripts/start.py --against ../other-checkout  # the two in turn, and their ratio

The total is that of the plain command. The parts are from runs of their own, in which each import of a library and each
call of a function named in PHASES is timed without what is timed inside it; they sum to that run's total. What torch or
transformers imports counts as theirs. Each checkout runs once before anything is counted, so that its files are
compiled and the second moments are in the cache. Compare ratios within one output only, and on idle cores.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Phases by the first part of a module's name: the import of the library, with all that it imports.
LIBRARIES = {
    "hydra": "import hydra and omegaconf",
    "omegaconf": "import hydra and omegaconf",
    "torch": "import torch",
    "transformers": "import transformers",
    "pandas": "import pandas and pyarrow",
    "pyarrow": "import pandas and pyarrow",
}
# Phases by module and function: the calls.
PHASES = {
    "editkit.tasks.edit": {"run": "rest of the run"},
    "editkit.models.load": {"load": "model load"},
    "editkit.methods.shared.contexts": {"context_templates": "contexts"},
    "editkit.moments.cache": {"second_moments": "moments"},
    "editkit.methods.shared.value": {"compute_deltas": "value"},
    "editkit.metrics.measure": {"look": "evaluation"},
    "editkit.metrics.scoring": {"continuation": "evaluation", "top_next": "evaluation"},
    "editkit.runs.record": {"environment": "record and files", "write_record": "record and files"},
    "editkit.runs.tables": {"Tables.write_cases": "record and files"},
    "editkit.edits.edit": {"Edit.save": "record and files"},
    "editkit.report": {"write": "record and files"},
}
OUTSIDE = "configuration, editkit's own imports"
ORDER = ["python", *dict.fromkeys(LIBRARIES.values()), OUTSIDE]
ORDER += ["model load", "contexts", "moments", "value", "evaluation", "record and files", "rest of the run", "exit"]


class Watch(MetaPathFinder):
    """Seconds of each phase, without those of phases inside it. A finder, so that it sees what is imported."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open = [OUTSIDE]
        self.last = time.monotonic()

    def switch(self, phase: str | None) -> None:
        """Begin a phase inside the current one; None: end the current one."""
        now = time.monotonic()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now
        if phase is None:
            self.open.pop()
        else:
            self.open.append(phase)

    def timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(None)

        return call

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        library = LIBRARIES.get(name.partition(".")[0])
        if (library is None and name not in PHASES) or self.open[-1] in LIBRARIES.values():
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec: ModuleSpec | None = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module
        if library is not None:
            loader.exec_module = self.timed(execute, library)
        else:
            loader.exec_module = self.wrapped(execute)
        return spec

    def wrapped(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        """Run a module, then time the calls of its functions; one that this checkout has not is left out."""

        def run(module: ModuleType) -> None:
            execute(module)
            for name, phase in PHASES[module.__name__].items():
                *owner, last = name.split(".")
                place: Any = getattr(module, owner[0], None) if owner else module
                if hasattr(place, last):
                    setattr(place, last, self.timed(getattr(place, last), phase))

        return run


def watched(out: Path, tree: str, arguments: list[str]) -> None:
    """In a process of its own: run the command in `tree` and write the seconds of its phases to `out`."""
    watch = Watch()
    began = time.monotonic()
    sys.path[0] = tree
    sys.meta_path.insert(0, watch)
    sys.argv = ["editkit", *arguments]
    from editkit.run import main as run

    run()
    watch.switch(None)
    out.write_text(json.dumps({"began": began, "ended": time.monotonic(), "phases": watch.seconds}), encoding="utf-8")


def measure(tree: Path, arguments: Sequence[str], *, parts: bool) -> dict[str, float]:
    """One run of the command in the checkout `tree`: its wall and CPU seconds; `parts`: the seconds of its phases."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "phases.json"
        own = [*arguments, f"hydra.run.dir={folder}/run"]
        command = [__file__, "--watched", str(out), str(tree), *own] if parts else ["-m", "editkit.run", *own]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        ended = time.monotonic()
        if done.returncode:
            sys.exit(f"The command failed in {tree}:\n{done.stderr}")
        if parts:
            found = json.loads(out.read_text(encoding="utf-8"))
            return {"python": found["began"] - began, **found["phases"], "exit": ended - found["ended"]}
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"wall": ended - began, "cpu": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime}


def commit(tree: Path) -> str:
    """The short commit of a checkout, marked where files differ from it."""
    git = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "no commit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", help="of the command; default: edit=gpt2_fact")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, measured in turn with this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    arguments = options.arguments or ["edit=gpt2_fact"]
    trees = {"this": Path(__file__).resolve().parents[1]}
    if options.against:
        trees = {"against": options.against.resolve(), **trees}
    if missing := [tree for tree in trees.values() if not (tree / "editkit" / "run.py").is_file()]:
        parser.error(f"'{missing[0]}' is no checkout of editkit")

    # 1) Measure.
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for name in trees:
        measure(trees[name], arguments, parts=False)
    for number in range(options.repeats):
        print(f"\r{number + 1} of {options.repeats}", end="", file=sys.stderr, flush=True)
        for parts in (False, True):
            for name in random.sample(sorted(trees), len(trees)):
                (phases if parts else runs)[name].append(measure(trees[name], arguments, parts=parts))
    print(file=sys.stderr)

    # 2) Medians; a ratio is the median of those within each repeat.
    from machine import processor  # beside this file

    figures: dict[str, Any] = {"command": arguments, "repeats": options.repeats, "processor": processor()}
    figures["cores"], figures["load"] = os.cpu_count(), round(os.getloadavg()[0], 2)
    figures["threads"] = os.environ.get("OMP_NUM_THREADS")
    for name in trees:
        total = {key: round(statistics.median(run[key] for run in runs[name]), 3) for key in ("wall", "cpu")}
        of_phase = {phase: round(statistics.median(run.get(phase, 0.0) for run in phases[name]), 3) for phase in ORDER}
        figures[name] = {"commit": commit(trees[name]), **total, "phases": of_phase, "runs": runs[name]}
    if options.against:
        pairs = list(zip(runs["against"], runs["this"], strict=True))
        ratios = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in ("wall", "cpu")}
        figures["ratios"] = {key: round(value, 3) for key, value in ratios.items()}

    # 3) Show.
    print(f"{' '.join(arguments)}: median of {options.repeats}, in seconds")
    print(f"{'':38}" + "".join(f"{name:>10}" for name in trees))
    print(f"{'commit':38}" + "".join(f"{figures[name]['commit'][:9]:>10}" for name in trees))
    for phase in ORDER:
        print(f"{phase:38}" + "".join(f"{figures[name]['phases'][phase]:10.2f}" for name in trees))
    for key, label in (("wall", "total, not watched"), ("cpu", "processor time, not watched")):
        ratio = f"   {figures['ratios'][key]:.2f} × as fast" if options.against else ""
        print(f"{label:38}" + "".join(f"{figures[name][key]:10.2f}" for name in trees) + ratio)
    print(f"{figures['processor']}, {figures['cores']} cores, load {figures['load']}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        watched(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
