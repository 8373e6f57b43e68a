"""Precision: float32 in place of half, where half is slow or too coarse.

Every float16 and bfloat16 value is a float32 value too, so widening is exact. On a CPU most half-precision kernels are
10 to 50 times slower than those of float32, so there the passes of a half model run on float32 copies of its weights:
the weights themselves keep their dtype and bits. The results are not those of half arithmetic bit for bit; they are
nearer to exact arithmetic, since activations are not rounded to half after each operation.

Newer processors multiply bfloat16 by themselves (AVX-512 BF16, AMX): a product of 106 rows with a weight of Llama-3-8B
went at 830 GFLOP/s in bfloat16 and at 130 in float32, on two cores of an AMD EPYC. There a large bfloat16 model runs as
it is, and is held in memory once; a small one is still widened, for the better results.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from editkit.errors import EditkitError
from editkit.models.load import LanguageModel
from editkit.models.memory import free_bytes
from editkit.models.products import multiplies
from editkit.models.snapshot import uninterrupted

HALF = (torch.float16, torch.bfloat16)
SHARE = 0.75  # of the free memory that the float32 copies may take
SMALL = 2 << 30  # bytes of float32 copies up to which a model is widened even where bfloat16 is the faster

Place = tuple[dict[str, Any], str, Tensor]  # a module's parameters or buffers, a name in it, the tensor that is there


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for a half dtype, any wider one as it is: the dtype of losses, sums and small steps.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def widened(lm: LanguageModel) -> Iterator[None]:
    """In the body a half model on the CPU runs in float32; any other model, and any model elsewhere, is left alone.

        with torch.no_grad(), widened(lm):
            lm.model(**rows.inputs())          # lm.dtype is float32 here, and so are all activations

    The modules stay the same objects, so hooks, modes and names work as ever. In place of each half parameter and
    buffer they hold a float32 copy, with the same gradient flag; tied weights share one. The copies are made from the
    weights as they are at entry, which takes less time than a digest of them would, and are dropped at exit: none can
    be stale. Inside another `widened` it does nothing. After the body, or an exception in it, the modules hold the
    original tensors again, which nothing has written to.

    - Memory: 4 bytes a parameter beside the model (GPT-2 XL: 6 GB). Where that is more than SHARE of the free memory,
      the body runs in half precision, with a warning.
    - A bfloat16 model whose copies are larger than SMALL runs as it is on a processor that multiplies bfloat16 itself.
    - The body must not write to the weights, since the copy that it would write to is dropped: an EditkitError then.
      Apply edits, and take digests, outside.
    - Runs of the model in other threads see the copies too.
    """
    places = _places(lm.model)
    if not places or not _fits(places, lm):
        yield
        return
    copies = _copies(places)
    try:
        for store, name, tensor in places:
            store[name] = copies[id(tensor)]
        yield
    finally:
        with uninterrupted():
            for store, name, tensor in places:
                if store[name] is copies[id(tensor)]:  # a model may have replaced a buffer of its own
                    store[name] = tensor
    if written := [name for _, name, tensor in places if copies[id(tensor)]._version]:
        raise EditkitError(
            f"A {written[0]} of '{lm.name}' was written while its float32 copy was in use, and the change is lost. "
            "Change weights outside of widened()."
        )


def _places(model: nn.Module) -> list[Place]:
    """Where `model` holds half tensors; nowhere unless all its parameters are plain ones on the CPU."""
    for parameter in model.parameters():
        if type(parameter) is not nn.Parameter or parameter.device.type != "cpu" or not parameter.is_floating_point():
            return []
    stores = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    return [
        (store, name, tensor)
        for store in stores
        for name, tensor in store.items()
        if tensor is not None and tensor.dtype in HALF
    ]


def _copies(places: list[Place]) -> dict[int, Tensor]:
    """A float32 copy for each distinct tensor, by the id of the original."""
    copies: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could not be used outside
        for _, _, tensor in places:
            if id(tensor) not in copies:
                copy = tensor.detach().float()
                parameter = isinstance(tensor, nn.Parameter)
                copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if parameter else copy
    return copies


def widens(dtype: torch.dtype, parameters: int, free: int | None) -> bool:
    """Whether `widened` makes float32 copies of a model on the CPU.

    - `dtype`, `parameters`: of the model. `free`: bytes of memory, None where they are not known.
    """
    return (
        dtype in HALF and not _better_as_it_is(dtype, parameters) and (free is None or 4 * parameters <= SHARE * free)
    )


def _better_as_it_is(dtype: torch.dtype, parameters: int) -> bool:
    return 4 * parameters > SMALL and multiplies(dtype)


def _fits(places: list[Place], lm: LanguageModel) -> bool:
    """Whether the model is widened. Warns where that would be the faster way and memory does not allow it."""
    count, free = sum({id(tensor): tensor.numel() for _, _, tensor in places}.values()), free_bytes()
    if widens(lm.dtype, count, free):
        return True
    if free is not None and not _better_as_it_is(lm.dtype, count):
        warnings.warn(
            f"'{lm.name}' runs in {str(lm.dtype).removeprefix('torch.')} on the CPU, which is slow and less exact: "
            f"float32 copies of its weights take {4 * count / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            stacklevel=4,
        )
    return False
