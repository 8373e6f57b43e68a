"""Second moments by several processes against one, on the atlas model: the results, the times, and one killed.

    python scripts/moments_shards.py                         # about a minute on two idle cores

1. One process and a gloo group of processes of one thread each collect the same, in turns, in a new random order each
   time. Compare seconds within one run only, and on idle cores: the load is printed. Where others use the cores,
   compare processor time: that of one process against that of the process of the group which used most.
2. Another group begins; its last process is killed with SIGKILL. The same number of processes goes on.
"""

import argparse
import multiprocessing
import os
import queue
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from machine import processor

from editkit.errors import EditkitError
from editkit.settings import MomentSettings
from editkit.tensorfiles import read_header

PROCESSES = multiprocessing.get_context("spawn")


def worker(place: dict[str, Any], task: str, options: argparse.Namespace, folder: Path, told: Any) -> None:
    """One process of a group. `task`: time, to collect alone and together in turns; or go on, to collect once."""
    os.environ.update({name: str(value) for name, value in place.items()})
    warnings.simplefilter("ignore")
    import torch

    from editkit.models.load import load
    from editkit.moments import collect, collect_together, second_moments
    from editkit.moments.group import Group

    torch.set_num_threads(1)
    group, lm = Group(), load("atlas", device="cpu")
    layers, settings = range(lm.layers), MomentSettings(tokens=options.tokens)
    if task == "go on":
        collect.SAVE_EVERY, collect.SAVE_SHARE = 0, 0
        try:
            moments = collect_together(lm, layers, settings, group=group, progress=False, cache=folder)
        except EditkitError as error:
            print(f"process {group.rank}: {type(error).__name__}: {error}", flush=True)
            raise SystemExit(1) from None
        told.put((group.rank, [moment.digest for moment in moments.values()]))
        return
    seconds: dict[str, list[float]] = {"alone": [], "together": []}
    used: dict[str, list[float]] = {"alone": [], "together": []}
    result: dict[str, Any] = {}
    order, names = random.Random(0), list(seconds)
    for repeat in range(-1, options.repeats):  # the first warms up
        order.shuffle(names)
        for name in names:
            group.finish(0)
            began, began_used, cache = time.monotonic(), time.process_time(), folder / f"{name}{repeat}"
            if name == "together":
                result[name] = collect_together(lm, layers, settings, group=group, progress=False, cache=cache)
            elif group.rank == 0:
                result[name] = second_moments(lm, layers, settings, progress=False, cache=cache)
            if repeat >= 0:
                seconds[name].append(time.monotonic() - began)
                used[name].append(time.process_time() - began_used)
    found: dict[str, Any] = {"rank": group.rank, "used": used}
    if group.rank == 0:
        one, all_of_them = result["alone"], result["together"]
        matrices = [(one[layer].matrix, all_of_them[layer].matrix) for layer in layers]
        found |= {
            "seconds": seconds,
            "keys": [result[name][0].count for name in ("alone", "together")],
            "difference": max(((a - b).abs().max() / a.abs().max()).item() for a, b in matrices),
            "digests": [moment.digest for moment in all_of_them.values()],
        }
    told.put(found)
    group.finish(0)
    group.leave()


def start(task: str, options: argparse.Namespace, folder: Path) -> tuple[list[Any], Any]:
    """The processes of a group, and the queue that they tell their results in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": options.processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    told = PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=worker, args=(place | {"RANK": rank}, task, options, folder, told))
        for rank in range(options.processes)
    ]
    for process in processes:
        process.start()
    return processes, told


def answer(processes: list[Any], told: Any) -> Any:
    """What one of the processes tells. Ends the program where one has failed."""
    while True:
        try:
            return told.get(timeout=1)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                raise SystemExit("a process failed: see above") from None


def kept(folder: Path) -> dict[int, int]:
    """The keys in the file of each share."""
    from editkit.moments.moment import SHARD_FILE

    headers = [read_header(path, SHARD_FILE) for path in folder.rglob("*.shard")]
    return {header["share"][0]: header["count"] for header in headers}


def load_now() -> str:
    return Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--tokens", type=int, default=20_000, help="keys a layer; default: 20000")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    options = parser.parse_args()
    if options.processes < 2 or min(options.repeats, options.tokens) < 1:
        parser.error("--processes takes 2 or more, --repeats and --tokens 1 or more")
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{processor()}, {os.cpu_count()} cores, load before {load_now()}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 1) the same result, and the time
        processes, told = start("time", options, folder / "time")
        each = sorted((answer(processes, told) for _ in processes), key=lambda told: told["rank"])
        found, used = each[0], [one["used"]["together"] for one in each]
        for process in processes:
            process.join()
        seconds, most = found["seconds"], [max(turn) for turn in zip(*used, strict=True)]
        for name, (one, many) in {
            "wall": (seconds["alone"], seconds["together"]),
            "processor": (found["used"]["alone"], most),
        }.items():
            ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(one, many, strict=True))
            alone, together = statistics.median(one), statistics.median(many)
            print(
                f"{name:10}one process {alone:.2f} s, {options.processes} {together:.2f} s (medians); ratios {ratios}"
            )
        print(f"keys a block: one process {found['keys'][0]:,}, {options.processes} processes {found['keys'][1]:,}")
        print(f"largest relative difference of C over all blocks: {found['difference']:.1e}")
        # 2) one killed, all started again
        processes, _ = start("go on", options, folder / "killed")
        last = options.processes - 1
        while kept(folder / "killed").get(last, 0) == 0 and processes[last].is_alive():
            time.sleep(0.005)
        os.kill(processes[last].pid, signal.SIGKILL)
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        print(f"process {last} killed: exit codes {codes}, keys kept by each {sorted(kept(folder / 'killed').items())}")
        processes, told = start("go on", options, folder / "killed")
        digests = [answer(processes, told)[1] for _ in processes]
        for process in processes:
            process.join()
        same = all(each == found["digests"] for each in digests)
        print(
            f"started again: {'the same bits as' if same else 'OTHER BITS THAN'} {options.processes} undisturbed ones"
        )
        print(f"load after {load_now()}")
    return 0 if same and found["keys"][0] == found["keys"][1] and found["difference"] <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
