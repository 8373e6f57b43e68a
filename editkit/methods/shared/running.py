"""Mean and variance of [h; g] over all tokens of a session ("lifelong normalisation"), and the covariance of g.

Batches are merged one by one (Chan, Golub and LeVeque 1979). What a batch adds is rounded to float32, as it is saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from editkit.methods.shared.gradients import Pairs

TINY = torch.finfo(torch.float32).eps  # added to standard deviations, as in the authors' code


@dataclass(frozen=True, eq=False)
class Running:
    """Over `count` tokens of [h; g], h [p] and g [q], in float64.

    - `mean`, `squares` [p + q]: the mean, and Σ (x − mean)².
    - `products` [q, q]: Σ (g − mean)(g − mean)ᵀ; None where it is not kept.
    """

    count: int
    mean: Tensor
    squares: Tensor
    products: Tensor | None = None

    @classmethod
    def read(cls, memory: Mapping[str, Tensor], name: str) -> "Running":
        """Of the batch that `remembered` has put into an edit's memory under this name."""
        count, products = int(memory[f"{name}.count"].item()), None
        if (gradients := memory.get(f"{name}.gradients")) is not None:
            centred = gradients.double() - gradients.double().mean(0)
            products = centred.T @ centred
        return cls(count, memory[f"{name}.mean"].double(), memory[f"{name}.squares"].double(), products)

    def tensors(self) -> dict[str, Tensor]:
        """What `of` makes it of again, in float64."""
        found = {"count": torch.tensor([self.count]), "mean": self.mean, "squares": self.squares}
        return found if self.products is None else found | {"products": self.products}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Running":
        """From `tensors`, which are below this name."""
        mean, squares = (tensors[f"{name}.{part}"] for part in ("mean", "squares"))
        return cls(int(tensors[f"{name}.count"].item()), mean, squares, tensors.get(f"{name}.products"))

    def merged(self, other: "Running") -> "Running":
        """Of the tokens of both; with products where both have them."""
        count = self.count + other.count
        apart, share = other.mean - self.mean, self.count * other.count / count
        mean = self.mean + other.count / count * apart
        squares, products = self.squares + other.squares + share * apart.square(), None
        if self.products is not None and other.products is not None:
            of_g = apart[-len(self.products) :]
            products = self.products + other.products + share * torch.outer(of_g, of_g)
        return Running(count, mean, squares, products)

    def normalised(self, pairs: Pairs) -> Pairs:
        """ĥ and ĝ: how far h and g are from the mean, in standard deviations."""
        x = torch.cat(pairs, 1)
        scaled = (x - self.mean) / ((self.squares / (self.count - 1)).sqrt() + TINY)
        return Pairs(*scaled.split([each.shape[1] for each in pairs], 1))

    def whitened(self, gradients: Tensor, floor: float) -> Tensor | None:
        """(g − mean) Σ^(−½) [tokens, q], with Σ the covariance of g and its eigenvalues `floor` or more.

        None without products, or as long as the tokens are not more than q + 1.
        """
        q = gradients.shape[1]
        if self.products is None or self.count <= q + 1:
            return None
        values, vectors = torch.linalg.eigh(self.products / (self.count - q - 1))
        found: Tensor = (gradients - self.mean[-q:]) @ (vectors * values.clamp_min(floor).rsqrt()) @ vectors.T
        return found


def remembered(name: str, pairs: Pairs, *, products: bool) -> dict[str, Tensor]:
    """What an edit remembers of its batch, in float32. `products`: the gradients too."""
    x = torch.cat(pairs, 1)
    mean = x.mean(0)
    found = {"count": torch.tensor([len(x)]), "mean": mean, "squares": (x - mean).square().sum(0)}
    found |= {"gradients": pairs.gradients} if products else {}
    return {f"{name}.{what}": value.float() for what, value in found.items()}
