"""Measure without an edit and with it; and how far it moves the residual stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise, unflatten
from editkit.nethook import Trace
from editkit.shown import Rows, Shown

T = TypeVar("T")


def before_and_after(lm: LanguageModel, edit: Edit, look: Callable[[], T]) -> tuple[T, T]:
    """Call `look()` without and with the edit; returns both results. The model is restored, and that is verified."""
    before = look()
    with edit.applied(lm):
        after = look()
    return before, after


@dataclass(frozen=True, eq=False, repr=False)
class StreamChange(Shown):
    """How far an edit moves the residual stream after each block, at each token; float64."""

    axes: ClassVar[tuple[str, str]] = ("block", "token")

    norm: Tensor  # [blocks, tokens], ‖h after − h before‖
    relative: Tensor  # [blocks, tokens], norm / ‖h before‖
    tokens: tuple[str, ...]

    def shown(self) -> tuple[str, Rows]:
        """The text, and where the stream moves most."""
        block, token = divmod(int(self.relative.argmax()), len(self.tokens))
        most = f"{self.relative.max().item():.4f} of ‖h‖ at block {block}, token {token} ({self.tokens[token].strip()})"
        return "Change of the residual stream", [("text", "".join(self.tokens)), ("largest", most)]


@in_eval_mode
def stream_change(lm: LanguageModel, edit: Edit, text: str) -> StreamChange:
    """How far `edit` moves the residual stream after each block, at each token of `text`.

    Raises EditkitError for an edit that puts other tokens in front of the text.
    """
    edit.require_same_tokens("stream_change")
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
