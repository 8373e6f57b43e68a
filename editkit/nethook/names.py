"""Modules and parameters by name: get, select by pattern, replace, set trainable."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


class HookError(RuntimeError):
    """A request to the hook layer cannot be done, or would give wrong results without an error."""


class NameNotFound(HookError, LookupError):
    """There is no module, parameter or site of that name."""


def _names(model: nn.Module, kind: str) -> dict[str, Any]:
    """{name: module or parameter}, with every alias of a shared one."""
    every: Any = {"module": model.named_modules, "parameter": model.named_parameters}[kind]
    return dict(every(remove_duplicate=False))


def _not_found(model: nn.Module, kind: str, name: str) -> NameNotFound:
    names = [n for n in _names(model, kind) if n]
    # A common mistake is a wrapper's prefix (module., _orig_mod.) that is missing or not wanted.
    near = [n for n in names if n.endswith(f".{name}") or name.endswith(f".{n}")][-1:]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names[:6])}{', …' if names[6:] else ''}"
    hint = f"for a pattern, use select(model, '{name}')" if "*" in name else hint
    return NameNotFound(f"{type(model).__name__} has no {kind} '{name}': {hint}")


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`; '' is the model itself. Raises NameNotFound with the nearest name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise _not_found(model, "module", name) from None


def inside(module: nn.Module) -> nn.Module | None:
    """The module that a wrapper holds: one of torch.compile, of activation checkpointing, or a layer of PEFT. None for
    a module that is no wrapper."""
    names = ("_orig_mod", "_checkpoint_wrapped_module", "base_layer")
    return next((module._modules[name] for name in names if name in module._modules), None)


def get_parameter(model: nn.Module, name: str, *, allow_meta: bool = False) -> nn.Parameter:
    """The parameter called `name`, not a copy; any alias of a tied weight will do. Under a wrapper or an adapter it has
    the name of the plain model too.

    Raises NameNotFound with the nearest name, and HookError for weights where a write would be lost or wrong:
    parametrised, quantised and, unless `allow_meta`, offloaded ones.
    """
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        raise _not_found(model, "parameter", name) from None
    while leaf not in module._parameters and (inner := inside(module)) is not None:
        module = inner
    if parametrize.is_parametrized(module, leaf):
        raise HookError(f"'{name}' is parametrised, a write is lost: call parametrize.remove_parametrizations first.")
    parameter = module._parameters.get(leaf)
    if parameter is None:
        raise _not_found(model, "parameter", name)
    # One byte for each element: packed or scaled, so its values are not those of the matrix.
    if parameter.element_size() == 1 or type(parameter).__name__ in ("Params4bit", "Int8Params"):
        raise HookError(f"'{name}' is quantised ({parameter.dtype}): load in float32, float16 or bfloat16 instead.")
    if parameter.device.type == "meta" and not allow_meta:
        raise HookError(f"'{name}' is offloaded (meta device): use accelerate.utils.align_module_device around this.")
    return parameter


def select(model: nn.Module, pattern: str | re.Pattern[str], kind: str = "module") -> list[str]:
    """Names of modules (or, with kind="parameter", of parameters) that `pattern` matches from beginning to end, in
    order.

    In a string, `*` stops at a dot and `**` does not; `[3-5]` is one character of a set and `[!3-5]` one outside it. Of
    the names of a shared object only the first that matches is given. The model itself, called '', matches no wildcard.
    Raises NameNotFound if nothing matches.

    >>> select(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), "*.weight", kind="parameter")
    ['0.weight', '1.weight']
    """
    names, asked = _names(model, kind), pattern
    if isinstance(pattern, str):
        names = names if pattern == "" else {name: found for name, found in names.items() if name}
        pattern = _glob(pattern)
    chosen: dict[int, str] = {}
    for name in filter(pattern.fullmatch, names):
        chosen.setdefault(id(names[name]), name)
    if not chosen:
        like = f"names look like '{max(names, key=len, default='')}'; '*' stops at a dot, '**' does not"
        raise NameNotFound(f"No {kind} of {type(model).__name__} matches {asked!r} as a whole: {like}.")
    return list(chosen.values())


def _glob(pattern: str) -> re.Pattern[str]:
    def translated(piece: str) -> str:
        if re.fullmatch(r"\[[^\]]+\]", piece):
            inside = re.escape(piece[1:-1]).replace(r"\-", "-")
            return f"(?!\\.)[^{inside[1:]}]" if inside[0] in "!^" else f"[{inside}]"
        return {"**": ".*", "*": "[^.]*", "?": "[^.]"}.get(piece, re.escape(piece))

    try:
        return re.compile("".join(map(translated, re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern))))
    except re.error as error:
        raise HookError(f"The pattern {pattern!r} cannot be read: {error}. A set is [abc], [0-9] or [!0-9].") from None


def select_all(model: nn.Module, names: str | re.Pattern[str] | Iterable[str | re.Pattern[str]]) -> list[str]:
    """Module names from names and patterns, each once. Raises NameNotFound for one that matches nothing."""
    found: dict[str, None] = {}
    for one in [names] if isinstance(names, str | re.Pattern) else names:
        if isinstance(one, str) and not set(one) & set("*?["):
            get_module(model, one)
            found[one] = None
        else:
            found.update(dict.fromkeys(select(model, one)))
    return list(found)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Replace the module called `name` by `module`; returns the old one. Raises HookError for the model itself."""
    old = get_module(model, name)
    if old is model:
        raise HookError("replace_module cannot replace the model itself (name ''): name one of its modules.")
    owner, _, leaf = name.rpartition(".")
    setattr(get_module(model, owner), leaf, module)
    return old


@contextmanager
def replaced(model: nn.Module, name: str, module: nn.Module) -> Iterator[nn.Module]:
    """Replace the module called `name` while the body runs; the old one is put back on every exit."""
    old = replace_module(model, name, module)
    try:
        yield module
    finally:
        replace_module(model, name, old)


@contextmanager
def requires_grad(model: nn.Module, only: Iterable[str] = ()) -> Iterator[None]:
    """In the body only the parameters named in `only` require gradients; every flag is restored on exit."""
    wanted = {id(get_parameter(model, n, allow_meta=True)) for n in ([only] if isinstance(only, str) else only)}
    flags = [(name, p, p.requires_grad) for name, p in _names(model, "parameter").items()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:  # accelerate puts a new object in the place of an offloaded parameter at each pass
        now = _names(model, "parameter")
        for name, parameter, flag in flags:
            for each in (parameter, now.get(name, parameter)):
                with torch.inference_mode(each.is_inference()):  # where that pass was in inference mode
                    each.requires_grad_(flag)
