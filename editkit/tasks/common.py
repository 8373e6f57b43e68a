"""What the tasks share: the model of a configuration, a clock, and the configuration as JSON."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from editkit.data import Cases
from editkit.data.cases import Case
from editkit.edits.edit import Edit
from editkit.edits.spectra import Spectrum
from editkit.facts import Fact
from editkit.methods import get_method
from editkit.methods.shared.transforms import TRANSFORMS
from editkit.metrics.measure import Look, look
from editkit.metrics.metric import Score, declarations
from editkit.models.architecture import as_matrix, orientation
from editkit.models.columns import Below
from editkit.models.load import LanguageModel, load
from editkit.models.offload import values_of
from editkit.nethook import get_module
from editkit.runs.names import FORMAT
from editkit.settings import Config

MOST_SINGULAR_VALUES = 2048  # of a weight: GPT-2 XL's 1,600 take a second on one core, and time grows with the cube

# What unedited models said, for the other methods of a sweep. In memory, so that nothing has to be trusted that another
# process wrote; joblib's workers each ask once, since they take one job after the other.
_befores: dict[Hashable, Look] = {}
MOST_BEFORES = 2000  # cases; about 20 KB each


class Clock:
    """Seconds of each stretch of the run."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End a stretch; one of the same name grows."""
        now = time.perf_counter()
        self.laps[name] = round(self.laps.get(name, 0.0) + now - self.last, 4)
        self.last = now

    def all(self) -> dict[str, float]:
        """Every stretch, and the total."""
        return self.laps | {"total": round(time.perf_counter() - self.began, 4)}


def load_model(config: Config) -> LanguageModel:
    """The model that `config` names. Sets the precision of float32 products for the process. Raises ModelError."""
    torch.set_float32_matmul_precision(config.matmul)
    return load(
        config.model.name,
        device=config.device,
        dtype=config.model.dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        allow_pickle=config.model.allow_pickle,
        device_map=config.model.device_map,
        max_memory=config.model.max_memory,
        offload_folder=config.model.offload_folder,
        quantization=config.model.quantization,
        edited=config.model.edited,
    )


def bind_method(lm: LanguageModel, config: Config, *, progress: bool = False) -> Callable[[Sequence[Fact]], Edit]:
    """The method of `config` as a function of facts alone; what its edits share is found now, on `lm` as it is."""
    method = get_method(config.method_name)
    options = method.shared(lm, config.method, config.moments, config.seed, True)

    def compute(facts: Sequence[Fact]) -> Edit:
        edit = method(lm, list(facts), config.method, seed=config.seed, progress=progress, **options)
        return TRANSFORMS[config.method.transform](lm, edit) if config.method.transform else edit

    return compute


def below_of(lm: LanguageModel, config: Config) -> Below | None:
    """Keeps what enters the first block that the method changes, for a second look; None where it names no block."""
    blocks = config.method.resolved(lm.name, lm.layers).blocks
    return Below(lm, min(blocks)) if blocks and 0 <= min(blocks) < lm.layers else None


def look_before(lm: LanguageModel, digest: str, case: Case, config: Config, below: Below | None) -> Look:
    """What the unedited model says on a case: asked once in a process, for all methods of a sweep.

    - `lm`, `digest`: the unedited model. `case`: what it is asked.
    - `config`: its measurement, seed and precision of products. `below`: see `look`.

    Raises FactError for a prompt that the model cannot take.
    """
    runs = lm.name, digest, lm.dtype, str(lm.device), lm.model.config._attn_implementation, config.matmul
    asked = (*runs, torch.get_num_threads(), config.task.measure, config.seed, case)
    if asked not in _befores:
        found = look(lm, case, config.task.measure, config.seed, below)
        if len(_befores) >= MOST_BEFORES:
            del _befores[next(iter(_befores))]
        _befores[asked] = found
    return _befores[asked]


def spectrum_beside(lm: LanguageModel, found: Spectrum) -> dict[str, Any]:
    """The singular values of ΔW and, where that takes no more than seconds, of the unedited weight."""
    module = found.parameter.rpartition(".")[0]
    weight = as_matrix(values_of(lm.model, found.parameter), orientation(get_module(lm.model, module), module))
    base: list[float] = []
    if min(weight.shape) <= MOST_SINGULAR_VALUES:
        wide = weight.double().cpu() if weight.shape[0] <= weight.shape[1] else weight.double().cpu().T
        base = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0).sqrt().flip(0).tolist()  # a fifth of an SVD's time
    values, base = ([float(f"{value:.6g}") for value in row] for row in (found.values, base))
    return {"parameter": found.parameter, "singular_values": values, "base_singular_values": base}


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON, nested as on the command line."""
    values = asdict(config)
    return values | {"method": {"name": values.pop("method_name"), **values["method"]}}


def journal_header(config: Config, digest: str, cases: Cases) -> dict[str, Any]:
    """What decides the results of a run over cases; `digest` is of the unedited model."""
    values = {key: value for key, value in plain(config).items() if key != "resume"}
    return {"format": FORMAT, "config": values, "model": digest, "data": cases.digest}


def measured(scores: Sequence[Score]) -> dict[str, Any]:
    """Scores, and what their metrics mean, for a record."""
    return {"scores": [score.to_json() for score in scores], "metrics": declarations(scores)}


def data_of(cases: Cases, failed: Sequence[str]) -> dict[str, Any]:
    """The data of a run over cases, for a record; `failed` says of each case that was left out why."""
    kept = {name: getattr(cases, name) for name in ("source", "digest", "found", "notes")}
    return kept | {"rejected": [str(each) for each in cases.rejected], "failed": list(failed)}


def described(lm: LanguageModel, digest: str) -> dict[str, str]:
    """The model, for a record; `digest` is of the unedited one."""
    split = dict.fromkeys(map(str, getattr(lm.model, "hf_device_map", {}).values()))
    device = ", ".join(split) if len(split) > 1 else str(lm.device)
    found = {"name": lm.name, "digest": digest, "dtype": str(lm.dtype).split(".")[-1], "device": device}
    if (scheme := lm.quantization) is not None:
        found |= {"quantization": scheme, "edited": lm.edited}
    return found
