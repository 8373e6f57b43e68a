"""The start of the command: torch and transformers imported without what one run in one process never uses.

`import transformers` takes longer than an edit. Four things that it brings along are left out here:

- torch._dynamo, the compiler behind torch.compile: it is imported when something first needs it (`_Later`);
- torch.distributed.tensor, for a model spread over several processes: transformers finds a torch without
  torch.distributed, as some builds of torch are;
- torchao, where it is installed, and torch's symbolic shapes: one function of each is imported, and rarely called;
- the garbage collector's passes over a million objects that live as long as the process.

A stand-in gives way to the real thing at the first use that it does not know. So another version of torch (before
2.13) or of transformers may start more slowly, and works. Only the command does this: `import editkit` in a notebook
or in another program changes nothing. EDITKIT_PLAIN_IMPORTS=1 turns it off for the command too.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# The one part of the compiler that transformers imports at its start (in masking_utils); it needs no other part.
_USED_EARLY = f"{COMPILER}._trace_wrapped_higher_order_op"
# Modules of which something imported at the start takes functions that it rarely calls: those functions, or all.
_FUNCTIONS: dict[str, tuple[str, ...] | None] = {
    # for transformers.quantizers, where torchao is installed
    "torchao.prototype.safetensors.safetensors_support": None,
    # sympy, for torch.nn.attention.flex_attention from torch 2.15 on
    "torch.fx.experimental.symbolic_shapes": ("has_free_unbacked_symbols",),
}
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set by torchrun and the like: this process is one of several

_paused = False  # whether the collector was turned off here


def wanted() -> bool:
    """Whether this is a process of the command's own: no model can be loaded yet."""
    return "transformers.modeling_utils" not in sys.modules and not os.environ.get("EDITKIT_PLAIN_IMPORTS")


def pause_collector() -> None:
    """No garbage collection until `resume_collector`, in a process of the command's own.

    Modules make a million objects and next to no garbage. The collector walks through all of them several times while
    they are made, and would do so again at every full pass of the run.
    """
    global _paused
    if wanted() and gc.isenabled():
        gc.disable()
        _paused = True


def resume_collector() -> None:
    """End a pause. What was made in it is never looked at again. Does nothing where there is none."""
    global _paused
    if _paused:
        gc.freeze()
        gc.enable()
        _paused = False


def import_libraries() -> None:
    """Import torch, and what every run needs of transformers, in a process of the command's own."""
    if not wanted():
        return
    with compiler_later(), _without_distributed(), _functions_later():
        from transformers import (  # noqa: F401
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            GenerationMixin,
            PreTrainedModel,
            PreTrainedTokenizerBase,
        )


@contextlib.contextmanager
def _without_distributed() -> Iterator[None]:
    """What is imported in the body finds no torch.distributed. Does nothing in one of several processes."""
    from torch import distributed

    if any(name in os.environ for name in _LAUNCHED):
        yield
        return
    real = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = real


@contextlib.contextmanager
def _functions_later() -> Iterator[None]:
    """What is imported in the body gets functions of _FUNCTIONS that import their module when they are called."""
    for name, functions in _FUNCTIONS.items():
        if name not in sys.modules and importlib.util.find_spec(name.split(".", 1)[0]) is not None:
            sys.modules[name] = _Functions(name, functions)
    try:
        yield
    finally:
        for name in _FUNCTIONS:
            if type(sys.modules.get(name)) is _Functions:
                del sys.modules[name]


class _Functions(ModuleType):
    """A module of functions, each of which imports the real module when it is called.

    What is not one of `functions` (None: all are) imports the real module at once.
    """

    def __init__(self, name: str, functions: tuple[str, ...] | None) -> None:
        super().__init__(name)
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if self._functions is not None and name not in self._functions:
            return self._real(name)

        def late(*args: Any, **kwargs: Any) -> Any:
            return self._real(name)(*args, **kwargs)

        return late

    def _real(self, name: str) -> Any:
        if type(sys.modules.get(self.__name__)) is _Functions:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def compiler_later() -> Iterator[None]:
    """torch._dynamo is imported at its first use, in the body or after it. Where that cannot be, it is imported now."""
    import torch

    spec = None if COMPILER in sys.modules else importlib.util.find_spec(COMPILER)
    if spec is not None and spec.loader is not None:
        sys.modules[COMPILER] = _Later(spec)
        try:
            _import_without_package(_USED_EARLY, spec)
            torch._dynamo = sys.modules[COMPILER]
        except Exception:  # another version of torch, where that part needs others: the usual import
            for name in [name for name in sys.modules if f"{name}.".startswith(f"{COMPILER}.")]:
                del sys.modules[name]
            importlib.import_module(COMPILER)
    yield


def _import_without_package(name: str, package: ModuleSpec) -> None:
    """Import the module `name` without running the `__init__` of the package that it is in."""
    spec = PathFinder.find_spec(name, package.submodule_search_locations)
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


class _Later(ModuleType):
    """A package whose `__init__` is run, in place, when an attribute is asked for that is not there yet.

    Until then it answers the four functions of torch._dynamo that are called where nothing is compiled: marks on
    functions, which are kept and passed on when the real package is there, and `graph_break`, which does nothing
    outside of a compilation.
    """

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__package__ = spec.name
        # No __path__: an import of a part asks for it, and so the package itself is run before its part.
        self._waiting: list[Callable[[], object]] = []
        self._lock, self._running = threading.RLock(), False
        stand_ins = (self._disable, self._allow_in_graph, self._assume_constant_result, self._graph_break)
        self._stand_ins = {each.__name__.removeprefix("_"): each for each in stand_ins}
        self.__dict__.update(self._stand_ins)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":  # asked of every module, by inspect and others
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with self._lock:
            if type(self) is _Later:
                if self._running:  # by this thread: the package's own parts, on their way
                    raise AttributeError(f"module {self.__name__!r} has no attribute {name!r} yet")
                self._run()
        return getattr(self, name)

    def _run(self) -> None:
        """Become the real package."""
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        self._running = True
        for name in self._stand_ins:
            self.__dict__.pop(name, None)
        self.__path__ = list(spec.submodule_search_locations or ())
        try:
            spec.loader.exec_module(self)
        except BaseException:
            self.__dict__.update(self._stand_ins)
            del self.__path__
            raise
        finally:
            self._running = False
        waiting = self._waiting
        object.__setattr__(self, "__class__", ModuleType)
        for name in ("_waiting", "_lock", "_running", "_stand_ins"):
            del self.__dict__[name]
        for pass_on in waiting:
            pass_on()

    def _when_real(self, act: Callable[[], object]) -> None:
        if type(self) is _Later:
            self._waiting.append(act)
        else:  # a stand-in that somebody kept
            act()

    def _disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """torch.compiler.disable: the function as it is, and what the real one makes of it once that is there.

        `options` are passed on as they are given: each torch knows others."""
        options["recursive"] = recursive
        if fn is None:
            return functools.partial(self._disable, **options)
        if not inspect.isfunction(fn):  # a module or a class is wrapped in ways of its own
            self.__getattr__("__path__")
            return self.disable(fn, **options)
        called = fn

        @functools.wraps(fn)
        def late(*args: Any, **kwargs: Any) -> Any:
            return called(*args, **kwargs)

        def pass_on() -> None:
            nonlocal called
            called = self.disable(fn, **options)

        self._when_real(pass_on)
        return late

    def _allow_in_graph(self, fn: Any) -> Any:
        self._when_real(lambda: self.allow_in_graph(fn))
        return fn

    def _assume_constant_result(self, fn: Any) -> Any:
        self._when_real(lambda: self.assume_constant_result(fn))
        return fn

    def _graph_break(self, msg: str = "") -> None:
        if type(self) is not _Later:
            self.graph_break(msg)
