"""Settings as plain dataclasses: the schema of conf/. No torch here, so a configuration error answers at once.

Defaults follow the authors' public code where paper and code differ (the published numbers were made with
the code). None in a method's settings means: the constant of this method and model (constants.py).
"""

from editkit.settings.checks import require_one_of
from editkit.settings.methods import (
    LOOKUP_TOKENS,
    AlphaEditSettings,
    ContextSettings,
    EmmetSettings,
    FtLSettings,
    FtSettings,
    LoraSettings,
    MemitSettings,
    MendSettings,
    MethodSettings,
    MomentSettings,
    PmetSettings,
    RomeSettings,
    RRomeSettings,
    SpreadSettings,
    ValueSettings,
)
from editkit.settings.runs import (
    TRACE_KINDS,
    BatchSettings,
    BenchmarkSettings,
    Config,
    DataSettings,
    EditSettings,
    EditTaskSettings,
    LifelongSettings,
    MeasureSettings,
    ModelSettings,
    PortabilitySettings,
    TraceSettings,
    TraceTaskSettings,
)

__all__ = [
    "LOOKUP_TOKENS",
    "TRACE_KINDS",
    "AlphaEditSettings",
    "BatchSettings",
    "BenchmarkSettings",
    "Config",
    "ContextSettings",
    "DataSettings",
    "EditSettings",
    "EditTaskSettings",
    "EmmetSettings",
    "FtLSettings",
    "FtSettings",
    "LifelongSettings",
    "LoraSettings",
    "MeasureSettings",
    "MemitSettings",
    "MendSettings",
    "MethodSettings",
    "ModelSettings",
    "MomentSettings",
    "PmetSettings",
    "PortabilitySettings",
    "RRomeSettings",
    "RomeSettings",
    "SpreadSettings",
    "TraceSettings",
    "TraceTaskSettings",
    "ValueSettings",
    "require_one_of",
]
