"""Snapshot: clones of named parameters, and the proof that everything is back bit for bit.

Restoring copies; it never subtracts (W += Δ; W -= Δ leaves about a fifth of the entries unequal). Equality
is of integer views, so that −0.0 differs from 0.0 and a NaN equals itself.

What an edit puts on a model besides weights (installed.py) is taken off again too, and shown to be gone.

A quantised weight is cloned with all of its quantisation state. An edit never writes it, but puts another module in the
place of its module (quantized.py); to restore is to put that very module back.
"""

import contextlib
import hashlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from editkit.errors import ReversalError
from editkit.models.installed import Installed, install, installed_on, left_over
from editkit.models.offload import values_of, write_values
from editkit.models.quantized import is_quantized, storage_of, stored_tensors
from editkit.models.wrapped import plain_name
from editkit.nethook import get_module, get_parameter, replace_module
from editkit.shown import Rows, Shown

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

NAMED = 3  # clones that are named in a notebook
SMALL_MODEL = 2 << 30  # bytes up to which digests of everything are the default


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers of the same width, same shape: a view where torch allows one."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True when dtype, shape and every bit agree."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b).to(a.device))


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bits."""
    data = bits(tensor).cpu()
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if data.numel():
        sha.update(data.flatten().view(torch.uint8).numpy().data)  # the buffer itself; nothing is copied
    return sha.hexdigest()


def tensors_of(model: nn.Module, *, persistent_only: bool = False) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its canonical name, in which wrappers inside of the model do not count
    (wrapped.py); aliases of tied weights are left out.

    `persistent_only` keeps what the state dict holds: caches such as rotary tables are left out. Offloaded ones are
    empty; `digests` and `values_of` know where their values are. A quantised weight counts as the tensors that it is
    stored in: its codes, scales, code book.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # offloaded aliases are not the same object
    parameters = {plain_name(n): p for n, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {n: p for n, p in parameters.items() if not (p.is_meta and n in tied)}
    kept = model.state_dict().keys() if persistent_only else None
    for name, buffer in model.named_buffers():
        if kept is None or name in kept:
            tensors[plain_name(name)] = buffer
    for name, module in model.named_modules():
        if (stored := stored_tensors(module)) is not None:
            tensors.pop(plain_name(_in(name, "weight")), None)
            tensors |= {plain_name(_in(name, part)): tensor for part, tensor in stored.items()}
    return tensors


def _in(module: str, name: str) -> str:
    """The name in the model of what a module calls `name`."""
    return f"{module}.{name}" if module else name


def weight_digest(model: nn.Module, name: str) -> str:
    """sha256 of the parameter `name`; of a quantised weight, of all tensors that it is stored in."""
    module = get_module(model, name.rpartition(".")[0])
    if not is_quantized(module):
        return digest(values_of(model, name))
    return _joined({part: digest(tensor) for part, tensor in storage_of(module).items()})


def digests(tensors: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, str]:
    """A digest for each tensor; offloaded ones of `model` are read from their store, one for each thread at a time.
    Hashing releases the interpreter lock, so threads share the work."""

    def of(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        return digest(values_of(model, name) if tensor.is_meta and model is not None else tensor)

    with ThreadPoolExecutor() as pool:
        return dict(zip(tensors, pool.map(of, tensors.items()), strict=True))


def model_digest(model: nn.Module) -> str:
    """Identity of a model's state: canonical names, dtypes, shapes and bits of all persistent tensors, and what edits
    have put on it besides (installed.py)."""
    on = {f"{number} on the model": each.digest for number, each in enumerate(installed_on(model))}
    return _joined(digests(tensors_of(model, persistent_only=True), model) | on)


def _joined(each: dict[str, str]) -> str:
    """One digest of many, by name."""
    return hashlib.sha256("".join(f"{name}={each[name]}\n" for name in sorted(each)).encode()).hexdigest()


def size_in_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Reversal:
    """What a verification compared, and what it found. `unequal` is empty when every bit is back."""

    tensors: int
    bytes: int
    touched: tuple[str, ...]  # compared bit by bit with their clones
    digested: int  # compared by digest
    unequal: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return not self.unequal

    def __str__(self) -> str:
        verdict = "all equal, bit for bit" if self.exact else f"NOT EQUAL: {', '.join(self.unequal)}"
        return f"{self.tensors} parameters and buffers, {self.bytes:,} bytes compared, {verdict}"

    def require(self) -> "Reversal":
        """Self, or ReversalError naming the first tensors that differ."""
        if self.unequal:
            raise ReversalError(
                f"{len(self.unequal)} of {self.tensors} tensors are not bit for bit what they were: "
                f"{', '.join(self.unequal[:4])}. Something else wrote to the model; reload it before going on."
            )
        return self


@dataclass(repr=False)
class Snapshot(Shown):
    """Clones of named parameters of `model`; with `everything`, also digests of all other tensors.

    >>> net = nn.Linear(2, 2)
    >>> with Snapshot.take(net, ["weight"]):          # restored and verified on every exit
    ...     _ = net.weight.data.zero_()
    >>> bool(net.weight.abs().sum() > 0)
    True
    """

    model: nn.Module
    clones: dict[str, Tensor]
    others: dict[str, str] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # that hold the quantised ones among them, by name
    installed: tuple[Installed, ...] = ()  # what was in force besides weights

    def shown(self) -> tuple[str, Rows]:
        """How much of the model it holds."""
        size = sum(clone.numel() * clone.element_size() for clone in self.clones.values())
        named = [*self.clones][:NAMED] + ["…"] * (len(self.clones) > NAMED)
        rows = [("clones", f"{len(self.clones)}, {size:,} bytes: {', '.join(named) or 'none'}")]
        rows += [("digests", f"of {len(self.others)} other tensors")] if self.others else []
        return "Snapshot", [*rows, *(("installed", str(each)) for each in self.installed)]

    @classmethod
    def take(cls, model: nn.Module, names: Iterable[str], *, everything: bool | None = None) -> "Snapshot":
        """Clone the parameters `names`, found through `get_parameter` (aliases of tied weights too), where they live;
        of offloaded ones the values in their store, of quantised ones the tensors that they are stored in.

        `everything` adds digests of all other parameters and buffers, so that `verify` can show that
        nothing else moved; the default does so for models up to 2 GiB.
        Raises nethook's NameNotFound for an unknown name.
        """
        clones: dict[str, Tensor] = {}
        modules: dict[str, nn.Module] = {}
        for name in names:
            owner = name.rpartition(".")[0]
            module = get_module(model, owner)
            if is_quantized(module):
                modules[owner] = module
                clones |= {_in(owner, part): tensor.clone() for part, tensor in storage_of(module).items()}
            else:
                clones[name] = values_of(model, name).clone()
        tensors = tensors_of(model)
        if everything is None:
            everything = size_in_bytes(tensors.values()) <= SMALL_MODEL
        if not everything:
            return cls(model, clones, modules=modules, installed=installed_on(model))
        quantized = {name for owner in modules for name in clones if name.startswith(_in(owner, ""))}
        held = {id(get_parameter(model, name, allow_meta=True)) for name in clones.keys() - quantized}
        others = {n: t for n, t in tensors.items() if n not in quantized and id(t) not in held}
        return cls(model, clones, digests(others, model), modules, installed_on(model))

    def restore(self) -> None:
        """Copy the clones back, and take off what was put on. The parameters stay the same objects. A Ctrl-C meanwhile
        waits for the end."""
        with uninterrupted():
            install(self.model, self.installed)
            for owner, module in self.modules.items():
                if get_module(self.model, owner) is not module:
                    replace_module(self.model, owner, module)
            stored = self._stored()
            for name, clone in self.clones.items():
                if name not in stored:
                    write_values(self.model, name, clone)
                elif not same_bits(stored[name], clone):  # nothing of ours writes them
                    stored[name].copy_(clone)

    def _stored(self) -> dict[str, Tensor]:
        """The tensors of the quantised modules that are in their places now."""
        found: dict[str, Tensor] = {}
        for owner in self.modules:
            module = get_module(self.model, owner)
            if is_quantized(module):
                found |= {_in(owner, part): tensor for part, tensor in storage_of(module).items()}
        return found

    def _is_back(self, name: str, clone: Tensor, stored: dict[str, Tensor]) -> bool:
        owner = next((owner for owner in self.modules if name.startswith(_in(owner, ""))), None)
        if owner is None:
            return same_bits(values_of(self.model, name), clone)
        same = get_module(self.model, owner) is self.modules[owner]
        return same and name in stored and same_bits(stored[name], clone)

    def verify(self) -> Reversal:
        """Compare integer views of the cloned parameters, digests of the rest where they were taken, and what is on the
        model besides."""
        stored = self._stored()
        unequal = [n for n, clone in self.clones.items() if not self._is_back(n, clone, stored)]
        now = tensors_of(self.model)
        present = {n: now[n] for n in self.others if n in now}
        unequal += [n for n in self.others if n not in now]
        unequal += [n for n, value in digests(present, self.model).items() if value != self.others[n]]
        unequal += left_over(self.model, self.installed)
        compared = [*self.clones.values(), *present.values()]
        return Reversal(
            tensors=len(compared),
            bytes=size_in_bytes(compared),
            touched=tuple(self.clones),
            digested=len(present),
            unequal=tuple(unequal),
        )

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.restore()
        if kind is None:
            self.verify().require()


@contextlib.contextmanager
def installed_meanwhile(model: nn.Module, contents: Sequence[Installed]) -> Iterator[None]:
    """In the body `contents` are all that is in force on `model` besides its weights; what was before is put back on
    every exit."""
    before = installed_on(model)
    try:
        install(model, contents)
        yield
    finally:
        with uninterrupted():
            install(model, before)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the body is done, then deliver it. Outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[Any, ...]] = []
    previous = signal.signal(signal.SIGINT, lambda *event: waiting.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        if waiting and callable(previous):
            previous(*waiting[0])
