"""Looking twice, without an edit and with it; and how far it moves the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace

T = TypeVar("T")


def before_and_after(lm: LanguageModel, edit: Edit, look: Callable[[], T]) -> tuple[T, T]:
    """What `look()` gives without and with the edit; the model is as it was, verified, when this returns."""
    before = look()
    with edit.applied(lm):
        after = look()
    return before, after


@dataclass(frozen=True, eq=False)
class StreamChange:
    """How far an edit moves the residual stream behind each block, at each token. Both [blocks, tokens]."""

    axes: ClassVar[tuple[str, str]] = ("block", "token")

    norm: Tensor  # ‖h after − h before‖
    relative: Tensor  # over ‖h before‖
    tokens: tuple[str, ...]


def stream_change(lm: LanguageModel, edit: Edit, text: str) -> StreamChange:
    """The change of every block's residual stream by `edit`, for one text."""
    rows = tokenise(lm, [text])
    blocks = [lm.architecture.block.format(i) for i in range(lm.layers)]

    @torch.no_grad()
    def look() -> Tensor:
        with Trace(lm.model, blocks) as trace:
            lm.model(**rows.inputs(), use_cache=False)
        return torch.stack([unflatten(trace[site].output, 1)[0].double().cpu() for site in blocks])

    before, after = before_and_after(lm, edit, look)
    norm = (after - before).norm(dim=-1)
    tokens = tuple(text[begin:end] for begin, end in rows.offsets[0])
    return StreamChange(norm, norm / before.norm(dim=-1), tokens)
