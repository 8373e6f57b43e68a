"""Eval mode, whatever state a model is in: no dropout, nothing compiled, nothing checkpointed.

A notebook may have the model in training (dropout on, activations checkpointed) or compiled (a compiled graph ignores
hooks). `eval_mode` takes that off while a body runs the model, and puts all of it back on every exit. A compiled graph
reads the weights at each call, so it follows an edit.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from editkit.errors import ModelError
from editkit.models.load import LanguageModel
from editkit.models.snapshot import uninterrupted
from editkit.models.wrapped import AROUND, innermost

F = TypeVar("F", bound=Callable[..., Any])


@contextlib.contextmanager
def eval_mode(lm: LanguageModel) -> Iterator[None]:
    """In the body the model runs in eval mode, without compiled calls and without wrappers around its modules.

    Transformers checkpoints activations in training alone, so eval mode turns that off too. On every exit each module
    has its own mode, compiled call and wrapper again. Raises ModelError for a model without values.
    """
    if lm.device.type == "meta":
        raise ModelError(
            f"'{lm.name}' was to be run, and it has no values: it lies on the meta device. Load the model with its "
            "weights, or with model.device_map=auto."
        )
    modules: list[Any] = list(lm.model.modules())
    modes = [(module, module.training) for module in modules if module.training]
    compiled = [(module, module._compiled_call_impl) for module in modules if module._compiled_call_impl is not None]
    wrappers = [
        (module._modules, name, child, innermost(child))
        for module in modules
        for name, child in module._modules.items()
        if type(child).__name__ in AROUND
    ]
    try:
        for module, _ in modes:
            module.training = False
        for module, _ in compiled:
            module._compiled_call_impl = None
        for children, name, _, inner in wrappers:
            children[name] = inner
        yield
    finally:
        with uninterrupted():
            for children, name, wrapper, _ in wrappers:
                children[name] = wrapper
            for module, call in compiled:
                module._compiled_call_impl = call
            for module, mode in modes:
                module.training = mode


def in_eval_mode(function: F) -> F:
    """A function of a model (its first argument) that runs it in `eval_mode`."""

    @functools.wraps(function)
    def run(lm: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        with eval_mode(lm):
            return function(lm, *args, **kwargs)

    return cast(F, run)
