"""A pretended accelerator: tensors that say `pretended:0` or `:1`, hold CPU data, and refuse what CUDA refuses.

    with pretended.accelerator():
        model.to("pretended:0")
        with pretended.waits() as found:
            ...                     # found: every place where a GPU would have made the processor wait

torch has one device type for backends from outside ("PrivateUse1"), and lets Python be that backend. What is computed
is what the CPU computes, bit for bit, so an edit made here must equal the CPU's. What is refused is what CUDA refuses:

- tensors of two devices in one operation, but for CPU scalars in elementwise ones and CPU indices;
- `.numpy()`, pinning, and a generator of the CPU for random numbers.

What makes the processor wait for a GPU is counted, not refused: values that Python reads (`.item()`, `bool(tensor)`),
copies from and to the CPU that are not `non_blocking`, and results whose size depends on values (`nonzero`, boolean
masks). The registration is once for a process and changes nothing for tensors of other devices.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from editkit.models import head, precision, products

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
except ImportError:
    pytest.skip("this torch is too old for a device that is written in Python", allow_module_level=True)

NAME = "pretended"
DEVICES = 2

# An operation waits when its result, or whether it fails, depends on values: the processor has to read them.
READS = {
    "aten::_linalg_check_errors",
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# Made of other operations where a backend has no kernel of its own; a CPU and CUDA have one, with other rounding.
OWN_KERNELS = ("mish_backward", "native_channel_shuffle", "silu_backward")
INDEXED = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_unsafe_index.Tensor"} | {
    "aten::_index_put_impl_",
    "aten::_unsafe_index_put",
}


class Wait(NamedTuple):
    """One place where the processor waits for the accelerator."""

    kind: str  # read: values that Python or a size needs; down: a copy to the CPU; up: a copy from the CPU
    operation: str
    place: str  # the file and line outside of torch that asked for it


_counting: list[list[Wait]] = []  # the lists of the `waits` that are open


@contextlib.contextmanager
def waits() -> Iterator[list[Wait]]:
    """A list that is filled with the waits of the body."""
    found: list[Wait] = []
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.remove(found)


def _wait(kind: str, operation: str) -> None:
    if _counting:
        wait = Wait(kind, operation.removeprefix("aten::").split(".")[0], _place())
        for found in _counting:
            found.append(wait)


def _place() -> str:
    """The innermost line outside of torch and this file."""
    frame = sys._getframe()
    own, torch_home = __file__, str(Path(torch.__file__).parent)
    while frame.f_back and (frame.f_code.co_filename == own or frame.f_code.co_filename.startswith(torch_home)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class Pretended(Tensor):
    """A tensor of the pretended accelerator. `held` is the CPU tensor with its data; views share it as usual."""

    held: Tensor

    @staticmethod
    def __new__(
        cls, held: Tensor, device: torch.device | None = None, /, requires_grad: bool = False, **_: Any
    ) -> "Pretended":
        if isinstance(held, Pretended):  # accelerate makes a parameter so, of the class of the one it replaces
            return nn.Parameter(held, requires_grad)  # type: ignore[return-value]
        with torch.inference_mode(held.is_inference()):  # a view of a plain tensor is plain in inference mode too
            made: Pretended = torch.Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=device,
            )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, *args, **(kwargs or {}))

    # With these two, Module.to moves a parameter in place, and tied weights stay tied, as on CUDA.
    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: torch.device, size: Any, stride: Any) -> "Pretended":
        return Pretended(inner["held"], device)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretended):
            raise RuntimeError(f"incompatible tensor type: .data of {self.device} cannot be of {new.device}")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.held = new.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    __array__ = numpy

    def pin_memory(self, *_: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(f"cannot pin a tensor of {self.device}: only dense CPU tensors can be pinned")

    def share_memory_(self) -> "Pretended":
        return self  # as on CUDA, where nothing is to be done

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r}, device='{self.device}')"


class _Operation:
    """What is asked of each operation at every call, looked up once."""

    def __init__(self, func: Any) -> None:
        self.name: str = func.name()
        base = self.name.split(".")[0]
        self.copies, self.indexed = base in COPIES, self.name in INDEXED
        self.writes = base in COPIES and base != "aten::_to_copy"  # its result is its first argument
        self.reads = self.name in READS or base in READS
        self.scalars = torch.Tag.pointwise in func.tags or self.indexed or base in ("aten::where", "aten::fill_")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(self.name, "CompositeImplicitAutograd")
        self.made_of_others = composite and base.removeprefix("aten::") not in OWN_KERNELS


_known = cache(_Operation)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation: what CUDA refuses is refused, what waits is counted, and the CPU computes it."""
    # 1) In inference mode operations arrive that are made of others; those are judged one by one.
    operation = _known(func)
    if operation.made_of_others:
        return func.decompose(*args, **kwargs)
    tensors = list(_tensors((args, kwargs)))
    ours = [each for each in tensors if isinstance(each, Pretended)]
    target = _device(kwargs["device"]) if kwargs.get("device") is not None else ours[0].device if ours else None

    # 2) Refusals, and waits.
    _check_devices(operation, args, tensors)
    _check_random(operation, kwargs)
    if _counting:
        _count(operation, args, kwargs, target)

    # 3) The same on the CPU. What comes back as it went in is the same tensor here too.
    held = {id(each.held): each for each in ours}
    cpu_args, cpu_kwargs = _mapped((args, kwargs), lambda each: each.held if isinstance(each, Pretended) else each)
    if cpu_kwargs.get("device") is not None:
        cpu_kwargs["device"] = torch.device("cpu")
    cpu_kwargs.pop("pin_memory", None)
    if operation.name == "aten::histc" and not cpu_args[0].is_floating_point():  # CUDA counts integers, a CPU does not
        result = func(cpu_args[0].double(), *cpu_args[1:], **cpu_kwargs).to(cpu_args[0].dtype)
    else:
        result = func(*cpu_args, **cpu_kwargs)
    for each in ours:
        if each.shape != each.held.shape:  # an `out=` that was given empty
            each.data = Pretended(each.held, each.device)
    if operation.writes:
        return args[0]

    def there(each: Tensor) -> Tensor:
        if (same := held.get(id(each))) is not None:
            return same
        each = each.resolve_conj().resolve_neg()  # a conjugate by a mark alone: operations called from here miss it
        return each if target is None or target.type == "cpu" else Pretended(each, target)

    return _mapped(result, there)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an operation's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments or the result of an operation, with `change` applied to each tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    return type(value)(_mapped(each, change) for each in value) if type(value) in (list, tuple) else value


def _device(device: Any) -> torch.device:
    """With its number. Raises RuntimeError for one that there is not."""
    found = torch.device(device)
    if found.type == NAME and found.index is None:
        found = torch.device(NAME, 0)
    if found.type == NAME and found.index >= DEVICES:
        raise RuntimeError(f"invalid device ordinal: {found}; there are {DEVICES}")
    return found


def _check_devices(operation: _Operation, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError for tensors of two devices, where CUDA does."""
    if operation.copies:
        return
    if operation.indexed:
        home = args[0].device
        indices = list(_tensors(args[1]))
        if wrong := [each.device for each in indices if each.device.type != "cpu" and each.device != home]:
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor ({home}), found one on "
                f"{wrong[0]}"
            )
        tensors = list(_tensors((args[0], args[2:])))
    devices = {
        each.device for each in tensors if not (operation.scalars and each.ndim == 0 and each.device.type == "cpu")
    }
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}! (in {operation.name})"
        )


def _check_random(operation: _Operation, kwargs: Any) -> None:
    if (generator := kwargs.get("generator")) is not None and generator.device.type != NAME:
        raise RuntimeError(
            f"Expected a '{NAME}' device type for generator but found '{generator.device.type}' ({operation.name})"
        )


def _count(operation: _Operation, args: Any, kwargs: Any, target: torch.device | None) -> None:
    """Note the operation where it waits."""
    if operation.reads:
        _wait("read", operation.name)
    elif operation.copies:
        to, source = (args[0].device, args[1]) if operation.writes else (target, args[0])
        without_waiting = kwargs.get("non_blocking", operation.writes and len(args) > 2 and args[2])
        if not without_waiting and source.device != to:
            _wait("up" if source.device.type == "cpu" else "down", operation.name)
    elif operation.indexed:
        for index in _tensors(args[1]):
            if isinstance(index, Pretended) and index.dtype == torch.bool:
                _wait("read", operation.name)
            elif index.device.type == "cpu" and args[0].device.type == NAME:
                _wait("up", operation.name)


_library: list[torch.library.Library] = []  # of the process; empty before it is registered


def register() -> None:
    """Make `pretended` a device of this process, once."""
    if _library:
        return
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hook())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_run, "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name in OWN_KERNELS:
        aten.impl(name, partial(_run, getattr(torch.ops.aten, name).default), "PrivateUse1")
    _library.extend((library, aten))


class _Module:
    """`torch.pretended`: what torch and other packages ask of `torch.cuda`."""

    def is_available(self) -> bool:
        return bool(_open)

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return DEVICES if _open else 0

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are the CPU's."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class _Hook(torch._C._acc.PrivateUse1Hooks):  # pyright: ignore[reportAttributeAccessIssue]
    """What `torch.accelerator` asks."""

    def is_available(self) -> bool:
        return bool(_open)

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, device_index: int) -> bool:
        return bool(_open)


_open: list[None] = []  # one for each `accelerator` that is open


@contextlib.contextmanager
def accelerator() -> Iterator[None]:
    """In the body this thread can use the devices `pretended:0` and `pretended:1`."""
    register()
    _open.append(None)
    # torch.tensor(..., device=…) makes a tensor on the CPU and moves it; backward stays in this thread, since torch
    # makes one thread for each device of a backend, and takes this one to have a single device.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _open.pop()


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """In the body the CPU computes as it does for the accelerator, so that their bits can be compared.

    Attention by its formula, not by the CPU's fused kernel; half precision as it is, not on float32 copies
    (models/precision.py); the head in one piece (models/head.py), and torch's own products (models/products.py).
    """
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(precision, "_places", lambda model: [])
        patch.setattr(head, "_by_pieces", lambda head, final: False)
        patch.setattr(products, "faster", lambda: False)
        patch.setattr(head, "faster", lambda: False)
        yield
