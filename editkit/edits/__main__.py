"""Edit files on the command line.

    python -m editkit.edits show FILE…                               # what an edit changes, and how it was made
    python -m editkit.edits verify FILE… [--model atlas]             # is the file whole; does it go on and come off
    python -m editkit.edits apply FILE… --model atlas --prompt TEXT  # what the model says without and with them
    python -m editkit.edits merge FILE… --model atlas --into FOLDER  # a checkpoint that transformers loads
    python -m editkit.edits diff FILE FILE                           # in what two edits differ
    python -m editkit.edits doctor FILE --model atlas                # is it fit to be used; one page of it
    python -m editkit.edits export FILE --into FOLDER --to peft|vllm # an adapter
    python -m editkit.edits export FILE --into FILE.gguf --to gguf   # an adapter for llama.cpp

Several files are taken in the order given: each is of the base alone, or was made on top of those before it. Errors are
one line and exit code 1, or 2 for a wrong command.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from editkit.commands import Commands, load_model, model_options
from editkit.doctor import examine
from editkit.edits.delta import Delta
from editkit.edits.edit import Edit
from editkit.edits.stacked import apply_files, write_checkpoint
from editkit.errors import EditkitError, ModelError
from editkit.models.generate import generate
from editkit.models.load import LanguageModel, load, skeleton
from editkit.shown import Rows

TOKENS = 12  # said after a prompt


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    return _commands().run(arguments)


def show(options: argparse.Namespace) -> int:
    """Print what each edit changes, for which base, and how it was made."""
    for number, path in enumerate(options.files):
        edit = Edit.load(path)
        if number:
            print()
        for name, value in _described(path, edit):
            print(f"{name:<11}{value}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Read each file whole and compare its digest; with --model apply all of them, and restore bit for bit."""
    for path in options.files:
        print(f"{path}: whole, digest {Edit.load(path).digest[:16]}")
    if options.model is None:
        return 0
    lm = load_model(options)
    before = lm.digest
    with apply_files(options.files, lm) as applied:
        during = lm.digest
    assert applied.reversal is not None
    print(f"{lm.name}: {before[:16]}, edited {during[:16]}, restored {lm.digest[:16]}")
    print(f"{applied.reversal.tensors} parameters and buffers, {applied.reversal.bytes:,} bytes compared, all equal")
    return 0


def apply(options: argparse.Namespace) -> int:
    """Print what the model says after each prompt without and with the edits; its files stay as they are."""
    lm = load_model(options)
    prompts: list[str] = options.prompt or list(dict.fromkeys(_asked(Edit.load(path)) for path in options.files))
    before = generate(lm, prompts, options.tokens)
    with apply_files(options.files, lm):
        after = generate(lm, prompts, options.tokens)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  without  {old.strip()!r}\n  with     {new.strip()!r}")
    return 0


def merge(options: argparse.Namespace) -> int:
    """Write a copy of the model with the edits in its weights, load it again, and compare the digests."""
    lm = load_model(options)
    digest = write_checkpoint(options.files, lm, options.into)
    found = load(str(options.into), dtype=options.dtype, device=options.device).digest
    if found != digest:
        raise EditkitError(
            f"The checkpoint in '{options.into}' loads as {found[:16]}, and the edited model is {digest[:16]}: do not "
            "use it. Report the model's family."
        )
    print(
        f"{options.into}: {len(options.files)} edits in '{lm.name}', digest {digest[:16]}, the same when loaded again"
    )
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Examine an edit on its base: size, rounding, facts, neighbors, prose; exit code 1 where something is bad."""
    edit = Edit.load(options.file)
    found = examine(load_model(options), edit, options.prompt or ())
    print(found)
    print(found.write(options.page or options.file.with_suffix(".html")))
    return 0 if found.fit else 1


def diff(options: argparse.Namespace) -> int:
    """Print in what two edits differ: base, settings, facts, and the change of each weight."""
    first, second = (Edit.load(path) for path in options.files)
    if first.digest == second.digest:
        print("the same edit")
        return 0
    ours, theirs = (dict(_flat({"base": vars(each.base), **each.provenance})) for each in (first, second))
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key) and not key.startswith(_PER_STEP):
            print(f"{key:<32}{ours.get(key, '–')}  |  {theirs.get(key, '–')}")
    changes = [{delta.parameter: delta for delta in each.deltas} for each in (first, second)]
    for name in dict.fromkeys([*changes[0], *changes[1]]):
        print(f"{name}\n  {_compared(changes[0].get(name), changes[1].get(name))}")
    return 0


def export(options: argparse.Namespace) -> int:
    """Write an adapter: for peft; for vLLM and SGLang, which take one rank for all weights; or for llama.cpp."""
    edit = Edit.load(options.file)
    if options.to == "gguf":
        errors = edit.to_gguf(options.into, _shapes(options.model, edit), options.rank)
    else:
        errors = edit.to_peft(options.into, options.rank, served=options.to == "vllm")
    for name, error in errors.items():
        print(f"{name:<48}relative error {error:.1e}")
    print(options.into)
    return 0


_PER_STEP = ("reports", "versions", "seconds")  # of an edit's provenance: not what was asked for


def _described(path: Path, edit: Edit) -> Rows:
    how = edit.provenance
    title, rows = edit.shown()
    made = [("made", f"{title[0].lower()}{title[1:]}, seed {how.get('seed', '?')}")]
    return [("file", f"{path}, {path.stat().st_size:,} bytes"), ("digest", edit.digest), *made, *rows]


def _asked(edit: Edit) -> str:
    facts = edit.provenance.get("facts", [])
    if not facts:
        raise EditkitError("This edit does not name its facts: give --prompt TEXT.")
    return str(facts[0]["prompt"]).replace("{}", facts[0]["subject"])


def _shapes(model: str | None, edit: Edit) -> LanguageModel:
    """The base of an edit without its weights, by the name that is given or the edit's own. Raises ModelError."""
    if model is not None:
        return skeleton(model)
    try:
        return skeleton(edit.base.name)
    except ModelError as error:
        raise ModelError(f"{error} Or name the base where it is now: --model NAME.") from error


def _compared(ours: Delta | None, theirs: Delta | None) -> str:
    if ours is None or theirs is None:
        return f"changed by the {'second' if ours is None else 'first'} alone"
    a, b = ours.change(), theirs.change()
    if a.shape != b.shape:
        return f"{list(a.shape)} against {list(b.shape)}"
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    return f"‖ΔW‖ {a.norm():.4g} against {b.norm():.4g}, cosine {cosine:.4f}, ‖difference‖ {(a - b).norm():.4g}"


def _flat(values: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        return [each for key, value in values.items() for each in _flat(value, f"{path}.{key}" if path else str(key))]
    return [(path, values)]


def _commands() -> Commands:
    commands = Commands("python -m editkit.edits", __doc__)

    def files(one: argparse.ArgumentParser, number: int | str = "+") -> None:
        one.add_argument("files", nargs=number, type=Path, metavar="FILE", help="an edit, as edit.save(path) writes it")

    files(commands.add("show", show))
    one = commands.add("verify", verify)
    files(one)
    model_options(one, "the base of the edits, to apply them on", required=False)
    one = commands.add("apply", apply)
    files(one)
    model_options(one, "the base of the edits")
    one.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: each edit's own first"
    )
    one.add_argument("--tokens", type=int, default=TOKENS, help=f"said after a prompt; default: {TOKENS}")
    one = commands.add("merge", merge)
    files(one)
    model_options(one, "the base of the edits")
    one.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="of the checkpoint, a new one")
    one = commands.add("doctor", doctor)
    one.add_argument("file", type=Path, metavar="FILE")
    model_options(one, "the base of the edit")
    one.add_argument("--prompt", action="append", metavar="TEXT", help="asked too; may be repeated")
    one.add_argument("--page", type=Path, metavar="FILE.html", help="where the page goes; default: beside the edit")
    files(commands.add("diff", diff), 2)
    one = commands.add("export", export)
    one.add_argument("file", type=Path, metavar="FILE")
    one.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="of the adapter; for gguf FILE.gguf")
    one.add_argument(
        "--to", choices=("peft", "vllm", "gguf"), default="peft", help="vllm: SGLang's too; gguf: llama.cpp's"
    )
    one.add_argument("--model", metavar="NAME", help="for gguf: the base, if its name or folder is another now")
    one.add_argument("--rank", type=int, help="cut each change to so many singular values; what is lost is printed")
    return commands


if __name__ == "__main__":
    sys.exit(main())
