"""What the tests of the hook layer and of what is built on it share: sites, texts, small functions of a model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.testing.tiny import SITES

IDS = torch.arange(2, 16).view(2, 7)
MLP = "transformer.h.1.mlp"
DOWN = "transformer.h.1.mlp.c_proj"
BLOCKS = [f"transformer.h.{i}" for i in range(3)]
TEXTS = ["The Eiffel Tower is in Paris", "Rain", "The capital of the country France is the city of", "A cloud is fog."]


def logits(model: Callable[..., Any], ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output * torch.linspace(-1, 1, output.shape[-1])).pow(2).mean()


def uneven(h: torch.Tensor) -> torch.Tensor:
    """A change that no normalisation takes out again."""
    return h + torch.linspace(-1, 1, h.shape[-1], dtype=h.dtype) ** 3


def sites_of(family: str) -> list[str]:
    named = SITES[family]
    return [named.block.format(1), named.mlp_of(0), named.attention.format(2)]


@contextlib.contextmanager
def by_hand(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """{site: output of its last run}, through plain torch hooks."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for site in sites:

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any, site: str = site) -> None:
            seen[site] = output[0] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(site).register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def batch_of(lm: LanguageModel, texts: Sequence[str] = TEXTS) -> dict[str, torch.Tensor]:
    rows = tokenise(lm, texts)
    return rows.inputs() | {"labels": rows.ids.masked_fill(rows.mask == 0, -100)}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.allclose(a[name], b[name], atol=tolerance, rtol=1e-4), name
