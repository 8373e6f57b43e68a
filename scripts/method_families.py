"""Every method on a tiny random model of every family: a table of what works and what is refused.

    python scripts/method_families.py

A cell is ok when, for one fact (two for methods that take many): computing the edit leaves every bit of the model as
it was, applying it raises the probability of each target_new, all logits of another prompt stay finite, and after it
every bit is back. It shows by how much the mean log p(target_new) rose, which is not asked of an edit that states the
fact in front of the prompt: random weights cannot read. Families with a norm behind the MLP get one block, the others
two. "-": refused, with the reason below the table.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.files import write_text
from editkit.methods import Method, get_method, names
from editkit.models.installed import installed_on
from editkit.models.load import LanguageModel
from editkit.models.snapshot import digests, tensors_of
from editkit.models.tokens import tokenise
from editkit.settings import ContextSettings, MomentSettings
from editkit.testing.of_method import FACTS, log_p
from editkit.testing.tiny import SITES, tiny_lm

# Random weights know nothing and have small values: little decay, and more weight on the new keys than on old ones.
SETTINGS: dict[str, Any] = {
    "steps": 20,
    "lr": 0.3,
    "weight_decay": 1e-3,
    "clamp": 4.0,
    "stop_loss": 0.0,
    "mom2_update_weight": 1.0,
    "fraction": 0.75,
    "l2": 0.1,
    "contexts": ContextSettings(lengths=(5,), counts=(2,)),
}
FITTED: dict[str, dict[str, Any]] = {  # where a weight is trained, not a value
    "ft": {"lr": 5e-3},
    "ft_l": {"lr": 5e-3, "epsilon": 0.05},
    "lora": {"lr": 0.02},
    "ft_bf": {"lr": 5e-3, "end_of_text": False},
    "crispedit": {"lr": 0.02, "end_of_text": False, "tokens": 256},
    "ultraedit": {"lr": 0.02, "warm_up": 256},
    "stableedit": {"lr": 0.02, "warm_up": 256},
    "anyedit": {"window": 2},  # a value for two tokens of the target
}
ALONE = ("kn",)  # one fact: units of random weights tell all facts, and a second one would rewrite those of the first
UNTRAINED_LR = 0.05  # of the untrained hypernetwork, with which MEND is a step of SGD


def fitted(method: Method, name: str, several: bool) -> Any:
    """The method's settings with those of SETTINGS that it has."""
    values = {k: v for k, v in SETTINGS.items() if k in method.settings.__dataclass_fields__}
    if "layers" in method.settings.__dataclass_fields__:
        values["layers"] = [0, 1] if several and name != "emmet" else [1]
    elif "layer" in method.settings.__dataclass_fields__:
        values["layer"] = 1
    return method.settings(**values | FITTED.get(name, {}))


def facts_for(method: Method, name: str) -> list[Fact]:
    """One fact, or two for a method that takes many at once."""
    return list(FACTS if "layers" in method.settings.__dataclass_fields__ and name not in ALONE else FACTS[:1])


def check(lm: LanguageModel, name: str, folder: Path) -> dict[str, Any]:
    """One cell: {"rise": …} with "failures", or {"refused": reason}."""
    method = get_method(name)
    if name == "mend":
        mend: Any = importlib.import_module("editkit.methods.mend")
        path = mend.Mend.for_model(lm, [1], rank=2, lr=UNTRAINED_LR).save(folder / "mend.safetensors")
        FITTED["mend"] = {"hypernetwork": str(path)}
    facts = facts_for(method, name)
    settings = fitted(method, name, several=lm.architecture.mlp_norm is None)
    before, state = log_p(lm, facts), digests(tensors_of(lm.model))
    failures = []
    try:
        edit = method(lm, facts, settings, moments=MomentSettings(tokens=2048), progress=False)
    except EditkitError as error:
        return {"refused": str(error)}
    if digests(tensors_of(lm.model)) != state:
        failures.append("computing the edit changed the model")
    with edit.applied(lm):
        after = log_p(lm, facts)
        with torch.no_grad():
            logits = lm.model(**tokenise(lm, ["The old bridge of stone"]).inputs(), use_cache=False).logits
    if not (after > before).all() and not any(each.moves_tokens for each in edit.installed):
        failures.append(f"log p fell: {before.tolist()} -> {after.tolist()}")
    if not logits.isfinite().all():
        failures.append("logits are not finite")
    if digests(tensors_of(lm.model)) != state or installed_on(lm.model):
        failures.append("not every bit is back")
    return {"rise": (after - before).mean().item(), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of editkit/testing/tiny.py; default: all")
    parser.add_argument("--methods", nargs="+", choices=names(), default=names(), help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if unknown := [name for name in options.families if name not in SITES]:
        parser.error(f"unknown family {', '.join(unknown)}: choose from {', '.join(SITES)}")

    began = time.time()
    torch.set_num_threads(1)  # for tiny models threads wait for each other more than they work
    warnings.simplefilter("ignore")  # a tiny model has few keys and large updates
    width = max(map(len, options.methods)) + 1
    print(f"{'family':12}" + "".join(f"{name:>{width}}" for name in options.methods), flush=True)
    found: dict[str, dict[str, Any]] = {}
    for family in options.families or SITES:
        try:
            lm = tiny_lm(family)
            with tempfile.TemporaryDirectory() as folder:
                found[family] = {name: check(lm, name, Path(folder)) for name in options.methods}
        except EditkitError as error:  # the whole family
            found[family] = {name: {"refused": str(error)} for name in options.methods}
        cells = [
            "-" if "refused" in c else f"{c['rise']:+.2f}" + "!" * bool(c["failures"]) for c in found[family].values()
        ]
        print(f"{family:12}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
    every = [(family, name, cell) for family, row in found.items() for name, cell in row.items()]
    failed = [(family, name, why) for family, name, cell in every for why in cell.get("failures", ())]
    refused = {(family, name): cell["refused"] for family, name, cell in every if "refused" in cell}
    print(
        f"\n{len(every)} cells: {len(every) - len(refused)} edited, {len(refused)} refused, {len(failed)} failed; "
        f"{time.time() - began:.0f} s"
    )
    for reason in dict.fromkeys(refused.values()):
        where = [f"{family} × {name}" for (family, name), why in refused.items() if why == reason]
        print(f"  refused ({', '.join(where)}): {reason}")
    for family, name, why in failed:
        print(f"  FAILED {family} × {name}: {why}")
    if options.json:
        versions = {"torch": torch.__version__, "transformers": importlib.import_module("transformers").__version__}
        write_text(options.json, json.dumps({"versions": versions, "cells": found}, indent=2) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
