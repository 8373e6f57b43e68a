"""Delta: the change of one weight, as factors or dense; and sums of such changes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.models.architecture import as_stored, experts_in, matrix_shape, orientation, weight_name
from editkit.models.load import LanguageModel
from editkit.models.offload import shape_of
from editkit.models.snapshot import weight_digest
from editkit.nethook import get_module
from editkit.shown import Rows, Shown
from editkit.tensorfiles import require_fields

NEGLIGIBLE = 1e-7  # of the largest singular value: less than float32 holds beside it


@dataclass(frozen=True, eq=False, repr=False)
class Delta(Shown):
    """A change of one weight: ΔW = left @ right with left [d_model, r] and right [r, d_ff].

    A dense change has `right=None` and ΔW [d_model, d_ff] in `left`. The weights of E experts are one W = [W_1 … W_E]
    (models/experts.py), with d_ff standing for E times an expert's own.
    """

    module: str
    left: Tensor
    right: Tensor | None
    orientation: str  # how the module stores W: "in_out" (Conv1D) or "out_in" (Linear)
    bias: bool  # whether the module has a bias (untouched)
    before: str  # digest of the weight in the base
    experts: int | None = None  # how many have their slices in the weight; None: one matrix

    def __post_init__(self) -> None:
        # As a file gives them back: the last bits of products and sums depend on how factors lie in memory.
        object.__setattr__(self, "left", self.left.contiguous())
        object.__setattr__(self, "right", None if self.right is None else self.right.contiguous())

    def shown(self) -> tuple[str, Rows]:
        """The weight, and how large its change is."""
        rank = "dense" if self.right is None else f"rank {self.rank}"
        return "Delta", [("weight", self.parameter), ("ΔW", f"{list(self.shape)}, {rank}, ‖ΔW‖ {self.norm():.4g}")]

    @property
    def parameter(self) -> str:
        return weight_name(self.module, self.experts)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_model, d_ff)."""
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    @property
    def rank(self) -> int:
        """r of the factors; of a dense change the most it can be, min(d_model, d_ff)."""
        return min(self.shape) if self.right is None else self.left.shape[1]

    def matrix(self) -> Tensor:
        """ΔW in float32 as the module stores it."""
        product = self.left if self.right is None else self.left @ self.right
        return as_stored(product, self.orientation, self.experts)

    def parts(self) -> Iterator[tuple[Any, Tensor]]:
        """ΔW in float32 as the module stores it, in parts: (index, part) for each slice of experts that changes, and
        for another weight one part, which is all of it."""
        if self.experts is None:
            yield ..., self.matrix()
            return
        rows = self.left if self.right is None else self.right
        for expert, mine in enumerate(rows.chunk(self.experts, dim=1)):
            if mine.any():
                change = mine if self.right is None else self.left @ mine
                yield expert, as_stored(change, self.orientation, None)

    def change(self) -> Tensor:
        """ΔW [d_model, d_ff] in float64."""
        return self.left.double() if self.right is None else self.left.double() @ self.right.double()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD of ΔW in float64; of factors through their QR decompositions, so that ΔW is never formed."""
        if self.right is None:
            u, s, vt = torch.linalg.svd(self.left.double(), full_matrices=False)
            return u, s, vt
        ql, rl = torch.linalg.qr(self.left.double())
        qr, rr = torch.linalg.qr(self.right.double().T)
        u, s, vt = torch.linalg.svd(rl @ rr.T, full_matrices=False)
        return ql @ u, s, vt @ qr.T

    def factors(self, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """Left [d_model, r] and right [r, d_ff] in float32, as an adapter holds them, and ‖left right − ΔW‖ / ‖ΔW‖.

        A factored ΔW is given as it is, with an error of 0. `rank`: cut ΔW to this many of its largest singular values.
        If None, a dense ΔW is cut to its numerical rank.
        """
        if self.right is not None and (rank is None or self.rank <= rank):
            return self.left, self.right, 0.0
        u, s, vt = self.svd()
        kept = rank if rank is not None else max(1, int((s > NEGLIGIBLE * s[0]).sum()))
        error = (s[kept:].norm() / s.norm()).item() if s[0] > 0 else 0.0
        return (u[:, :kept] * s[:kept]).float(), vt[:kept].float(), error

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius); of factors from their r × r Gram matrices: ΔW is never formed."""
        if self.right is None:
            return float(self.left.double().norm())
        left, right = self.left.double(), self.right.double()
        return torch.trace((left.T @ left) @ (right @ right.T)).clamp_min(0).sqrt().item()

    def described(self) -> dict[str, Any]:
        """What a file says of the change beside its tensors, as JSON; `delta_of` reads it."""
        row = {name: getattr(self, name) for name in ("module", "orientation", "bias", "before")}
        if self.experts is not None:
            row["experts"] = self.experts
        return row | {"dense": self.right is None}


def delta_of(row: Any, number: int, tensors: Mapping[str, Tensor]) -> Delta:
    """The change of a file's row `number`, with its tensors. Raises ValueError or KeyError where the two do not fit
    together."""
    what = f"change {number}"
    fields: dict[str, tuple[type, ...]] = {"module": (str,), "orientation": (str,), "bias": (bool,), "before": (str,)}
    fields |= {"dense": (bool,), "experts": (int, type(None))}
    if isinstance(row, dict):
        row = {"dense": False, "experts": None} | row  # the first files had no dense changes
    require_fields(row, fields, what)
    if row["orientation"] not in ("in_out", "out_in"):
        raise ValueError(f"the orientation of {what} is {row['orientation']!r}")
    left, right = tensors[f"{number}.left"], None if row.pop("dense") else tensors[f"{number}.right"]
    if left.ndim != 2 or (right is not None and (right.ndim != 2 or left.shape[1] != right.shape[0])):
        raise ValueError(f"the tensors of {what} do not make a matrix")
    experts, width = row["experts"], (left if right is None else right).shape[1]
    if experts is not None and (experts < 1 or width % experts):
        raise ValueError(f"the tensors of {what} do not divide among {experts} experts")
    return Delta(left=left, right=right, **row)


def joined(deltas: Iterable[Delta]) -> tuple[Delta, ...]:
    """One Delta for each module: the sum of all `deltas` that change it. Ranks add; with a dense one it is dense."""
    found: dict[str, Delta] = {}
    for delta in deltas:
        found[delta.module] = _sum(found[delta.module], delta) if delta.module in found else delta
    return tuple(found.values())


def _sum(a: Delta, b: Delta) -> Delta:
    if a.right is None or b.right is None:
        return replace(a, left=(a.change() + b.change()).float(), right=None)
    return replace(a, left=torch.cat([a.left, b.left], 1), right=torch.cat([a.right, b.right]))


def low_rank_delta(lm: LanguageModel, module: str, left: Tensor, right: Tensor) -> Delta:
    """A Delta for `module` of `lm` as it is now, from left [d_model, r] and right [r, d_ff].

    Factors that hold more numbers than their product are multiplied out. Raises EditkitError when a factor is not
    finite or does not fit the weight.
    """
    if left.ndim == right.ndim == 2 and left.numel() + right.numel() > left.shape[0] * right.shape[1]:
        return dense_delta(lm, module, left @ right)
    return make_delta(lm, module, left, right)


def dense_delta(lm: LanguageModel, module: str, matrix: Tensor) -> Delta:
    """A Delta for `module` of `lm` as it is now, from ΔW [d_model, d_ff]. Raises as `low_rank_delta` does."""
    return make_delta(lm, module, matrix, None)


def make_delta(lm: LanguageModel, module: str, left: Tensor, right: Tensor | None) -> Delta:
    """A Delta for `module` of `lm` from these very factors, or from ΔW in `left`. Raises as `low_rank_delta` does."""
    found = get_module(lm.model, module)
    kind, experts = orientation(found, module), experts_in(found)
    name = weight_name(module, experts)
    d_model, d_ff = matrix_shape(shape_of(lm.model, name), kind)
    if right is None:
        if left.shape != (d_model, d_ff):
            raise EditkitError(f"ΔW {tuple(left.shape)} does not fit {module}: W is [{d_model}, {d_ff}].")
    elif left.shape[0] != d_model or right.shape[1] != d_ff or left.shape[1] != right.shape[0]:
        raise EditkitError(
            f"Factors {tuple(left.shape)} and {tuple(right.shape)} do not fit {module}: W is [{d_model}, {d_ff}], "
            "so left is [d_model, r] and right [r, d_ff]."
        )
    if not (left.isfinite().all() and (right is None or right.isfinite().all())):
        raise EditkitError(
            f"The update of {module} is not finite; nothing was applied. A larger moments.ridge or a lower "
            "method.lr usually cures it."
        )
    bias = getattr(found, "bias" if experts is None else "down_proj_bias", None) is not None
    right = None if right is None else right.float().cpu()
    return Delta(module, left.float().cpu(), right, kind, bias, weight_digest(lm.model, name), experts)
