"""Editing methods: functions `(lm, facts, settings, ...) -> Edit` that leave the model as it was.

The registry names each method's function and settings without importing torch, so that the command line can
check a configuration at once.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from editkit.errors import ConfigError, did_you_mean
from editkit.settings import (
    AlphaEditSettings,
    EmmetSettings,
    FtLSettings,
    FtSettings,
    LoraSettings,
    MemitSettings,
    MendSettings,
    MethodSettings,
    PmetSettings,
    RomeSettings,
    RRomeSettings,
)


@dataclass(frozen=True)
class Method:
    """A registered method: where its function is, and the dataclass of its settings."""

    target: str  # "module:function", imported when first called
    settings: type[MethodSettings]
    uses_earlier_edits: bool = False  # takes `earlier`, its edits that the model already holds

    def load(self) -> Callable[..., Any]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)


METHODS = {
    "rome": Method("editkit.methods.rome:rome", RomeSettings),
    "r_rome": Method("editkit.methods.rome:r_rome", RRomeSettings),
    "memit": Method("editkit.methods.memit:memit", MemitSettings),
    "emmet": Method("editkit.methods.memit:emmet", EmmetSettings),
    "pmet": Method("editkit.methods.pmet:pmet", PmetSettings),
    "alphaedit": Method("editkit.methods.alphaedit:alphaedit", AlphaEditSettings, uses_earlier_edits=True),
    "ft": Method("editkit.methods.finetune:ft", FtSettings),
    "ft_l": Method("editkit.methods.finetune:ft_l", FtLSettings),
    "lora": Method("editkit.methods.lora:lora", LoraSettings),
    "mend": Method("editkit.methods.mend:mend", MendSettings, uses_earlier_edits=True),
}


def get_method(name: str) -> Method:
    """The registered method. Raises ConfigError with the near match."""
    if name not in METHODS:
        raise ConfigError(f"No method '{name}': {did_you_mean(name, METHODS)}")
    return METHODS[name]
