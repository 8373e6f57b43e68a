"""Values on disk: what one call of `compute_deltas` found, read again by a call that would do the very same.

    CACHE/values/MODEL/KEY.safetensors    δ, keys, v0, loss curves; MODEL is the model's digest, KEY that of the rest

KEY covers whatever can move a bit of a result: the token rows of all facts of the call (facts of one batch share their
rounding) and so facts, contexts, seed and tokenizer; the settings of the value; the model's configuration, mode and
place; the versions of torch and transformers and editkit's own source. Second moments have no part in a value. A model
with hooks of the caller's is not cached: nobody can tell what they do. Two processes that compute the same
both write it, whole and alike.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editkit.errors import OutputError
from editkit.files import write_bytes
from editkit.methods.shared.engine import AtLookup, FactRows
from editkit.models.load import LanguageModel
from editkit.moments.cache import cache_folder
from editkit.settings import ValueSettings

FORMAT = "editkit-values/1"
# The settings that a value depends on besides its rows.
RELEVANT = ("steps", "lr", "weight_decay", "kl_factor", "clamp", "stop_loss", "engine")


def key_of(
    lm: LanguageModel,
    layer: int,
    sites: Sequence[str],
    jobs: Sequence[FactRows],
    norms: Tensor | None,
    settings: ValueSettings,
    **more: Any,
) -> str:
    """The digest of everything but the weights that decides what `compute_deltas` finds."""
    sha = hashlib.sha256()
    said = {
        "layer": layer,
        "sites": list(sites),
        "settings": {name: getattr(settings, name) for name in RELEVANT},
        "rows": [[each.scored.positions, each.lookup, each.contexts] for each in jobs],
        "tokens": [[each.scored.rows.ids.tolist(), each.scored.rows.mask.tolist()] for each in jobs],
        "norms": None if norms is None else norms.tolist(),
        "config": lm.model.config.to_dict(),
        "attention": lm.model.config._attn_implementation,
        "training": lm.model.training,
        "place": _place(lm),
        "source": _source(),
        "versions": [torch.__version__, transformers.__version__],
        "more": more,
    }
    sha.update(json.dumps(said, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def _place(lm: LanguageModel) -> list[Any]:
    """What rounds: the dtype, the device, and how products are made there."""
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type
    capability = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return [str(lm.dtype), device, capability, torch.get_float32_matmul_precision()]


@functools.cache
def _source() -> str:
    """The digest of editkit's own code."""
    sha = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()


def cached(lm: LanguageModel, weights: str, key: str, compute: Callable[[], list[Any]], made: type) -> list[Any]:
    """What the cache holds for the model with digest `weights` under `key`, else what `compute` gives, kept there.

    `made` is the dataclass of the results (value.py's Optimised).
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()):
        return compute()
    path = cache_folder() / "values" / weights[:16] / f"{key[:32]}.safetensors"
    found = _read(path, weights, key, made)
    if found is None:
        found = compute()
        try:
            write_bytes(path, _packed(found, weights, key))
        except OutputError as error:
            warnings.warn(f"values are not cached: {error}", stacklevel=3)
    return found


def _packed(results: Sequence[Any], weights: str, key: str) -> bytes:
    tensors, said = {}, []
    for number, each in enumerate(results):
        tensors[f"{number}.delta"] = each.delta
        if each.clean is not None:
            tensors |= {f"{number}.keys": each.clean.input, f"{number}.values": each.clean.output}
        said.append({"steps": each.steps, "clamp_hit": each.clamp_hit})
    body = {"format": FORMAT, "weights": weights, "key": key, "results": said}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save_tensors(tensors, metadata={"editkit": json.dumps(body | {"digest": _digest(tensors, said)})})


def _read(path: Path, weights: str, key: str, made: type) -> list[Any] | None:
    """The results in a file, or None where there is none; a damaged one is None too, with a warning."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        tensors = load_tensors(data)
        length = int.from_bytes(data[:8], "little")
        body = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["editkit"])
        said = body["results"]
        if (body["format"], body["weights"], body["key"]) != (FORMAT, weights, key):
            raise ValueError("it belongs to another call")
        if body["digest"] != _digest(tensors, said):
            raise ValueError("its values are not those that were stored")
        return [made(tensors[f"{i}.delta"], **each, clean=_clean(tensors, i)) for i, each in enumerate(said)]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"computed again, for '{path}' is damaged: {type(error).__name__}: {error}", stacklevel=4)
        return None


def _clean(tensors: dict[str, Tensor], number: int) -> AtLookup | None:
    keys = tensors.get(f"{number}.keys")
    return None if keys is None else AtLookup(keys, tensors[f"{number}.values"])


def _digest(tensors: dict[str, Tensor], said: Any) -> str:
    sha = hashlib.sha256(json.dumps(said).encode())
    for name in sorted(tensors):
        sha.update(f"{name}{tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()
