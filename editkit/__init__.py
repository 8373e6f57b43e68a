"""editkit: rewrite one fact in a language model's weights, measure it, and put every bit back.

>>> from editkit import load, Fact, r_rome                                       # doctest: +SKIP
>>> lm = load("atlas")                                                           # doctest: +SKIP
>>> edit = r_rome(lm, Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"))  # doctest: +SKIP
>>> with edit.applied(lm): ...                                                   # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first used (PEP 562), so that `import editkit` and the command line's checks need no torch.
_PUBLIC = {
    "Edit": "editkit.edits.edit",
    "EditkitError": "editkit.errors",
    "Fact": "editkit.facts",
    "LanguageModel": "editkit.models.load",
    "MomentSettings": "editkit.settings",
    "RRomeSettings": "editkit.methods.r_rome",
    "AlphaEditSettings": "editkit.methods.alphaedit",
    "EmmetSettings": "editkit.methods.emmet",
    "FtLSettings": "editkit.methods.ft_l",
    "FtSettings": "editkit.methods.ft",
    "LoraSettings": "editkit.methods.lora",
    "MendSettings": "editkit.methods.mend",
    "MemitSettings": "editkit.methods.memit",
    "PmetSettings": "editkit.methods.pmet",
    "RomeSettings": "editkit.methods.rome",
    "Alarm": "editkit.alarm",
    "CollapseError": "editkit.alarm",
    "Session": "editkit.session",
    "Snapshot": "editkit.models.snapshot",
    "Trace": "editkit.nethook",
    "TraceSettings": "editkit.settings",
    "load": "editkit.models.load",
    "alphaedit": "editkit.methods.alphaedit",
    "apply_files": "editkit.edits.stacked",
    "attention_to_subject": "editkit.lenses",
    "average_trace": "editkit.tracing",
    "emmet": "editkit.methods.emmet",
    "ft": "editkit.methods.ft",
    "ft_l": "editkit.methods.ft_l",
    "logit_lens": "editkit.lenses",
    "lora": "editkit.methods.lora",
    "mend": "editkit.methods.mend",
    "memit": "editkit.methods.memit",
    "pmet": "editkit.methods.pmet",
    "propose_layers": "editkit.tracing",
    "r_rome": "editkit.methods.r_rome",
    "rome": "editkit.methods.rome",
    "rome_each": "editkit.methods.rome",
    "routing_change": "editkit.edits.routing",
    "side_effects": "editkit.lenses",
    "stream_change": "editkit.lenses",
    "trace": "editkit.tracing",
}
__all__ = [*sorted(_PUBLIC), "__version__"]
# Folders that `import editkit` is enough for, as in editkit.plots.trace_map(…).
_ROOMS = ("data", "edits", "lenses", "methods", "metrics", "moments", "nethook", "plots", "testing", "tracing")

if TYPE_CHECKING:
    from editkit.alarm import Alarm as Alarm
    from editkit.alarm import CollapseError as CollapseError
    from editkit.edits.edit import Edit as Edit
    from editkit.edits.routing import routing_change as routing_change
    from editkit.edits.stacked import apply_files as apply_files
    from editkit.errors import EditkitError as EditkitError
    from editkit.facts import Fact as Fact
    from editkit.lenses import attention_to_subject as attention_to_subject
    from editkit.lenses import logit_lens as logit_lens
    from editkit.lenses import side_effects as side_effects
    from editkit.lenses import stream_change as stream_change
    from editkit.methods.alphaedit import AlphaEditSettings as AlphaEditSettings
    from editkit.methods.alphaedit import alphaedit as alphaedit
    from editkit.methods.emmet import EmmetSettings as EmmetSettings
    from editkit.methods.emmet import emmet as emmet
    from editkit.methods.ft import FtSettings as FtSettings
    from editkit.methods.ft import ft as ft
    from editkit.methods.ft_l import FtLSettings as FtLSettings
    from editkit.methods.ft_l import ft_l as ft_l
    from editkit.methods.lora import LoraSettings as LoraSettings
    from editkit.methods.lora import lora as lora
    from editkit.methods.memit import MemitSettings as MemitSettings
    from editkit.methods.memit import memit as memit
    from editkit.methods.mend import MendSettings as MendSettings
    from editkit.methods.mend import mend as mend
    from editkit.methods.pmet import PmetSettings as PmetSettings
    from editkit.methods.pmet import pmet as pmet
    from editkit.methods.r_rome import RRomeSettings as RRomeSettings
    from editkit.methods.r_rome import r_rome as r_rome
    from editkit.methods.rome import RomeSettings as RomeSettings
    from editkit.methods.rome import rome as rome
    from editkit.methods.rome import rome_each as rome_each
    from editkit.models.load import LanguageModel as LanguageModel
    from editkit.models.load import load as load
    from editkit.models.snapshot import Snapshot as Snapshot
    from editkit.nethook import Trace as Trace
    from editkit.session import Session as Session
    from editkit.settings import MomentSettings as MomentSettings
    from editkit.settings import TraceSettings as TraceSettings
    from editkit.tracing import average_trace as average_trace
    from editkit.tracing import propose_layers as propose_layers
    from editkit.tracing import trace as trace


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"editkit.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'editkit' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *_ROOMS]
