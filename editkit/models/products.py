"""Matrix products by oneDNN, where torch's own take half of what the processor can do.

On x86 torch hands a float32 product to MKL, which uses no 512-bit instructions on processors that are not Intel's.
oneDNN, which comes with torch too, does: on an AMD EPYC with AVX-512, one core went at 110 GFLOP/s for a large product
by MKL and at 240 by oneDNN, and at 95 and 220 for the 66 rows of one fact. Both sum in float32, in another order.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

FEWEST = 8  # rows of x; with fewer the time is that of reading the weight, by either
PLAIN = (Tensor, nn.Parameter)  # other kinds of tensor have products of their own


@contextlib.contextmanager
def quick_products() -> Iterator[None]:
    """In the body, products of float32 rows with a frozen weight on the CPU are oneDNN's, where that is the faster.

        @quick_products()
        def run(...): ...                     # or `with quick_products(): ...`

    All else is left alone: other devices and dtypes, weights that take a gradient, processors for which MKL is as
    fast. Backward may run once only, and may run after the body.
    """
    if not faster():
        yield
        return
    with _Products():
        yield


@cache
def faster() -> bool:
    """Whether oneDNN's products are the faster ones here. It depends on the machine alone, so that two processes on
    one machine give the same bits."""
    backends = torch.backends
    ours = backends.mkldnn.is_available() and backends.mkl.is_available() and hasattr(torch.ops.mkldnn, _OP)
    return ours and backends.cpu.get_cpu_capability() == "AVX512" and "AMD" in _vendor()


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of bfloat16, so that they are faster than float32's."""
    named = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for them
    return dtype == torch.bfloat16 and any(getattr(torch.cpu, name, bool)() for name in named)


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., d_in] weightᵀ + bias [.., d_out], for a weight [d_out, d_in] that takes no gradient."""
    product: Callable[..., Tensor] = _Product.apply
    return product(x, weight, bias)


_OP = "_linear_pointwise"  # what torch.compile turns a linear layer into


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = getattr(torch.ops.mkldnn, _OP)(x, weight, bias, "none", [], "")
    return found


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("vendor_id")), "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(grad, weight.T, None), None, None


class _Products(TorchFunctionMode):
    """Takes nn.Linear's product and that of transformers' Conv1D, whose weight lies the other way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if _fits(x, weight, bias):
                return by_onednn(x, weight, bias)
        elif func is torch.addmm and not kwargs:
            bias, x, weight = args
            if bias.ndim == 1 and _fits(x, weight.T, bias):
                return by_onednn(x, weight.T, bias)
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this product is one of those that quick_products takes."""
    weights = [weight] if bias is None else [weight, bias]
    return (
        all(each.dtype == torch.float32 and each.device.type == "cpu" for each in (x, *weights))
        and all(type(each) in PLAIN for each in (x, *weights))
        and x.numel() >= FEWEST * x.shape[-1] > 0
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in weights))
    )
