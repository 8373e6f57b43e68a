"""The .npz files of the ROME authors' code (github.com/kmeng01/rome: util/runningstats.py, rome/layer_stats.py).

There `mom2.mom2` is the sum Σ k kᵀ [d_ff, d_ff], float32 or float64, `mom2.count` the number of keys, and
`mom2.constructor` a name. `sample_size` is the number of texts that was asked for: the reference takes a file only
when it equals its own `mom2_n_samples`. A SecondMoment saved outside a CombinedStat has the names without `mom2.`.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy
import torch

from editkit.errors import EditkitError
from editkit.files import whole
from editkit.moments.moment import SecondMoment

CONSTRUCTOR = "util.runningstats.SecondMoment()"
SAMPLE_SIZE = 100_000  # mom2_n_samples in all of the authors' hparams files


def from_npz(path: Path | str, module: str, source: str, provenance: dict[str, Any] | None = None) -> SecondMoment:
    """The second moment in a file of the reference, which names no model: `module` is where its keys were taken.

    Nothing pickled is read. Raises EditkitError for another kind of file, or values that are no second moment.
    """
    arrays: dict[str, Any] = {}
    try:
        with numpy.load(path, allow_pickle=False) as file:
            arrays = {name.removeprefix("mom2."): file[name] for name in file.files}
        total, count = torch.from_numpy(arrays["mom2"]).double(), int(arrays["count"])
    except KeyError as error:
        raise EditkitError(
            f"'{path}' has no {error} among {', '.join(arrays)}: it holds no second moment of the reference."
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise EditkitError(f"'{path}' cannot be read as an .npz file of the reference: {error}.") from error
    moment = SecondMoment(module, total / max(count, 1), count, source, provenance=provenance or {})
    if faults := moment.faults():
        raise EditkitError(f"'{path}' holds no second moment: {'; '.join(faults)}. Take another copy of the file.")
    return moment


def to_npz(moment: SecondMoment, path: Path | str, sample_size: int = SAMPLE_SIZE) -> Path:
    """Write the moment as the reference reads it, in float64. Raises OutputError, and EditkitError for the moment of a
    mixture of experts, which is no single matrix.

    `sample_size` must be the reader's `mom2_n_samples`: on another number it collects anew, without a word.
    """
    if moment.routed:
        raise EditkitError(
            f"The second moment at {moment.module} has a block for each of {len(moment.routed)} experts, and a file of "
            "the reference holds one matrix for one down-projection. Copy the .safetensors file instead."
        )
    path = Path(path)
    arrays: dict[str, Any] = {
        "mom2.constructor": numpy.array(CONSTRUCTOR),
        "mom2.count": numpy.array(moment.count),
        "mom2.mom2": (moment.matrix * moment.count).numpy(),
        "sample_size": numpy.array(sample_size),
    }
    with whole(path) as temporary, temporary.open("wb") as file:
        numpy.savez(file, **arrays)
    return path
