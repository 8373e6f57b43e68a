"""A package of a stranger's, with a method, a model family, a data format and a metric of its own, beside our wheel.

    python scripts/outside.py                 # two minutes; a line for each thing that is shown
    python scripts/outside.py --keep FOLDER   # the package, the model and the sweep stay there

The wheel of this checkout is built and installed into a clean environment. `python -m editkit.new` writes the four
parts, which are put together into one package and installed beside it. Then, from another folder:

    editkit -m task=benchmark model=… data=quiz data.path=… method=rome,nudge

where the model is of the package's family, with the bundled model's weights, so that there are facts to edit. At last
three faults are planted, one after the other, and the package's tests, which are editkit.testing, must name each.
"""

import argparse
import json
import shutil
import tempfile
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from clean import Failed, build, environment, run
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from editkit import LanguageModel, load
from editkit.files import write_text

PARTS = {"method": "nudge", "family": "gpt_bigcode", "data": "quiz", "metric": "margin"}
LARGEST = 40e6  # bytes of the wheel
LAYER = 4  # of the bundled model, where its facts are

METHOD, FAMILY = (f"editkit_{PARTS[kind]}.py" for kind in ("method", "family"))
FAULTS = (  # what is wrong, file, line, the line in its place, the check that must name it
    (
        "the method writes to the model",
        METHOD,
        "    # 2) The gradient",
        "    weight.data[0, 0] += 1\n    # 2) The gradient",
        "untouched",
    ),
    (
        "the method draws without its seed",
        METHOD,
        "    how = provenance(",
        "    change = change + 1e-4 * torch.randn_like(change)\n    how = provenance(",
        "seeded",
    ),
    ("the family names the up-projection", FAMILY, ".mlp.c_proj", ".mlp.c_fc", "named"),
)


def joined(folders: list[Path], into: Path) -> Path:
    """One package of several: their modules, tests and examples, and one pyproject.toml with all entry points."""
    points, modules = [], []
    for folder in folders:
        about = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
        modules += about["tool"]["setuptools"]["py-modules"]
        for group, entries in about["project"]["entry-points"].items():
            points += [f'[project.entry-points."{group}"]', *(f'{name} = "{to}"' for name, to in entries.items()), ""]
        for path in (*folder.glob("*.py"), *folder.glob("*.json"), *folder.glob("tests/*.py")):
            write_text(into / path.relative_to(folder), path.read_text(encoding="utf-8"))
    head = (folders[0] / "pyproject.toml").read_text(encoding="utf-8").partition("[project]\n")[0]
    project = ["[project]", 'name = "editkit-outside"', 'version = "0.1.0"', 'dependencies = ["editkit"]', ""]
    tools = ["[tool.setuptools]", f"py-modules = {json.dumps(modules)}"]
    write_text(into / "pyproject.toml", head + "\n".join([*project, *points, *tools]) + "\n")
    return into


def as_bigcode(lm: LanguageModel) -> GPTBigCodeForCausalLM:
    """A GPT-2 with its weights as a GPT-BigCode (StarCoder) of as many heads for keys as for queries."""
    config = lm.model.config
    kept = ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function")
    names = (*kept, "layer_norm_epsilon", "bos_token_id", "eos_token_id")
    model = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(multi_query=False, **{name: getattr(config, name) for name in names})
    )
    weights = {}
    for name, weight in lm.model.state_dict().items():
        if name.endswith(".weight") and name.split(".")[-2].startswith("c_"):  # Conv1D to Linear
            weight = weight.T
        if ".c_attn." in name:  # rows by query, key, value and then head; there by head first
            weight = weight.unflatten(0, (3, config.n_head, -1)).transpose(0, 1).flatten(0, 2)
        weights[name] = weight.contiguous()
    model.load_state_dict(weights)
    return model.eval()


class Shown:
    """Prints a line for each thing that is shown, and counts those that are not."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, holds: Callable[[], str]) -> None:
        try:
            said = holds()
        except (AssertionError, Failed) as error:
            self.failed += 1
            print(f"FAILED  {what}: {error}", flush=True)
        else:
            print(f"ok      {what}: {said}", flush=True)


def show(home: Path) -> int:
    """Do all of it in an empty folder; how many of the checks failed."""
    shown = Shown()
    # 1) The wheel, the package, and the environment that has both.
    wheel = build(home / "wheel")
    shown("the wheel is small", lambda: _small(wheel))
    python = environment(home / "first", wheel)
    for kind, name in PARTS.items():
        run([python, "-m", "editkit.new", kind, name, "--into", home / kind], home)
    package = joined([home / kind for kind in PARTS], home / "package")
    python = environment(home / "environment", wheel, package)
    editkit = python.parent / "editkit"
    shown("editkit is the wheel's", lambda: _where(python, home))
    shown("its own tests, editkit.testing among them, pass", lambda: _tests(python, package))

    # 2) A model of its family that knows facts.
    lm = load("atlas", device="cpu")
    model = as_bigcode(lm)
    model.save_pretrained(home / "model")
    lm.tokenizer.save_pretrained(home / "model")
    shown("a model of its family knows what the bundled one knows", lambda: _apart(model, lm))

    # 3) The command line.
    asked = ["task=benchmark", f"model={home / 'model'}", "data=quiz", f"data.path={package / 'example.json'}"]
    asked += [f"method.layer={LAYER}", "moments.tokens=20000", "task.measure.fluency=0"]
    sweep = home / "sweep"
    shown(
        "editkit -m method=rome,nudge",
        lambda: run([editkit, "-m", "method=rome,nudge", *asked, f"hydra.sweep.dir={sweep}"], home).splitlines()[-1],
    )
    shown("its table has both methods and the metric", lambda: _table(sweep))
    shown("its page shows them", lambda: _page(sweep / "report.html"))
    shown("a near miss is named", lambda: _near(editkit, asked, home))

    # 4) Faults.
    for number, (what, file, line, instead, check) in enumerate(FAULTS):
        shown(f"{what}; found by '{check}'", partial(_fault, home, wheel, number, file, line, instead, check))
    return shown.failed


def _small(wheel: Path) -> str:
    size = wheel.stat().st_size
    assert size < LARGEST, f"{wheel.name} has {size:,} bytes"
    return f"{wheel.name}, {size / 1e6:.1f} MB"


def _where(python: Path, home: Path) -> str:
    found = run([python, "-c", "import editkit; print(editkit.__file__)"], home).strip()
    assert found.startswith(str(home)), found
    return "…" + found.removeprefix(str(home))


def _tests(python: Path, package: Path) -> str:
    return run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], package).splitlines()[-1]


def _apart(model: GPTBigCodeForCausalLM, lm: LanguageModel) -> str:
    ids = lm.tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        apart = (model(input_ids=ids).logits - lm.model(input_ids=ids).logits).abs().max().item()
    assert apart < 1e-4, f"logits are {apart:.1e} apart"
    return f"logits are {apart:.1e} apart"


def _table(sweep: Path) -> str:
    table: Any = pandas.read_csv(sweep / "table.csv")
    columns = ["method.name", "counterfact.ES_after", "margin.ahead_before", "margin.ahead_after"]
    assert list(table["method.name"]) == ["rome", "nudge"] and table["reversal_exact"].all()
    assert (table["margin.ahead_after"] > table["margin.ahead_before"]).all(), table[columns].to_string()
    rows = (
        ", ".join(f"{name} {value}" for name, value in row.items()) for _, row in table[columns].round(3).iterrows()
    )
    return "; ".join(rows)


def _page(path: Path) -> str:
    page = path.read_text(encoding="utf-8")
    for text in ("<bdi>rome<", "<bdi>nudge<", ">Margin: the new answer against the old one<", ">ahead<"):
        assert text in page, f"{text!r} is not on {path}"
    return f"{len(page) / 1e3:.0f} kB"


def _near(editkit: Path, asked: list[str], home: Path) -> str:
    try:
        run([editkit, "method=nugde", *asked], home)
    except Failed as error:
        said = str(error).strip().splitlines()[-1]
        assert "did you mean 'nudge'?" in said, said
        return said
    raise AssertionError("method=nugde ran")


def _fault(home: Path, wheel: Path, number: int, file: str, line: str, instead: str, check: str) -> str:
    faulty = home / f"fault{number}"
    shutil.copytree(home / "package", faulty, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    text = (faulty / file).read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{file} does not hold {line!r} once"
    write_text(faulty / file, text.replace(line, instead))
    python = environment(home / f"environment{number}", wheel, faulty)
    try:
        _tests(python, faulty)
    except Failed as error:
        named = [row.strip() for row in str(error).splitlines() if f": {check}: " in row]
        assert named, f"no finding of '{check}' in\n{error}"
        return named[0].removeprefix("E").strip()
    raise AssertionError("the tests pass")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder that stays; default: a temporary one")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        return show(options.keep.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return show(Path(folder).resolve())


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
