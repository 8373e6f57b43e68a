"""One change written into a model: the weight that it belongs to found, added to, and checked."""

import warnings
from typing import Any

from torch import Tensor, nn

from editkit.edits.delta import Delta
from editkit.errors import EditkitError
from editkit.models.load import LanguageModel
from editkit.models.offload import is_offloaded, values_of, write_values
from editkit.models.precision import wide
from editkit.models.quantized import edited_module, is_quantized
from editkit.models.snapshot import weight_digest
from editkit.models.wrapped import require_editable
from editkit.nethook import NameNotFound, get_module, replace_module


def write_change(lm: LanguageModel, delta: Delta) -> None:
    """Write one change into the model. Warns of one larger than its weight; raises EditkitError where the result is not
    finite. What was written before the error stays."""
    weight = values_of(lm.model, delta.parameter)
    module = get_module(lm.model, delta.module)
    new: nn.Module | None = None
    # 1) The edited weight, in parts; or of a quantised one, what takes the place of its module.
    written: list[Tensor] = []
    parts: list[tuple[Any, Tensor]] = []
    if is_quantized(module):
        new = edited_module(module, delta.left, delta.right, lm.edited, lm.dtype, delta.module)
        written = list(new.parameters(recurse=False))  # those of a Beside's base are not new
    else:
        dtype = wide(weight.dtype)
        for index, change in delta.parts():
            part = (weight[index].to(dtype) + change.to(weight.device, dtype)).to(weight.dtype)
            parts.append((index, part))
            written.append(part)
    # 2) Is it one that can be used?
    if not all(part.isfinite().all() for part in written):
        raise EditkitError(
            f"The edited {delta.parameter} is not finite in {weight.dtype if new is None else lm.dtype}; the model was "
            "left as it was. Lower the clamp or the learning rate, or load the model in float32."
        )
    if (size := delta.norm()) > (whole := weight.float().norm().item()):
        warnings.warn(
            f"the update of {delta.parameter} is larger than the weight (‖ΔW‖ {size:.3g}, ‖W‖ {whole:.3g}): edits of "
            "this size usually break the model",
            stacklevel=3,
        )
    # 3) Put it in its place.
    if new is not None:
        replace_module(lm.model, delta.module, new)
        return
    offloaded = is_offloaded(lm.model, delta.parameter)
    changed = weight.clone() if offloaded else weight
    for index, part in parts:
        changed[index] = part
    if offloaded:  # its store takes a weight as a whole
        write_values(lm.model, delta.parameter, changed)


def edited_digest(lm: LanguageModel, name: str) -> str:
    require_weight(lm, name)
    return weight_digest(lm.model, name)


def require_weight(lm: LanguageModel, name: str) -> None:
    """Raise EditkitError where the model has no such weight, or it cannot be edited as the model is wrapped."""
    try:
        require_editable(lm.model, name.rpartition(".")[0])
    except NameNotFound as error:
        raise EditkitError(
            f"This edit changes {name}, which '{lm.name}' does not have. Load the base it was made for."
        ) from error
