"""The hook layer: get modules and parameters by name, capture and change what passes through them.

It imports torch and nothing else, so the folder can be copied into any project. The files, one idea each:

    names.py        modules and parameters by name or pattern
    trace.py        Trace: capture and change what passes while a body runs
    instrument.py   InstrumentedModel: the same as a list of rules that stays on a model
    callbacks.py    Callbacks: functions called at forward, backward and parameter-gradient events
    shown.py        how captures look in a notebook
"""

from .callbacks import ActivationStatistics, Callbacks, Event, GradientFlow, Progress, Stop
from .instrument import InstrumentedModel, Rule
from .names import (
    HookError,
    NameNotFound,
    get_module,
    get_parameter,
    inside,
    replace_module,
    replaced,
    requires_grad,
    select,
    select_all,
)
from .trace import Record, Trace, TraceDict, hidden, with_hidden, with_input

__all__ = [
    "ActivationStatistics",
    "Callbacks",
    "Event",
    "GradientFlow",
    "HookError",
    "InstrumentedModel",
    "NameNotFound",
    "Progress",
    "Record",
    "Rule",
    "Stop",
    "Trace",
    "TraceDict",
    "get_module",
    "get_parameter",
    "hidden",
    "inside",
    "replace_module",
    "replaced",
    "requires_grad",
    "select",
    "select_all",
    "with_hidden",
    "with_input",
]
