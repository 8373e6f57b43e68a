"""Edit files put together: several on one model in the order they were made, and as a checkpoint of their own.

A sum of edits needs them to be of one base (`Edit.__add__`); what was computed one on top of the other needs its order,
and may be given strengths (`stack`).
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from editkit.edits.base import base_of
from editkit.edits.delta import Delta, joined
from editkit.edits.edit import FOLDED, Applied, Edit, scaled
from editkit.edits.writing import edited_digest
from editkit.errors import EditkitError, OutputError
from editkit.files import write_text
from editkit.models.installed import Installed
from editkit.models.load import LanguageModel


@contextlib.contextmanager
def apply_files(paths: Sequence[str | Path], lm: LanguageModel) -> Iterator[Applied]:
    """The edits of several files on `lm` inside the `with`, in the stated order; restored and verified after it.

    W = cast(W0 + Σ ΔW), cast once. Each edit must be of `lm` itself, or have been computed on top of exactly the
    files before it (its `parents`). Raises EditkitError naming the first file for which neither holds, EditFileError
    for one that cannot be read; nothing is applied then.
    """
    if not paths:
        raise EditkitError("No edit file was given: name one or several.")
    base = base_of(lm)
    before: list[str] = []
    deltas: list[Delta] = []
    installed: list[Installed] = []
    for path in paths:
        edit = Edit.load(path)
        if any(parent.startswith(FOLDED) for parent in edit.parents):
            raise EditkitError(
                f"'{path}' was computed in a session that had folded its older steps into one sum, so no files of "
                "edits make the model that it belongs on. Use Session.load(folder, lm), or session.total()."
            )
        alone = edit.base.digest == base.digest and not edit.parents
        if not alone and not (before and edit.parents == tuple(before)):
            raise EditkitError(
                f"'{path}' was computed for '{edit.base.name}' {edit.base.digest[:12]} on top of "
                f"{[d[:12] for d in edit.parents] or 'nothing'}; here it comes on '{lm.name}' {base.digest[:12]}, "
                f"on top of {[d[:12] for d in before] or 'nothing'}. Give all files in the order they were made, "
                "on their own base."
            )
        before.append(edit.digest)
        deltas += list(edit.deltas)
        installed += list(edit.installed)
    how = {"method": "files", "digests": before}
    with Edit(_on(lm, deltas), base, how, installed=tuple(installed)).applied(lm) as applied:
        yield applied


def stack(lm: LanguageModel, edits: Sequence[Edit], factors: Sequence[float] | None = None) -> Edit:
    """Σ factor · edit as one edit of `lm` as it is now. Each edit may have been computed on top of others, of these or
    not: it adds its ΔW.

    - `edits`: in the order they go on the model. `factors`: the strength of each; None: 1 for all.

    One edit of `lm` itself at strength 1 is returned as it is, with its digest. Raises EditkitError for no edit, for
    factors that are not finite or of another number, for an edit of other modules, and for one that is more than a
    change of weights at another strength than 1.
    """
    factors = [1.0] * len(edits) if factors is None else list(factors)
    if not edits or len(factors) != len(edits) or not all(map(math.isfinite, factors)):
        raise EditkitError(
            f"{len(edits)} edits were given with the factors {factors}: give one finite factor for each."
        )
    base = base_of(lm)
    if len(edits) == 1 and factors[0] == 1.0 and edits[0].base.digest == base.digest and not edits[0].parents:
        return edits[0]
    for edit, factor in zip(edits, factors, strict=True):
        if factor != 1.0:
            edit.require_weights(f"A strength of {factor:g}")
    deltas, of = scaled(edits, factors)
    installed = tuple(each for edit in edits for each in edit.installed)
    return Edit(_on(lm, deltas), base, {"method": "stack", "of": of}, installed=installed)


def _on(lm: LanguageModel, deltas: Sequence[Delta]) -> tuple[Delta, ...]:
    """The sum of changes, one for each weight, as changes of the weights of `lm` as they are now."""
    weights = {delta.parameter: edited_digest(lm, delta.parameter) for delta in deltas}
    return tuple(replace(delta, before=weights[delta.parameter]) for delta in joined(deltas))


MADE_OF = "edits.json"  # in a checkpoint: what was merged into it


def write_checkpoint(paths: Sequence[str | Path], lm: LanguageModel, folder: str | Path) -> str:
    """Merge the edits of several files into a copy of `lm`: a folder that transformers loads like any model.

    - `paths`: edit files in the order they were made, as for `apply_files`.
    - `lm`: their base; it is as it was afterwards, bit for bit.
    - `folder`: of the checkpoint; it must not be there yet, or be empty. It also gets the tokenizer, and edits.json,
      which names the base and each edit's digest, method and facts.

    Returns the digest of the edited model. Raises EditkitError for files that do not fit, a quantised model, an edit
    that is no change of weights, or a folder that holds something; OutputError where it cannot be written. Nothing is
    left half written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EditkitError(f"'{folder}' is there already. Name a new folder for the checkpoint.")
    if lm.quantization is not None:
        raise EditkitError(
            f"'{lm.name}' is quantised ({lm.quantization}), and an edited weight of it cannot be saved as such. Load "
            "the base without model.quantization, and quantise the checkpoint."
        )
    edits = [Edit.load(path) for path in paths]
    for edit in edits:
        edit.require_weights("A checkpoint")
    made_of = {"base": asdict(edits[0].base), "edits": [_about(edit) for edit in edits]} if edits else {}
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with apply_files(paths, lm):
        digest = lm.digest
        try:
            lm.model.save_pretrained(beside)
            lm.tokenizer.save_pretrained(beside)
            write_text(beside / MADE_OF, json.dumps(made_of | {"digest": digest}, indent=2, ensure_ascii=False) + "\n")
            if folder.exists():
                folder.rmdir()
            beside.rename(folder)
        except OSError as error:
            raise OutputError(
                f"'{folder}' could not be written: {error.strerror or error}. Free some space or choose another "
                "folder; nothing was left half written."
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return digest


def _about(edit: Edit) -> dict[str, object]:
    how = edit.provenance
    return {"digest": edit.digest, "method": how.get("method"), "facts": how.get("facts", []), "seed": how.get("seed")}
