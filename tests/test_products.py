"""oneDNN's products in place of MKL's: the same numbers and gradients, and only where nothing else is lost."""

from collections.abc import Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from editkit.models import products
from editkit.models.products import quick_products

M = TypeVar("M", bound=nn.Module)
needed = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, products._OP)), reason="no oneDNN here"
)


class Seen(TorchDispatchMode):
    """How many products oneDNN was asked for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "mkldnn" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a processor where oneDNN is the faster."""
    monkeypatch.setattr(products, "faster", lambda: True)
    yield


def frozen(layer: M) -> M:
    return layer.requires_grad_(False)


@needed
@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
@pytest.mark.parametrize("shape", [(9, 24), (3, 5, 24)])
def test_the_same_product_and_gradient(layer: nn.Module, shape: tuple[int, ...], here: None) -> None:
    frozen(layer)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    up = torch.randn(*shape[:-1], 40, generator=torch.Generator().manual_seed(1))
    found = []
    for quick in (False, True):
        leaf = x.clone().requires_grad_()
        with Seen() as seen:
            if quick:
                with quick_products():
                    out = layer(leaf)
            else:
                out = layer(leaf)
            (grad,) = torch.autograd.grad((out * up).sum(), leaf)  # outside of the body
        assert seen.count == (2 if quick else 0)
        found.append((out.detach(), grad))
    for plain, other in zip(*found, strict=True):
        assert torch.allclose(other, plain, rtol=1e-5, atol=1e-6)


@needed
def test_what_it_leaves_alone(here: None) -> None:
    layer, rows = frozen(nn.Linear(24, 40)), torch.randn(9, 24)
    keyword = torch.randn(40, 24)
    learning = nn.Linear(24, 40)
    double = frozen(nn.Linear(24, 40, dtype=torch.float64))
    with quick_products(), Seen() as seen:
        layer(rows[:2])  # too few rows
        double(rows.double())
        out = learning(rows)  # the weight's gradient is wanted
        linear(rows, weight=keyword)
    assert seen.count == 0
    out.sum().backward()
    assert learning.weight.grad is not None
    with quick_products(), Seen() as seen, torch.no_grad():
        learning(rows)  # now no gradient is wanted
    assert seen.count == 1


@needed
def test_where_it_is_not_the_faster_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "faster", lambda: False)
    with quick_products(), Seen() as seen:
        frozen(nn.Linear(24, 40))(torch.randn(9, 24))
    assert seen.count == 0


def test_it_depends_on_the_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, bool] = {}
    for vendor in ("vendor_id\t: AuthenticAMD", "vendor_id\t: GenuineIntel", ""):
        monkeypatch.setattr(products, "_vendor", lambda vendor=vendor: vendor)
        products.faster.cache_clear()
        answers[vendor] = products.faster()
        assert products.faster() == answers[vendor]
    products.faster.cache_clear()
    assert answers["vendor_id\t: GenuineIntel"] is answers[""] is False


def test_a_product_of_tensors_that_are_not_plain_is_theirs(here: None) -> None:
    class Own(Tensor):
        pass

    rows = torch.randn(9, 24).as_subclass(Own)
    with quick_products(), Seen() as seen:
        assert isinstance(frozen(nn.Linear(24, 40))(rows), Own)
    assert seen.count == 0
