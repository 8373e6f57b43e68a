"""Null controls of an edit: what is put in its place, to see what of its scores is the edit's own doing.

    random        a random δ: the same weights, ‖ΔW‖ and keys, each value turned by a random rotation
    identity      the same method with C = I in place of the second moment
    wrong_block   the same method at blocks far from the chosen ones
    prompt_only   no weight is changed; the new fact stands in front of every prompt (`ike` without demonstrations)

The wrong block: the chosen range is moved by half of the model's blocks, or as far as there is room, to the side that
has more room; down where both sides have the same. So block 17 of 48 becomes 41, block 5 of 28 becomes 19, and
blocks 3 and 4 of 8 become 0 and 1. The last block is avoided where it can be: its output reaches no later token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from editkit.edits import Edit
from editkit.edits.delta import Delta
from editkit.methods import get_method
from editkit.settings import (
    IDENTITY,
    PROMPT_ONLY,
    RANDOM,
    WRONG_BLOCK,
    MethodSettings,
    MomentSettings,
    ValueSettings,
    WeightlessSettings,
)

IN_CONTEXT = "ike"  # the method of PROMPT_ONLY


@dataclass(frozen=True)
class Control:
    """A null control of one method on one model.

    - `how`: what it does there, in words. `skipped`: why it is left out; "" where it is not.
    - `method`, `settings`, `moments`: what computes its edit. `settings` None: it is made of the edit itself, by
      `random_like`.
    """

    name: str
    how: str = ""
    skipped: str = ""
    method: str = ""
    settings: MethodSettings | None = None
    moments: MomentSettings | None = None

    def to_json(self) -> dict[str, Any]:
        """What a record says of the control before it is measured."""
        return {"name": self.name} | ({"skipped": self.skipped} if self.skipped else {"how": self.how})


def null_controls(
    method: str, settings: MethodSettings, moments: MomentSettings, model_name: str, layers: int
) -> list[Control]:
    """All four controls of a method on a model of `layers` blocks; those that it has no use for say why.

    - `settings`: of the method. `moments`: how it has C collected.
    - `model_name`: whose constants fill what `settings` leave open.
    """
    return [
        _random(settings),
        _identity(method, settings, moments),
        _wrong_block(method, settings, moments, model_name, layers),
        _prompt_only(method, moments),
    ]


def _random(settings: MethodSettings) -> Control:
    if isinstance(settings, WeightlessSettings):
        return Control(RANDOM, skipped="the method changes no weight")
    return Control(RANDOM, "each weight's values turned by a random rotation; the same keys and ‖ΔW‖")


def _identity(method: str, settings: MethodSettings, moments: MomentSettings) -> Control:
    if not isinstance(settings, ValueSettings) or "moments" not in get_method(method).takes:
        return Control(IDENTITY, skipped="the method uses no second moment")
    if not settings.takes_identity:
        return Control(IDENTITY, skipped="the method needs the null space of C, and C = I has none")
    if not moments.enabled:
        return Control(IDENTITY, skipped="the run itself uses C = I (moments.enabled=false)")
    how = "the same method with the identity for C"
    return Control(IDENTITY, how, method=method, settings=settings, moments=replace(moments, enabled=False))


def _wrong_block(
    method: str, settings: MethodSettings, moments: MomentSettings, model_name: str, layers: int
) -> Control:
    found = settings.resolved(model_name, layers)
    if not found.blocks or getattr(found, "modules", None) is not None:
        return Control(WRONG_BLOCK, skipped="the method's settings name no block")
    moved = moved_blocks(found.blocks, layers)
    if not moved:
        return Control(WRONG_BLOCK, skipped=f"of {layers} blocks there are none apart from {list(found.blocks)}")
    named: dict[str, Any] = {"layers": moved} if getattr(found, "layer", None) is None else {"layer": moved[0]}
    wrong = replace(settings, **named)
    chosen, other = (", ".join(map(str, blocks)) for blocks in (found.blocks, moved))
    how = f"the same method at block {other} in place of {chosen}"
    return Control(WRONG_BLOCK, how, method=method, settings=wrong, moments=moments)


def moved_blocks(blocks: Sequence[int], layers: int) -> tuple[int, ...]:
    """`blocks` moved away by half of `layers`, or as far as there is room; () where they would overlap.

    >>> moved_blocks([17], 48), moved_blocks([3, 4], 8), moved_blocks([0, 1], 3)
    ((41,), (0, 1), ())
    """
    down, up = min(blocks), layers - 1 - max(blocks)
    by = min(layers // 2, max(down, up))
    if by <= max(blocks) - min(blocks):
        return ()
    return tuple(block + (by if up > down else -by) for block in blocks)


def _prompt_only(method: str, moments: MomentSettings) -> Control:
    if method == IN_CONTEXT:
        return Control(PROMPT_ONLY, skipped=f"{IN_CONTEXT} is in-context editing itself")
    how = f"the new fact in front of every prompt ({IN_CONTEXT} without demonstrations)"
    return Control(PROMPT_ONLY, how, method=IN_CONTEXT, settings=get_method(IN_CONTEXT).settings(), moments=moments)


def random_like(edit: Edit, draw: str) -> Edit:
    """`edit` with a random δ: ΔW becomes Q ΔW, with Q drawn evenly from all rotations of the values [d_model].

    The weights, their keys, ‖ΔW‖ and every singular value stay; where the values point does not. `draw` seeds Q.
    """
    rng = random.Random(draw)
    deltas = tuple(_turned(delta, rng.getrandbits(63)) for delta in edit.deltas)
    how = {"method": edit.provenance.get("method", ""), "control": RANDOM, "draw": draw}
    return replace(edit, deltas=deltas, provenance=how, memory={}, installed=())


def _turned(delta: Delta, seed: int) -> Delta:
    """Q left, without Q itself: of left = B R with orthonormal columns in B, Q B is a random orthonormal matrix."""
    r = torch.linalg.qr(delta.left.double(), mode="r").R  # [n, columns], n = min(d_model, columns)
    gaussian = torch.randn(len(delta.left), len(r), dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    basis, upper = torch.linalg.qr(gaussian)
    basis = basis * upper.diagonal().sign()  # without it the distribution is not even (Mezzadri 2007, section 5)
    return replace(delta, left=(basis @ r).float())
