"""Editing methods: functions `(lm, facts, settings, …) -> Edit` that leave the model as it was. One file a method.

A file holds the method's formula, settings, constants and function, and ends with one call:

    register("nudge", nudge, NudgeSettings)

That is all: nothing else in the package names a method. Another package adds its own with the same call, and an entry
point `nudge = "its.module"` in the group `editkit.methods` (see registry.py). Names are listed without importing torch,
so that the command line can check one at once; shared/ holds what several methods use.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError
from editkit.registry import Registry
from editkit.settings import MethodSettings

if TYPE_CHECKING:
    from editkit.edits.edit import Edit
    from editkit.facts import Fact
    from editkit.models.load import LanguageModel

# What a method may take besides model, facts and settings, by keyword.
OPTIONS = {
    "seed": "of everything that is drawn",
    "moments": "how to collect C, or C itself for each layer",
    "contexts": "templates to put the prompt in",
    "progress": "whether to show progress bars",
    "earlier": "this method's edits that the model already holds",
    "carried": "what a session has computed from them (shared/carried.py)",
    "base": "what the method's `base` has computed on the unedited model",
}


@dataclass(frozen=True)
class Method:
    """A registered method: its function and the dataclass of its settings.

    Called as the function itself is; of the options (OPTIONS) those that the function does not take are dropped, so
    that one call fits every method.
    """

    name: str
    function: "Callable[..., Edit]"
    settings: type[MethodSettings]
    takes: frozenset[str]  # names of OPTIONS, as the function's signature has them
    base: "Callable[..., Any] | None" = None  # (lm, settings, *, moments, seed, progress) on the unedited model

    def __call__(
        self,
        lm: "LanguageModel",
        facts: "Fact | Sequence[Fact]",
        settings: MethodSettings | None = None,
        **options: Any,
    ) -> "Edit":
        if unknown := sorted({*options} - {*OPTIONS}):
            raise TypeError(f"no method takes {', '.join(unknown)}; options are {', '.join(OPTIONS)}")
        from editkit.models.evalmode import eval_mode  # here, since names are listed without importing torch

        with eval_mode(lm):
            return self.function(lm, facts, settings, **{k: v for k, v in options.items() if k in self.takes})

    def shared(
        self, lm: "LanguageModel", settings: MethodSettings, moments: Any, seed: int, progress: bool
    ) -> dict[str, Any]:
        """The options `moments`, `contexts` and `base`, computed once for many edits of `lm` as it is now."""
        from editkit.methods.shared.prelude import shared_inputs

        found = {"moments": moments, **shared_inputs(lm, settings, moments, seed, progress)}
        if self.base is not None:
            found["base"] = self.base(lm, settings, moments=moments, seed=seed, progress=progress)
        return found


_METHODS: Registry[Method] = Registry("method", package=__name__, group="editkit.methods")


def register(
    name: str,
    function: "Callable[..., Edit]",
    settings: type[MethodSettings],
    *,
    base: "Callable[..., Any] | None" = None,
) -> Method:
    """Add a method: `method=NAME` runs it, and its settings' fields are the keys below `method.`.

    - `function`: `(lm, facts, settings, *, …) -> Edit`, with those of OPTIONS that it uses; `facts` is one or a list.
    - `settings`: a frozen dataclass below MethodSettings, with a default for every field (None: see its `constants`).
    - `base`: `(lm, settings, *, moments, seed, progress)`, what many edits of one model share, computed once on that
      model as it is before them; the function takes it as its option `base`.

    Raises ConfigError for a name that is taken, or a function or settings that do not fit.
    """
    if not (is_dataclass(settings) and issubclass(settings, MethodSettings)):
        raise ConfigError(
            f"The settings of method '{name}' must be a dataclass below MethodSettings; found {settings}."
        )
    parameters = list(inspect.signature(function).parameters.values())
    needed = [
        p.name for p in parameters[3:] if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if len(parameters) < 3 or {*needed} - {*OPTIONS}:
        raise ConfigError(
            f"The function of method '{name}' must be (lm, facts, settings, *, …) with options of "
            f"{', '.join(OPTIONS)}; found {inspect.signature(function)}."
        )
    takes = frozenset(p.name for p in parameters[3:] if p.name in OPTIONS)
    return _METHODS.register(name, Method(name, function, settings, takes, base), home=function.__module__)


def names() -> list[str]:
    """The names of all methods, sorted: of this package, of installed ones, and registered before. Imports none."""
    return _METHODS.names()


def check_method(name: str) -> None:
    """Raises ConfigError, with the near match, for a name that is no method. Imports none."""
    _METHODS.check(name)


def get_method(name: str) -> Method:
    """The registered method; its file is imported now. Raises ConfigError with the near match."""
    return _METHODS.get(name)


def all_methods() -> dict[str, Method]:
    """Every method by name, all imported. One of another package that cannot be is named in a warning and left out."""
    return _METHODS.all()


def unregister(name: str) -> None:
    """Take a method out again, as a test does."""
    _METHODS.unregister(name)
