"""Rank correlation with an interval (Spearman 1904; percentile bootstrap, Efron 1979)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from editkit.errors import EditkitError


def rank_correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None = None, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's ρ of two lists with its 95 % bootstrap interval: (ρ, low, high).

    `groups`: what is drawn together, such as the edit that pairs belong to; None: each pair is drawn alone. Raises
    EditkitError for unequal lengths or fewer than three pairs.
    """
    if not len(x) == len(y) == len(groups if groups is not None else x) or len(x) < 3:
        raise EditkitError(f"A rank correlation of {len(x)} and {len(y)} values: give as many of both, 3 or more.")
    a, b = (torch.tensor(list(map(float, each)), dtype=torch.float64) for each in (x, y))
    names = list(groups) if groups is not None else list(range(len(x)))
    members: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    each = [torch.tensor(found) for found in members.values()]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        picked = torch.cat([each[i] for i in torch.randint(len(each), (len(each),), generator=generator).tolist()])
        drawn.append(spearman(a[picked], b[picked]))
    low, high = torch.tensor(drawn, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return spearman(a, b), low, high


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's ρ of two lists [n], without pairs in which one is NaN; NaN where one list is constant."""
    both = ~(x.isnan() | y.isnan())
    return torch.corrcoef(torch.stack([ranks(x[both]), ranks(y[both])]))[0, 1].item()


def ranks(x: Tensor) -> Tensor:
    """[n] from 0; equal values share the mean of theirs."""
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    shared: Tensor = (last - (counts.double() + 1) / 2)[inverse]
    return shared
