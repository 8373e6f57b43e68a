"""The hook layer on a tiny random model of every family: a table of what works, at four kinds of module.

    python scripts/nethook_families.py                       # needs the checkout, for editkit/testing/tiny.py

For each of block, attention, MLP and down-projection (block 1 of the model):

- cap    what a Trace captures, input and output, is bit for bit what a plain forward hook sees
- edit   an edit of the output changes the logits, and after the trace they are bit for bit what they were
- grad   the largest difference between the captured gradient and autograd's, over the largest gradient

hooks: how many hooks the model has more than before, at the end. "-": the family has no such module.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editkit.files import write_text
from editkit.models.snapshot import same_bits
from editkit.nethook import Trace, get_module, hidden, with_hidden

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"block": "block", "attention": "attention", "mlp": "MLP", "down_projection": "down-projection"}
CHECKS = ("cap", "edit", "grad")
LARGEST = 1e-5  # relative difference of two float32 gradients that still counts as none
IDS = torch.arange(2, 16).view(2, 7)


def families() -> Any:
    """editkit/testing/tiny.py, which is in the checkout alone."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module("editkit.testing.tiny")
    except ModuleNotFoundError as error:
        if error.name not in ("tests", "editkit.testing.tiny"):
            raise
        sys.exit(f"{ROOT / 'tests' / 'families.py'} is not there: run this script from a checkout of editkit.")


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def loss(model: nn.Module) -> Tensor:
    out = logits(model)
    return (out * torch.linspace(-1, 1, out.shape[-1])).pow(2).mean()


def uneven(h: Tensor) -> Tensor:
    """A change that no normalisation takes out again."""
    return h + torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype) ** 3


def hooks_of(model: nn.Module) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def capture(model: nn.Module, site: str) -> None:
    plain: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        plain["input"] = (args[0] if args else kwargs["hidden_states"]).clone()
        plain["output"] = hidden(output).clone()

    handle = get_module(model, site).register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        logits(model)
        handle.remove()
        with Trace(model, site, inputs=True, clone=True) as t:
            logits(model)
    for what, expected in plain.items():
        if not same_bits(getattr(t, what), expected):
            raise AssertionError(f"the captured {what} is not what a plain hook sees")


@torch.no_grad()
def edit(model: nn.Module, site: str) -> None:
    before = logits(model)
    with Trace(model, site, edit=uneven, outputs=False):
        during = logits(model)
    if not (during - before).abs().max() > 1e-3:
        raise AssertionError("the edit has no effect on the logits")
    if not same_bits(logits(model), before):
        raise AssertionError("the logits are not bit for bit what they were before the edit")


def gradient(model: nn.Module, site: str) -> float:
    seen: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        seen.append(hidden(output).clone())  # some models add to it in place
        return with_hidden(output, seen[0])

    handle = get_module(model, site).register_forward_hook(watch)
    try:
        (expected,) = torch.autograd.grad(loss(model), seen[0])
    finally:
        handle.remove()
    with Trace(model, site, grads=True, outputs=False) as t:
        loss(model).backward()
    model.zero_grad()
    difference = ((t.grad - expected).abs().max() / expected.abs().max()).item()
    if not difference <= LARGEST:
        raise AssertionError(f"the gradient differs from autograd's by {difference:.1e} (relative)")
    return difference


RUN: dict[str, Callable[[nn.Module, str], float | None]] = {"cap": capture, "edit": edit, "grad": gradient}


def check(family: str, models: Any) -> tuple[dict[str, Any], list[str]]:
    """The family's row, and a line for each failure."""
    model, sites = models.build(family), models.SITES[family]
    row: dict[str, Any] = {}
    failures: list[str] = []
    hooks = hooks_of(model)
    for kind in KINDS:
        name = getattr(sites, kind)
        site = "" if name is None else name.format(1)
        row[kind] = {"site": site} if site else dict.fromkeys(CHECKS)
        for what in CHECKS if site else ():
            try:
                value = RUN[what](model, site)
                row[kind][what] = "ok" if value is None else value
            except Exception as error:
                row[kind][what] = "FAIL"
                failures.append(f"{family}, {kind}, {what}: {type(error).__name__}: {error}")
    row["hooks"] = hooks_of(model) - hooks
    if row["hooks"]:
        failures.append(f"{family}: {row['hooks']} hooks were left on the model")
    return row, failures


def line(family: str, row: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.0e}" if isinstance(value, float) else value

    cells = ["{:4} {:4} {:7}".format(*(cell(row[kind][what]) for what in CHECKS)) for kind in KINDS]
    return f"{family:11}  {'   '.join(cells)}  {row['hooks']:>5}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of editkit/testing/tiny.py; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    models = families()
    if unknown := [name for name in options.families if name not in models.SITES]:
        parser.error(f"unknown family {', '.join(unknown)}: choose from {', '.join(models.SITES)}")

    began = time.time()
    torch.set_num_threads(1)  # for tiny models threads wait for each other more than they work
    print(f"{'':11}  {'   '.join(f'{title:17}' for title in KINDS.values())}")
    print(f"{'family':11}  {'   '.join('{:4} {:4} {:7}'.format(*CHECKS) for _ in KINDS)}  hooks", flush=True)
    rows, failures = {}, []
    for family in options.families or models.SITES:
        rows[family], failed = check(family, models)
        failures += failed
        print(line(family, rows[family]), flush=True)
    cells = sum(value is not None for row in rows.values() for kind in KINDS for value in row[kind].values())
    cells -= sum("site" in row[kind] for row in rows.values() for kind in KINDS)
    print(f"\n{len(rows)} families, {cells} checks, {len(failures)} failed; {time.time() - began:.0f} s")
    for failure in failures:
        print(f"  {failure}")
    if options.json:
        versions = {"torch": torch.__version__, "transformers": models.transformers.__version__}
        found = {"versions": versions, "largest": LARGEST, "families": rows, "failures": failures}
        write_text(options.json, json.dumps(found, indent=2) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
