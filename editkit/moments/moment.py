"""SecondMoment: C = E[k kᵀ] with its count, its file and its health."""

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.models.snapshot import digest
from editkit.moments.experts import FactoredExperts
from editkit.moments.factored import Factored, cholesky
from editkit.shown import SHORT, Rows, Shown
from editkit.tensorfiles import FileKind, explained, read_tensors, write_tensors

_ORIGIN = "Files of the reference (.npz) come in through `python -m editkit.moments import`."
MOMENT_FILE = FileKind(
    format="editkit-moment/1",
    noun="a second moment",
    fields={
        "module": (str,),
        "count": (int,),
        "source": (str,),
        "effective_count": (float, int, type(None)),
        "d_ff": (int,),
        "digest": (str,),
        "provenance": (dict,),
    },
    remedy="Delete it and collect again.",
    origin=_ORIGIN,
    renew="SecondMoment.load(path).save(path)",
)
PARTIAL_FILE = FileKind(  # the state of a collection that is under way, or was killed: collect.py
    format="editkit-moment-partial/1",
    noun="an unfinished collection of second moments",
    fields={
        "model": (str,),
        "model_digest": (str,),
        "settings": (dict,),
        "seed": (int,),
        "count": (int,),
        "documents": (int,),
        "modules": (list,),
    },
    remedy="Delete it: the collection starts again.",
    origin=_ORIGIN,
    renew="continue the collection",
)
SHARD_FILE = replace(  # one share of a collection over several processes, under way or finished: shards.py
    PARTIAL_FILE,
    format="editkit-moment-shard/1",
    noun="one share of a collection of second moments",
    fields=dict(PARTIAL_FILE.fields) | {"share": (list,), "finished": (bool,)},
    remedy="Delete it: this share is collected again.",
)
ENOUGH = 2  # keys per dimension of d_ff; 2 to 10 suffice (arXiv 2506.04226)
KEPT = 2**30  # bytes of a factor up to which it is kept
TOLERANCE = 1e-6  # of C's largest entry or eigenvalue: what sums in float32 leave, as the reference's files have


@dataclass(frozen=True, eq=False, repr=False)
class SecondMoment(Shown):
    """C = E[k kᵀ] [d_ff, d_ff] in float64, uncentred, over `count` keys at `module`.

    Of a mixture of experts only the diagonal blocks [E, d_ff, d_ff], and `routed` counts the keys of each (experts.py).
    `provenance` is JSON: model, its digest, settings, seed.
    """

    module: str
    matrix: Tensor
    count: int
    source: str
    effective_count: float | None = None  # (Σ‖k‖²)² / Σ‖k‖⁴ (Kish 1965): keys that carry C; None where it is unknown
    provenance: dict[str, Any] = field(default_factory=dict)
    routed: tuple[int, ...] = ()  # how many of the tokens each expert had; empty for a single down-projection

    def shown(self) -> tuple[str, Rows]:
        """Where it was collected, from how many keys, of which text and model."""
        experts = (
            [("experts", f"{len(self.routed)}, with {min(self.routed):,} keys or more each")] if self.routed else []
        )
        keys = f"{self.count:,}, {self.vectors_per_dimension:.3g} a dimension of {self.d_ff:,}"
        model = f"{self.provenance.get('model', '?')}, digest {self.provenance.get('model_digest', '?')[:SHORT]}"
        rows = [("module", self.module), ("keys", keys), *experts, ("source", self.source), ("model", model)]
        return "SecondMoment", rows

    @property
    def d_ff(self) -> int:
        return self.matrix.shape[-1]

    @functools.cached_property
    def vectors_per_dimension(self) -> float:
        """Keys per dimension of d_ff: 2 to 10 suffice (arXiv 2506.04226); below 1, C is singular. Of experts, those of
        the expert that had the fewest."""
        return min(self.routed, default=self.count) / self.d_ff

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """[d_ff], or of experts [E · d_ff], ascending."""
        values: Tensor = torch.linalg.eigvalsh(self.matrix).flatten().sort().values
        return values

    @functools.cached_property
    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [d_ff], ascending, and their vectors [d_ff, d_ff], a column each; of experts, of each block."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    @functools.cached_property
    def _factors(self) -> dict[float, "Factored"]:
        return {}

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue, without a ridge; infinite where C is singular."""
        smallest, largest = self.eigenvalues[0].item(), self.eigenvalues[-1].item()
        return largest / smallest if smallest > 0 else math.inf

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues' shares (Roy and Vetterli 2007): from 1 to d_ff."""
        share = self.eigenvalues.clamp_min(0)
        return float(torch.special.entr(share / share.sum()).sum().exp())

    @property
    def digest(self) -> str:
        """sha256 of the count and of the bits of C."""
        return hashlib.sha256(f"{self.count} {digest(self.matrix)}".encode()).hexdigest()

    def factor(self, ridge: float = 0.0) -> "Factored":
        """Cholesky factor of C + ridge · mean(diag C) · I, made once and kept, unless it is a large one (`keeps`).

        Raises EditkitError when it is not positive definite, saying how many keys there were.
        """
        if ridge in self._factors:
            return self._factors[ridge]
        found = self._factored(ridge)
        if self.keeps:
            self._factors[ridge] = found
        return found

    @property
    def keeps(self) -> bool:
        """Whether `factor` keeps what it makes: of Llama-3-8B one factor takes 1.6 GB."""
        return 8 * self.d_ff**2 <= KEPT

    def _factored(self, ridge: float) -> "Factored":
        shift = ridge * self.matrix.diagonal(dim1=-2, dim2=-1).mean().item()
        if self.routed:
            return FactoredExperts(self.module, self.matrix, shift, self.routed)
        lower, failed = cholesky(self.matrix, shift)
        if failed:
            raise EditkitError(
                f"The second moment at {self.module} is singular: {self.count} keys for {self.d_ff} dimensions, ridge "
                f"{ridge:g}. Collect at least {ENOUGH * self.d_ff} (moments.tokens), or set moments.ridge to 1e-4 or "
                "more."
            )
        return Factored(lower)

    def faults(self) -> list[str]:
        """What makes this no second moment: an empty list where nothing does."""
        if self.count < 1:
            return [f"its count is {self.count}"]
        if self.matrix.ndim != 2 + bool(self.routed) or self.matrix.shape[-2] != self.d_ff:
            return [f"its shape {list(self.matrix.shape)} is not square"]
        if bad := int((~self.matrix.isfinite()).sum()):
            return [f"{bad} of its {self.matrix.numel()} entries are not finite"]
        found = []
        asymmetry, largest = (self.matrix - self.matrix.mT).abs().max().item(), self.matrix.abs().max().item()
        if asymmetry > TOLERANCE * largest:
            found.append(f"it is not symmetric: C and its transpose differ by up to {asymmetry:.2g}")
        smallest, top = self.eigenvalues[0].item(), self.eigenvalues[-1].item()
        if top <= 0 or smallest < -TOLERANCE * top:
            found.append(f"it is not positive semi-definite: eigenvalues from {smallest:.2g} to {top:.2g}")
        return found

    def save(self, path: Path | str) -> Path:
        """Write a safetensors file: C, and everything else as JSON in its header. Raises OutputError."""
        header = {
            "module": self.module,
            "count": self.count,
            "source": self.source,
            "effective_count": self.effective_count,
            "d_ff": self.d_ff,
            "digest": self.digest,
            "provenance": self.provenance,
        }
        tensors = {"matrix": self.matrix} | ({"routed": torch.tensor(self.routed)} if self.routed else {})
        return write_tensors(path, MOMENT_FILE, header, tensors)

    @classmethod
    def load(cls, path: Path | str) -> "SecondMoment":
        """Read a file that `save` wrote. Raises EditFileError when it is missing, another kind of file, or damaged.

        Warns of a file that was written before files had a digest of all their contents.
        """
        header, tensors = read_tensors(path, MOMENT_FILE)
        with explained(path, MOMENT_FILE):
            kept = {k: header[k] for k in ("module", "count", "source", "effective_count", "provenance")}
            matrix, routed = tensors["matrix"], tensors.get("routed", torch.empty(0, dtype=torch.int64))
            blocks = () if "routed" not in tensors else (len(routed),)
            shape = (*blocks, header["d_ff"], header["d_ff"])
            if len(tensors) != 1 + len(blocks) or matrix.dtype != torch.float64 or matrix.shape != shape:
                raise ValueError(f"its tensors are not one matrix of {header['d_ff']} dimensions in float64")
            moment = cls(matrix=matrix, routed=tuple(routed.tolist()), **kept)
            if moment.digest != header["digest"]:
                raise ValueError(f"its values have digest {moment.digest[:16]}, and not {header['digest'][:16]}")
        return moment
