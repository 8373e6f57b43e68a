"""Quantised weights: how to read them, and two ways to edit them. Neither way writes them.

A quantised module keeps its weight W [d_out, d_in] as small integers ("codes") and scales that make numbers of them:

    bitsandbytes   Linear8bitLt   int8 codes, SCB [d_out]: W = codes · SCB / 127. Its inputs are cast to int8 too.
                   Linear4bit     two codes in a byte, a code book, absmax of each block of 64 weights; with double
                                  quantisation absmax is itself codes, with an offset and scales of its own
    torchao        nn.Linear with a weight of a tensor class that holds codes, scales and zero points

Two ways to change W by ΔW:

    adapter   `Beside` takes the module's place: base(x) + ΔW x, with ΔW in float32
    wide      a plain nn.Linear takes its place, with W + ΔW in the model's own dtype

The quantised module itself waits, and is put back to undo the edit (snapshot.py). Any other quantised module (GPTQ,
AWQ, …) can be edited by the adapter way, for which it only has to be called.

Nothing here imports bitsandbytes or torchao: without them there are no such modules.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from editkit.errors import ModelError
from editkit.nethook import get_module

WAYS = ("adapter", "wide")
UNITS = 256  # unit vectors that a module of another kind is asked for at once, to read its W


class Beside(nn.Module):
    """A quantised module, left as it is, with ΔW beside it: base(x) + ΔW x.

    - `base`: the module, or another `Beside`.
    - `left`, `right`: ΔW = left [d_out, r] @ right [r, d_in]; without `right`, ΔW [d_out, d_in] itself is in `left`.
    """

    def __init__(self, base: nn.Module, left: Tensor, right: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        device = next(iter(storage_of(base).values())).device
        self.left = _frozen(left.to(device, torch.float32, copy=True))
        self.right = None if right is None else _frozen(right.to(device, torch.float32, copy=True))
        self.in_features, self.out_features = _sizes(base)
        self.train(base.training)

    @property
    def bias(self) -> Tensor | None:
        """That of the base."""
        found: Tensor | None = getattr(self.base, "bias", None)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[.., d_out] from x [.., d_in]; ΔW x is computed in float32."""
        given = x.float()
        change = linear(given if self.right is None else linear(given, self.right), self.left)
        output: Tensor = self.base(x)
        return output + change.to(output.dtype)

    def change(self) -> Tensor:
        """ΔW [d_out, d_in] in float32, of this one alone."""
        return self.left.detach() if self.right is None else self.left.detach() @ self.right.detach()


def scheme_of(module: nn.Module) -> str | None:
    """How the module's weight is quantised: "bnb-8bit", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int4", or the
    name of another kind's class; None for a module that is not quantised."""
    if isinstance(module, Beside):
        return scheme_of(module.base)
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ == "Int8Params":
        return "bnb-8bit"
    if type(weight).__name__ == "Params4bit":
        return f"bnb-{weight.quant_type}"
    if _of_torchao(weight):
        return f"torchao-{str(getattr(weight, 'target_dtype', weight.qdata.dtype)).removeprefix('torch.')}"
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    own = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
    packed = any(tensor.element_size() == 1 or not tensor.is_floating_point() for tensor in own)
    return type(module).__name__ if packed and all(isinstance(size, int) for size in sizes) else None


def is_quantized(module: nn.Module) -> bool:
    """Whether the module's weight is quantised; of a `Beside`, that of its base."""
    return scheme_of(module) is not None


def scheme_in(model: nn.Module) -> str | None:
    """The schemes of a model's modules, such as "bnb-nf4"; several are joined by "+". None: nothing is quantised."""
    return "+".join(sorted({scheme for module in model.modules() if (scheme := scheme_of(module))})) or None


def stored_tensors(module: nn.Module) -> dict[str, Tensor] | None:
    """The tensors that hold W where they are not all parameters and buffers of the module, by name in it: codes and
    quantisation state. None for any other module."""
    weight: Any = module._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Int8Params":  # its scales move from the weight to the module in the first forward pass
        scales = weight.SCB if weight.SCB is not None else getattr(module, "state").SCB  # noqa: B009
        return _there({"weight": weight.data, "weight.SCB": scales})
    if kind == "Params4bit":
        state = weight.quant_state
        found = {"weight": weight.data, "weight.absmax": state.absmax, "weight.code": state.code}
        if state.nested:
            found |= {"weight.offset": state.offset, "weight.nested_absmax": state.state2.absmax}
            found |= {"weight.nested_code": state.state2.code}
        return _there(found)
    if _of_torchao(weight):
        return {f"weight.{name}": getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
    return None


def storage_of(module: nn.Module) -> dict[str, Tensor]:
    """All tensors that hold W in a quantised module, by name in it; of a `Beside` also ΔW."""
    if isinstance(module, Beside):
        own = {"left": module.left.data} | ({} if module.right is None else {"right": module.right.data})
        return {f"base.{name}": tensor for name, tensor in storage_of(module.base).items()} | own
    found = stored_tensors(module)
    if found is None:
        every = [*module.named_parameters(), *module.named_buffers()]
        found = {name: tensor.detach() for name, tensor in every if name != "bias"}
    return found


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """W [d_out, d_in] of a quantised module, in float32; of a `Beside` W + ΔW.

    Of a kind that is not known here, W is what the module gives for unit vectors, less its bias.
    """
    if isinstance(module, Beside):
        return dequantized(module.base) + module.change()
    weight: Any = module._parameters.get("weight")
    kind = type(weight).__name__
    if kind == "Int8Params":
        stored = storage_of(module)
        return stored["weight"].float() * (stored["weight.SCB"].float() / 127)[:, None]
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return found.float()
    if _of_torchao(weight):
        values: Tensor = weight.dequantize()
        return values.float()
    return _by_unit_vectors(module)


def edited_module(
    module: nn.Module, left: Tensor, right: Tensor | None, way: str, dtype: torch.dtype, name: str
) -> nn.Module:
    """What takes the place of a quantised module whose weight is changed by ΔW. The module is not written.

    - `module`: quantised, or a `Beside`. `name`: what it is called in the model.
    - `left`, `right`: ΔW, as `Beside` takes it.
    - `way`: one of WAYS. `dtype`: that of the activations, and of a wide weight.

    Raises ModelError for the wide way of a kind whose W cannot be read from its tensors.
    """
    if way == "adapter":
        return Beside(module, left, right)
    if not _is_readable(module):
        raise ModelError(
            f"model.edited=wide was asked for, and {name} is a {scheme_of(module)}, whose weight editkit does not "
            "unpack. Use model.edited=adapter, which adds the edit beside it."
        )
    weight = dequantized(module)
    change = left if right is None else left @ right
    d_in, d_out = _sizes(module)
    wide = nn.Linear(d_in, d_out, bias=False, device="meta")
    wide.weight = _frozen((weight + change.to(weight.device, weight.dtype)).to(dtype))
    bias: Any = getattr(module, "bias", None)
    wide.bias = bias  # the same object
    return wide.train(module.training)


def trainable_module(module: nn.Module, way: str, dtype: torch.dtype, name: str) -> tuple[nn.Module, str]:
    """What takes the place of a quantised module while its weight is trained, and the name in it of the dense parameter
    to train: ΔW, which is 0, or all of W. Arguments and errors are those of `edited_module`."""
    d_in, d_out = _sizes(module)
    nothing = torch.zeros(d_out, d_in)
    return edited_module(module, nothing, None, way, dtype, name), "left" if way == "adapter" else "weight"


def quantized_again(model: nn.Module, name: str, weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """A wide weight quantised as that of the module `name` was: (its values in float32 [d_out, d_in], its codes).

    `weight` [d_out, d_in] in float32. None where editkit does not know the quantiser (GPTQ and AWQ need texts).
    """
    module = get_module(model, name)
    while isinstance(module, Beside):
        module = module.base
    held: Any = module._parameters.get("weight")
    kind = type(held).__name__
    if kind == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return codes.float() * (scales.float() / 127)[:, None], codes
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        state = held.quant_state
        packed, found = quantize_4bit(
            weight.contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
        )
        return dequantize_4bit(packed, found).float(), torch.cat((packed >> 4, packed & 15), 1)
    settings: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if _of_torchao(held) and hasattr(settings, "get_apply_tensor_subclass"):
        from torchao.quantization import quantize_

        again = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        again.weight = _frozen(weight.to(held.dtype))
        quantize_(again, settings.get_apply_tensor_subclass())
        found_again: Any = again.weight
        return found_again.dequantize().float(), found_again.qdata
    return None


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out)."""
    found: Any = module
    return found.in_features, found.out_features


def quantized_shape(module: nn.Module) -> torch.Size:
    """[d_out, d_in] of a quantised module's weight, which may be stored in another shape."""
    return torch.Size(_sizes(module)[::-1])


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _of_torchao(weight: Any) -> bool:
    return weight is not None and type(weight).__module__.startswith("torchao.") and hasattr(weight, "qdata")


def _is_readable(module: nn.Module) -> bool:
    """Whether W can be read from the tensors that hold it."""
    return _is_readable(module.base) if isinstance(module, Beside) else stored_tensors(module) is not None


def _there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, or ModelError where they have no values here."""
    if any(tensor is None or tensor.is_meta for tensor in tensors.values()):
        raise ModelError(
            "A quantised weight is offloaded: it has no values to read. Give its block a device in model.device_map."
        )
    return tensors


def _by_unit_vectors(module: nn.Module) -> Tensor:
    """W [d_out, d_in] from what the module gives for unit vectors."""
    floating = [each for each in storage_of(module).values() if each.is_floating_point() and each.element_size() > 1]
    bias: Tensor | None = getattr(module, "bias", None)
    like = bias if bias is not None else floating[0] if floating else torch.zeros((), dtype=torch.float16)
    device = next(iter(storage_of(module).values())).device
    units = torch.eye(_sizes(module)[0], dtype=like.dtype, device=device)
    found = torch.cat([module(some).float() for some in units.split(UNITS)])
    return (found if bias is None else found - bias.float()).T.contiguous()
