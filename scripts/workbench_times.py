"""How long a page of the workbench waits: from a request on its socket to the answer. Median of some repeats.

    python scripts/workbench_times.py --json experiments/workbench/times.json
    python scripts/workbench_times.py --shapes gpt2-small --budget 60

The atlas model, and the same model in GPT-2-small's shape (widened.py), since a model that knows no facts is not
audited.

    answer   what the model says of a fact: next tokens, twelve tokens of text, both answers
    picture  from the request for a trace, with 10 samples of noise, to its first map (MLP)
    trace    to all three maps
    edit     r_rome, computed and its side effects predicted; second moments and contexts are there
    slider   another strength: the prompts of the edit asked before and after
    say      24 tokens of free text, without the edits and with them
    audit    every fact of the atlas with the edits in force

The first of each is not among the repeats, but named (`first`): it collects second moments, draws contexts, or asks
the unedited model. A README.md beside the JSON gets the table between its marks.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import uvicorn
from machine import commit, processor
from marked import between, table
from shapes import model_of
from tqdm import tqdm
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from editkit.files import write_text
from editkit.models.load import LanguageModel
from editkit.workbench.__main__ import _listen
from editkit.workbench.bench import Bench
from editkit.workbench.guard import Guard
from editkit.workbench.server import application

FACT = {"prompt": "The Eiffel Tower is located in the city of", "subject": "The Eiffel Tower"}
ROWS = ("answer", "picture", "trace", "edit", "slider", "say", "audit")
FACT |= {"new": "Rome", "true": "Paris"}


class Page:
    """What a page does with its socket, and when it hears what."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number, self.refused = socket, 0, False

    def ask(self, name: str, **fields: Any) -> tuple[float, float]:
        """Seconds to the first map of a trace (or the end), and to the end. An error that is said is an end too."""
        self.number += 1
        began, first = time.perf_counter(), 0.0
        self.socket.send(json.dumps({"id": self.number, "do": name, **fields}))
        while True:
            said = json.loads(self.socket.recv())
            now = time.perf_counter() - began
            if said.get("id") != self.number:
                continue
            if said["kind"] == "part" and "trace" in said["value"] and not first:
                first = now
            if said["kind"] in ("done", "error"):
                self.refused = said["kind"] == "error"
                return first or now, now


@dataclass(frozen=True)
class Limits:
    """How often each request is repeated; a row ends early when its repeats have taken `budget` seconds."""

    repeats: int
    audits: int
    budget: float


def measure(page: Page, layer: int, limits: Limits, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Put into `found` the seconds of each request: the first, and the median and all of the repeats. `keep` is called
    after each row."""
    edit = {"method": "r_rome", "settings": {"layer": layer}, **FACT}

    def time_of(name: str, ask: Callable[[int], tuple[float, float]], most: int = limits.repeats) -> None:
        first = ask(0)
        times, began = list[tuple[float, float]](), time.perf_counter()
        for i in tqdm(range(0 if page.refused else most), desc=name, leave=False, delay=1):
            times.append(ask(1 + i))
            if time.perf_counter() - began > limits.budget:
                break
        for which, of in (("picture", 0), ("trace", 1)) if name == "trace" else ((name, 1),):
            own = sorted(each[of] for each in times)
            row = {"n": len(own), "median": statistics.median(own) if own else None, "runs": own}
            found[which] = {"first": first[of], **row}
            median = "–" if row["median"] is None else f"{row['median']:.2f} s"
            print(f"{which:<9}{median:>10}   n {row['n']:<3} first {first[of]:.2f} s", flush=True)
        keep()

    time_of("answer", lambda i: page.ask("ask", **FACT))
    time_of("trace", lambda i: page.ask("where", seed=i, **FACT))
    time_of("edit", lambda i: page.ask("compute", seed=0, **edit))
    page.ask("apply")
    time_of("slider", lambda i: page.ask("strength", number=0, value=0.5 + 0.05 * i))
    time_of("say", lambda i: page.ask("say", prompt=FACT["prompt"], tokens=24))
    time_of("audit", lambda i: page.ask("audit"), limits.audits)


def served(lm: LanguageModel, layer: int, limits: Limits, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Serve the model to a page of this process, and measure."""
    ready, listening = threading.Event(), _listen("127.0.0.1", 0)
    with tempfile.TemporaryDirectory() as folder:
        app = application(Bench(lm, Path(folder)), Guard(), ready.set)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="websockets-sansio"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        ready.wait()
        origin = Origin(f"http://127.0.0.1:{listening.getsockname()[1]}")
        with connect(f"ws{origin[4:]}/socket", origin=origin, max_size=None, ping_timeout=None) as socket:
            page = Page(socket)
            page.ask("hello")
            measure(page, layer, limits, found, keep)
        server.should_exit = True
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="atlas,atlas-in-gpt2-small", help="names of shapes.py")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--audits", type=int, default=10, help="repeats of the audit, which takes longest")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which a row's repeats end early")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_average = Path("/proc/loadavg")
    about = {
        "command": " ".join(["python", "scripts/workbench_times.py", *sys.argv[1:]]),
        "commit": commit(),
        "cpu": processor(),
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "load_before": load_average.read_text(encoding="ascii").split()[0] if load_average.exists() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    path: Path | None = options.json
    times = json.loads(path.read_text(encoding="utf-8"))["models"] if path is not None and path.exists() else {}
    for name in options.shapes.split(","):
        lm, layer = model_of(name, options.device)
        times[name] = {"about": about, "seconds": {}}

        def keep() -> None:
            if path is not None:
                write_text(path, json.dumps({"models": times}, indent=2) + "\n")

        print(name, flush=True)
        limits = Limits(options.repeats, options.audits, options.budget)
        served(lm, layer, limits, times[name]["seconds"], keep)
    if path is not None and (readme := path.with_name("README.md")).exists():
        between(readme, "times", lines_of(times))


def lines_of(times: dict[str, Any]) -> list[str]:
    """A table of what each request takes: the median, n in brackets, and the first."""
    head = ["", *(f"{name}, median s" + part for name in times for part in (" (n)", "; the first"))]
    rows = []
    for what in ROWS:
        cells = []
        for model in times.values():
            row = model["seconds"].get(what, {"first": float("nan"), "median": None})
            cells += ["–" if row["median"] is None else f"{row['median']:.2f} ({row['n']})", f"{row['first']:.2f}"]
        rows.append([what, *cells])
    return table(head, rows)


if __name__ == "__main__":
    main()
