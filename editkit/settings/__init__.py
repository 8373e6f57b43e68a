"""Settings as plain dataclasses: the schema of conf/. No torch here, so a configuration error answers at once.

Defaults follow the authors' public code where paper and code differ (the published numbers were made with
the code). None in a method's settings means: the constant of this method and model (its `Constants`).
"""

from editkit.settings.checks import require, require_one_of
from editkit.settings.constants import EASYEDIT, Constants
from editkit.settings.methods import (
    FEWEST_KEYS,
    KEYS_PER_DIMENSION,
    LOOKUP_TOKENS,
    AttributionSettings,
    ContextSettings,
    CurvatureSettings,
    MethodSettings,
    MomentSettings,
    OnePassSettings,
    SpreadSettings,
    TuningSettings,
    ValueSettings,
    WeightlessSettings,
)
from editkit.settings.runs import (
    TRACE_KINDS,
    AlarmSettings,
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
    Reproduction,
    TraceSettings,
    TraceTaskSettings,
)

__all__ = [
    "EASYEDIT",
    "FEWEST_KEYS",
    "KEYS_PER_DIMENSION",
    "LOOKUP_TOKENS",
    "TRACE_KINDS",
    "AlarmSettings",
    "AttributionSettings",
    "BatchSettings",
    "BenchmarkSettings",
    "Config",
    "Constants",
    "ContextSettings",
    "CurvatureSettings",
    "DataSettings",
    "EditSettings",
    "EditTaskSettings",
    "LifelongSettings",
    "MeasureSettings",
    "MethodSettings",
    "ModelSettings",
    "MomentSettings",
    "OnePassSettings",
    "PortabilitySettings",
    "Reproduction",
    "SpreadSettings",
    "TraceSettings",
    "TraceTaskSettings",
    "TuningSettings",
    "ValueSettings",
    "WeightlessSettings",
    "require",
    "require_one_of",
]
