"""Edit: a change of weights as a value. Computing, saving and loading one leaves every model as it is.

An edit holds low-rank factors for each parameter it changes, in the papers' orientation (W: [d_model, d_ff],
ΔW = left @ right), or ΔW itself where it has no low rank, with the digest of the base it was computed for and
how it was computed. The file is safetensors: tensors in float32, everything else as one JSON string in the header.
"""

import contextlib
import functools
import hashlib
import json
import struct
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editkit.errors import EditFileError, EditkitError
from editkit.files import write_bytes
from editkit.models.architecture import orientation
from editkit.models.load import LanguageModel
from editkit.models.precision import wide
from editkit.models.snapshot import Reversal, Snapshot, digest
from editkit.nethook import get_module, get_parameter

FORMAT = "editkit-edit/1"


@dataclass(frozen=True, eq=False)
class Delta:
    """A change of one weight: ΔW = left @ right with left [d_model, r] and right [r, d_ff].

    A dense change has `right=None` and ΔW [d_model, d_ff] in `left`.
    """

    module: str
    left: Tensor
    right: Tensor | None
    orientation: str  # how the module stores W: "in_out" (Conv1D) or "out_in" (Linear)
    bias: bool  # whether the module has a bias (untouched)
    before: str  # digest of the weight in the base

    @property
    def parameter(self) -> str:
        return f"{self.module}.weight"

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
        return product.T if self.orientation == "in_out" else product

    def change(self) -> Tensor:
        """ΔW [d_model, d_ff] in float64."""
        return self.left.double() if self.right is None else self.left.double() @ self.right.double()

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The thin SVD of ΔW in float64; of factors through their QR decompositions, so that ΔW is never formed."""
        if self.right is None:
            return torch.linalg.svd(self.left.double(), full_matrices=False)
        ql, rl = torch.linalg.qr(self.left.double())
        qr, rr = torch.linalg.qr(self.right.double().T)
        u, s, vt = torch.linalg.svd(rl @ rr.T, full_matrices=False)
        return ql @ u, s, vt @ qr.T

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius); of factors from their r × r Gram matrices: ΔW is never formed."""
        if self.right is None:
            return self.left.double().norm().item()
        left, right = self.left.double(), self.right.double()
        return torch.trace((left.T @ left) @ (right @ right.T)).clamp_min(0).sqrt().item()


@dataclass(frozen=True)
class Base:
    """The model that an edit was computed for."""

    name: str
    digest: str
    dtype: str


@dataclass(frozen=True, eq=False)
class Edit:
    """A frozen edit. `with edit.applied(lm): ...` applies it, and restores and verifies on exit.

    `provenance` is JSON: method, settings, facts, seed, loss of each step, versions. `parents` are digests
    of edits that had been applied to the base before this one was computed, in order. `memory` is what the same
    method wants to know of this edit when it edits on top of it (AlphaEdit: the keys), in float32.
    """

    deltas: tuple[Delta, ...]
    base: Base
    provenance: dict[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that the edit changes."""
        return [delta.parameter for delta in self.deltas]

    @property
    def rank(self) -> int:
        """The largest rank among the deltas."""
        return max((delta.rank for delta in self.deltas), default=0)

    def norm(self) -> float:
        """‖Δ‖ over all parameters (Frobenius)."""
        return sum(delta.norm() ** 2 for delta in self.deltas) ** 0.5

    def __add__(self, other: "Edit") -> "Edit":
        return self._combined([self, other], [1.0, 1.0])

    def __sub__(self, other: "Edit") -> "Edit":
        return self._combined([self, other], [1.0, -1.0])

    def __neg__(self) -> "Edit":
        return self._combined([self], [-1.0])

    def __mul__(self, factor: float) -> "Edit":
        return self._combined([self], [factor])

    def _combined(self, edits: list["Edit"], factors: list[float]) -> "Edit":
        from editkit.edits.arithmetic import combined

        return combined(edits, factors)

    __rmul__ = __mul__

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the saved bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    # --- applying -------------------------------------------------------------------------------------------

    def check_base(self, lm: LanguageModel, *, whole: bool = True) -> None:
        """Raise EditkitError unless `lm` is the base of this edit, bit for bit.

        The weights that the edit changes are always compared; `whole` compares the digest of the whole model.
        """
        for delta in self.deltas:
            found = digest(get_parameter(lm.model, delta.parameter))
            if found != delta.before:
                raise EditkitError(
                    f"This edit was computed for '{self.base.name}' with {delta.parameter} = {delta.before[:12]}; "
                    f"the weight in '{lm.name}' is {found[:12]}. Load the base it was made for (dtype "
                    f"{self.base.dtype}), and restore other edits first. The same base in another dtype takes "
                    "edit.in_dtype_of(lm)."
                )
        if whole and self.base.digest != (found := lm.digest):
            raise EditkitError(
                f"This edit was computed for '{self.base.name}' with digest {self.base.digest[:12]}; '{lm.name}' is "
                f"{found[:12]}: other weights than the edited ones differ. Load the base it was made for."
            )

    def apply(self, lm: LanguageModel, *, check: bool = True, everything: bool | None = None) -> Snapshot:
        """Write the edit into the model and return the snapshot that undoes it (`restore()`, `verify()`).

        W + ΔW is added in float32 (float64 for float64 weights) and cast once to the weight's dtype. If
        anything fails, the weights are put back before the exception leaves. `check=False` skips
        the comparison with the base; `everything` is that of `Snapshot.take`. Warns of an update larger than its
        weight. Raises EditkitError for another base or a result that is not finite.
        """
        if check:
            self.check_base(lm)
        snapshot = Snapshot.take(lm.model, self.parameters, everything=everything)
        try:
            with torch.no_grad():
                for delta in self.deltas:
                    weight = get_parameter(lm.model, delta.parameter)
                    dtype = wide(weight.dtype)
                    changed = (weight.to(dtype) + delta.matrix().to(weight.device, dtype)).to(weight.dtype)
                    if not changed.isfinite().all():
                        raise EditkitError(
                            f"The edited {delta.parameter} is not finite in {weight.dtype}; the model was left as it "
                            "was. Lower the clamp or the learning rate, or load the model in float32."
                        )
                    if (size := delta.norm()) > (whole := weight.float().norm().item()):
                        warnings.warn(
                            f"the update of {delta.parameter} is larger than the weight (‖ΔW‖ {size:.3g}, ‖W‖ "
                            f"{whole:.3g}): edits of this size usually break the model",
                            stacklevel=2,
                        )
                    weight.copy_(changed)
        except BaseException:
            snapshot.restore()
            raise
        return snapshot

    def in_dtype_of(self, lm: LanguageModel) -> "Edit":
        """This edit for `lm`, the same base loaded in another dtype: an edit of float32 weights on bfloat16 ones.

        That the weights are the same but for rounding cannot be read off a digest: whoever calls this vouches for it.
        The former base stays in `provenance["computed_for"]`. Raises EditkitError when the dtypes are equal, or a
        weight has another name, shape or orientation.
        """
        if base_of(lm).dtype == self.base.dtype:
            raise EditkitError(
                f"'{lm.name}' and the base of this edit are both {self.base.dtype}: apply the edit as it is."
            )
        deltas = tuple(_delta(lm, each.module, each.left, each.right) for each in self.deltas)
        for old, new in zip(self.deltas, deltas, strict=True):
            if (old.orientation, old.bias) != (new.orientation, new.bias):
                raise EditkitError(
                    f"{old.module} is stored {old.orientation} with bias={old.bias} in the base of this edit, and "
                    f"{new.orientation} with bias={new.bias} in '{lm.name}': another model, not another dtype."
                )
        how = self.provenance | {"computed_for": asdict(self.base)}
        return replace(self, deltas=deltas, base=base_of(lm), provenance=how)

    @contextlib.contextmanager
    def applied(self, lm: LanguageModel, *, check: bool = True, everything: bool | None = None) -> Iterator["Applied"]:
        """The edited model inside the `with`; the original, restored and verified, after it.

        Restores on every exit, exceptions and Ctrl-C included. The yielded `Applied` holds the reversal
        report once the body has ended. Raises ReversalError if any bit differs.
        """
        snapshot = self.apply(lm, check=check, everything=everything)
        state = Applied(snapshot)
        try:
            yield state
        except BaseException:
            snapshot.restore()
            raise
        snapshot.restore()
        state.reversal = snapshot.verify().require()

    def to_peft(self, folder: str | Path, rank: int | None = None) -> dict[str, float]:
        """Write a LoRA adapter that peft loads onto the untouched base; see `peft_folder.write_adapter`."""
        from editkit.edits.peft import write_adapter

        return write_adapter(self, Path(folder), rank)

    # --- saving ---------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """The file's bytes: the same edit always gives the same bytes."""
        tensors, rows = {}, []
        for number, delta in enumerate(self.deltas):
            tensors[f"{number}.left"] = delta.left.float().contiguous().cpu()
            if delta.right is not None:
                tensors[f"{number}.right"] = delta.right.float().contiguous().cpu()
            row = {k: getattr(delta, k) for k in ("module", "orientation", "bias", "before")}
            rows.append(row | {"dense": delta.right is None})
        tensors |= {f"memory.{name}": tensor.float().contiguous().cpu() for name, tensor in self.memory.items()}
        header = {
            "format": FORMAT,
            "base": asdict(self.base),
            "deltas": rows,
            "parents": list(self.parents),
            "provenance": self.provenance,
        }
        # One key only: safetensors does not keep the order of several.
        return save_tensors(tensors, metadata={"editkit": json.dumps(header, sort_keys=True)})

    def save(self, path: str | Path) -> Path:
        """Write the edit to `path`, whole or not at all. Raises OutputError when it cannot be written."""
        return write_bytes(Path(path), self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> "Edit":
        """Read an edit. Raises EditFileError for a missing, corrupt or foreign file."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise EditFileError(f"No edit can be read from '{path}': {error.strerror}.") from error
        header = _header(data, path)
        try:
            tensors = load_tensors(data)
            deltas = tuple(
                Delta(
                    left=tensors[f"{i}.left"],
                    right=None if row.pop("dense", False) else tensors[f"{i}.right"],
                    **row,
                )
                for i, row in enumerate(header["deltas"])
            )
            memory = {name.removeprefix("memory."): t for name, t in tensors.items() if name.startswith("memory.")}
            return cls(deltas, Base(**header["base"]), header["provenance"], tuple(header["parents"]), memory)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise EditFileError(
                f"'{path}' is damaged: {type(error).__name__}: {error}. Compute the edit again, or copy it again."
            ) from error


@dataclass
class Applied:
    """What `Edit.applied` yields: the snapshot, and after the `with` the verified `reversal`."""

    snapshot: Snapshot
    reversal: Reversal | None = None


def low_rank_delta(lm: LanguageModel, module: str, left: Tensor, right: Tensor) -> Delta:
    """A Delta for `module` of `lm` as it is now, from left [d_model, r] and right [r, d_ff].

    Factors that hold more numbers than their product are multiplied out. Raises EditkitError when a factor is not
    finite or does not fit the weight.
    """
    if left.ndim == right.ndim == 2 and left.numel() + right.numel() > left.shape[0] * right.shape[1]:
        return dense_delta(lm, module, left @ right)
    return _delta(lm, module, left, right)


def dense_delta(lm: LanguageModel, module: str, matrix: Tensor) -> Delta:
    """A Delta for `module` of `lm` as it is now, from ΔW [d_model, d_ff]. Raises as `low_rank_delta` does."""
    return _delta(lm, module, matrix, None)


def _delta(lm: LanguageModel, module: str, left: Tensor, right: Tensor | None) -> Delta:
    found = get_module(lm.model, module)
    weight = get_parameter(lm.model, f"{module}.weight")
    kind = orientation(found, module)
    d_ff, d_model = weight.shape if kind == "in_out" else reversed(weight.shape)
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
    bias = getattr(found, "bias", None) is not None
    right = None if right is None else right.float().cpu()
    return Delta(module, left.float().cpu(), right, kind, bias, digest(weight))


def base_of(lm: LanguageModel) -> Base:
    """The identity of `lm` as it is now."""
    return Base(lm.name, lm.digest, str(lm.dtype).removeprefix("torch."))


def weight_norm(lm: LanguageModel, edit: Edit) -> float:
    """‖W‖ over the parameters that the edit changes (Frobenius), for ‖ΔW‖/‖W‖."""
    return sum(get_parameter(lm.model, name).double().norm().item() ** 2 for name in edit.parameters) ** 0.5


def _header(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON of the file's header, or EditFileError saying in what way the file is not an edit."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (struct.error, ValueError, AttributeError) as error:
        raise EditFileError(f"'{path}' is not a safetensors file, or is cut short. Compute the edit again.") from error
    if "editkit" not in metadata:
        raise EditFileError(
            f"'{path}' is a safetensors file, but not an edit of editkit: it has no 'editkit' entry. "
            "Edits are written by edit.save(path) and as edit.safetensors in a run folder."
        )
    header = json.loads(metadata["editkit"])
    if header.get("format") != FORMAT:
        raise EditFileError(
            f"'{path}' has format {header.get('format')!r}; this editkit reads {FORMAT!r}. Update editkit."
        )
    return header
