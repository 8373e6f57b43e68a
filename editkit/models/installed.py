"""What an edit puts on a model besides changed weights: a prefix of every text, a codebook at a module.

Such a content is a value, as the change of a weight is. What is in force on a model is a list of contents, in their
order, and `install` exchanges the whole list. How a kind acts depends on all contents of that kind together: a session
has one for each of its steps, so undoing a step is installing those of the other steps. No parameter or buffer is ever
written. Nothing is on the model but hooks, all of which are known here, so that it can be shown that none is left.

A kind is one class, registered by name, as our own are in prefix.py and codebook.py:

    register(Prefix)

Another package registers its own with the same call, and an entry point `kind = "its.module"` in the group
`editkit.installed` (registry.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from editkit.registry import Registry
from editkit.tensorfiles import contents_digest, described


class Handle(Protocol):
    """How a hook comes off, as torch's RemovableHandle."""

    id: int

    def remove(self) -> None: ...


class Installed(ABC):
    """One content. Subclasses are frozen dataclasses whose tensors are float32 on the CPU."""

    kind: ClassVar[str]  # its name in files
    moves_tokens: ClassVar[bool] = False  # whether texts have other tokens while it is in force

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules whose outputs it changes."""
        return ()

    @abstractmethod
    def to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds of it: JSON values, and tensors by name."""

    @classmethod
    @abstractmethod
    def from_file(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The content of a file. Raises ValueError or KeyError for what `to_file` does not give."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise EditkitError where it does not fit `model`."""

    @classmethod
    @abstractmethod
    def put(cls, model: nn.Module, contents: Sequence[Any]) -> Iterator[Handle]:
        """Put `contents`, all of this kind that are to be in force, on `model`, hook by hook.

        Each hook is an instance of `Hook`.
        """

    @abstractmethod
    def __str__(self) -> str:
        """One line for people."""

    @cached_property
    def digest(self) -> str:
        """Its identity: sha256 of the JSON values and the tensors."""
        values, tensors = self.to_file()
        return contents_digest({"kind": self.kind, **values}, {name: described(each) for name, each in tensors.items()})


class Hook(ABC):
    """What a kind registers on a module with `on`. A deep copy of the model carries it, and there it does nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)

    def on(self) -> Handle:
        """Register it on its module."""
        module = self._module()
        assert module is not None
        handle: Handle = module.register_forward_hook(self, with_kwargs=True)
        return handle

    def is_of(self, module: nn.Module) -> bool:
        """Whether it is of this very module, and not of one that this is a copy of."""
        return self._module() is module

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.changed(args, kwargs, output) if self.is_of(module) else None

    @abstractmethod
    def changed(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the module puts out in place of `output`, for the arguments of its call."""


@dataclass
class _State:
    """What is on one model. `whole`: no exchange was broken off."""

    contents: tuple[Installed, ...] = ()
    handles: list[Handle] = field(default_factory=list)
    whole: bool = True


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()
_KINDS: Registry[type[Installed]] = Registry("kind of content of an edit", group="editkit.installed")


def register(kind: type[Installed]) -> type[Installed]:
    """Add a kind of content. Raises ConfigError for a name that is taken."""
    return _KINDS.register(kind.kind, kind, home=kind.__module__)


def kind_named(name: str) -> type[Installed]:
    """The kind of this name; its file is imported now. Raises ConfigError with the near match."""
    return _KINDS.get(name)


def installed_on(model: nn.Module) -> tuple[Installed, ...]:
    """The contents that are in force on `model`, in their order."""
    state = _states.get(model)
    return () if state is None else state.contents


def install(model: nn.Module, contents: Sequence[Installed]) -> None:
    """Make `contents`, in their order, all that is in force on `model`.

    After an exception or an interrupt, a second call with what was in force before puts that back.
    """
    state = _states.setdefault(model, _State())
    if state.whole and _same(state.contents, contents) and not _hooks_astray(model):
        return
    # 1) Take off what is there.
    state.whole = False
    for handle in [*state.handles]:
        handle.remove()
        state.handles.remove(handle)
    for number, module in _hooked(model).items():  # of an exchange that was broken off between a hook and its handle
        del module._forward_hooks[number]
        module._forward_hooks_with_kwargs.pop(number, None)
    # 2) Put on what is wanted, kind after kind.
    state.contents = tuple(contents)
    for kind in dict.fromkeys(type(each) for each in contents):
        for handle in kind.put(model, [each for each in contents if type(each) is kind]):
            state.handles.append(handle)
    state.whole = True


def left_over(model: nn.Module, wanted: Sequence[Installed]) -> list[str]:
    """What `model` has in force besides `wanted`, what it lacks of that, and modules whose hooks are not as they should
    be; nothing when all is well."""
    now = installed_on(model)
    found = [f"{each} (still in force)" for each in now if not any(each is other for other in wanted)]
    found += [f"{each} (no longer in force)" for each in wanted if not any(each is other for other in now)]
    if not found and not _same(now, wanted):
        found = ["the order of what is in force"]
    return found + _hooks_astray(model)


def _same(some: Sequence[Installed], others: Sequence[Installed]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _hooks_astray(model: nn.Module) -> list[str]:
    """Modules with a hook of ours that is not in the list of handles, and handles whose hook is gone."""
    state = _states.get(model)
    wanted = {handle.id for handle in state.handles} if state is not None else set()
    found = _hooked(model)
    stray = [f"a hook on a {type(module).__name__}" for number, module in found.items() if number not in wanted]
    return stray + [f"a hook that is gone (number {number})" for number in sorted(wanted - found.keys())]


def _hooked(model: nn.Module) -> dict[int, nn.Module]:
    """The module of each hook of ours, by the number of the hook."""
    return {
        number: module
        for module in model.modules()
        for number, hook in module._forward_hooks.items()
        if isinstance(hook, Hook) and hook.is_of(module)
    }


def float32(tensor: Tensor) -> Tensor:
    """The tensor as a content keeps it: float32 on the CPU, its own copy."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
