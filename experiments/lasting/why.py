"""Why do the methods with values break where they do? The same methods on other streams.

    python experiments/lasting/why.py run FOLDER       # goes on where it stopped
    python experiments/lasting/why.py results FOLDER   # why.json, and README.md's table

If it is the number of edits, or the norm that they add, a stream over 100 facts breaks where one over 1,000 does. If it
is the number of different keys that W must hold, it lives longer.

The facts of the atlas share subjects, and facts of one subject have nearly one key. AlphaEdit and MEMIT-Seq hold the
keys of earlier steps where they are, so a later step that must move such a key works against them. One stream has one
fact a subject, each edited once. If that is the reason why they break before MEMIT, they don't on this stream.

If it is the dimension of a key that bounds a stream, it lives longer where keys have more of it: on the bundled model
with 3,072 neurons a block in place of 768 (scripts/widened.py), of which the added ones write nothing before an edit.
Said before it was run: at least twice as long counts as yes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from lasting import DESCENT, ENDS
from marked import between
from marked import table as in_markdown
from transformers import GPT2Config
from widened import widened

import editkit
from editkit.data import load_cases
from editkit.data.cases import Case
from editkit.data.kinds import NEIGHBORHOOD, PARAPHRASE
from editkit.files import write_text
from editkit.runs import names
from editkit.settings import DataSettings

HERE = Path(__file__).parent
METHODS = ("memit", "memit_seq", "alphaedit")
FACTS = (100, 300, 1000)
EDITS = 2000
ONCE = 500  # facts of the stream of subjects
UNTOUCHED = 20  # and those of it that are never edited
STREAMS = {str(facts): [f"data.stream={EDITS}", f"data.limit={facts}"] for facts in FACTS}
STREAMS["subjects"] = ["data=counterfact", f"data.limit={ONCE}"]  # and its file
STREAMS["neurons"] = STREAMS["1000"]  # on another model
NEURONS = 3072  # a block
TITLES = {"subjects": f"{ONCE}, one a subject", "neurons": f"1,000, {NEURONS:,} neurons a block"}
BATCH = 100  # facts a step


def cells(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Method, stream and folder of each cell. MEMIT-Seq is run where it is asked what a memory of keys does."""
    for method in METHODS:
        for stream in STREAMS:
            if method != "memit_seq" or stream == "subjects":
                yield method, stream, folder / f"{method}-{stream}"


def run(folder: Path) -> None:
    """Every cell that has not ended."""
    facts = folder / "subjects.json"
    write_text(facts, json.dumps(one_a_subject(), ensure_ascii=False))
    for method, stream, path in cells(folder):
        keys = [f"method={method}", DESCENT, *STREAMS[stream]]
        keys += [f"data.path={facts}"] if stream == "subjects" else []
        keys += [f"model.name={more_neurons(folder)}"] if stream == "neurons" else []
        run_cell(path, keys)


def run_cell(path: Path, keys: list[str]) -> None:
    """Run a stream with these settings to its end, from where it stopped."""
    if (path / names.RECORD).exists():
        return
    keys = ["task=lifelong", *keys, f"task.step={BATCH}", "task.every=null", "task.at=[100,200,300,400,500,1000]"]
    keys += ["task.keep=1", "task.alarm.every=1", *ENDS, f"hydra.run.dir={path}"]
    resume = ["resume=true"] if (path / names.POINT_LINES).exists() else []
    print(path.name, flush=True)
    if code := subprocess.call([sys.executable, "-m", "editkit.run", *keys, *resume]):
        sys.exit(code)


def one_a_subject() -> list[dict[str, Any]]:
    """The first fact of each subject in the order of the other streams, as CounterFact's records."""
    first: dict[str, Case] = {}
    for case in load_cases(DataSettings(), seed=0, distinct=True).cases:
        first.setdefault(case.fact.subject, case)
    chosen = list(first.values())[: ONCE + UNTOUCHED]
    if len(chosen) < ONCE + UNTOUCHED:
        raise SystemExit(f"The atlas has only {len(chosen)} subjects.")
    return [
        {
            "case_id": number,
            "requested_rewrite": {
                "prompt": case.fact.prompt,
                "subject": case.fact.subject,
                "target_new": {"str": case.fact.target_new},
                "target_true": {"str": case.fact.target_true},
            },
            "paraphrase_prompts": [probe.prompt for probe in case.probes if probe.kind == PARAPHRASE],
            "neighborhood_prompts": [probe.prompt for probe in case.probes if probe.kind == NEIGHBORHOOD],
            "attribute_prompts": [],
            "generation_prompts": [],
        }
        for number, case in enumerate(chosen)
    ]


def more_neurons(folder: Path) -> Path:
    """The bundled model with NEURONS a block and the same answers; its folder's name gives it the same constants."""
    path = folder / "neurons" / "atlas"
    if not (path / "config.json").exists():
        small = editkit.load("atlas", device="cpu")
        sizes: dict[str, Any] = small.model.config.to_dict() | {"n_inner": NEURONS}
        config = GPT2Config(**sizes)
        wide = widened(small, config, "atlas")
        wide.model.save_pretrained(path)
        wide.tokenizer.save_pretrained(path)
    return path


def end_of(path: Path) -> dict[str, Any] | None:
    """Where a cell broke or ended, and what the model was like there; None where it has not ended."""
    if not (path / names.RECORD).exists():
        return None
    record = json.loads((path / names.RECORD).read_text(encoding="utf-8"))
    last, broken = record["series"][-1], record["data"].get("collapse")
    return {
        "broken": broken and broken["edits_kept"],
        "edits": last["edits"],
        "growth": last["alarm"]["growth"],
        "perplexity": last["alarm"]["perplexity"],
        "commit": record["environment"]["commit"],
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    """A row a stream and method."""
    rows = []
    for row in found:
        facts = TITLES.get(row["stream"]) or f"{int(row['stream']):,}"
        rows.append([row["method"], facts, ending(row), f"{row['growth']:.3g}", f"{row['perplexity']:.3g}"])
    return in_markdown(["method", "facts", "broken at", "‖ΔW‖/‖W‖ there", "perplexity ×"], rows)


def ending(row: dict[str, Any]) -> str:
    """When it was broken, in a few words."""
    return f"{row['broken']:,}" if row["broken"] is not None else f"not by {row['edits']:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "results"))
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    if chosen.what == "run":
        run(folder)
        return
    found = [{"method": m, "stream": stream, **end} for m, stream, path in cells(folder) if (end := end_of(path))]
    write_text(HERE / "why.json", json.dumps(found, indent=1) + "\n")
    between(HERE / "README.md", "why", table(found))


if __name__ == "__main__":
    main()
