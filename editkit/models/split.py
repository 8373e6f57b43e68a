"""Where the parts of a large model go: several devices, the CPU's memory, files; accelerate moves what is computed.

    load("gpt2-xl", device_map="balanced")                                  # over all accelerators, blocks whole
    load("gpt2-xl", device_map="auto", max_memory={0: "2GiB", "cpu": "8GiB"}, offload_folder="offload")

Edits and snapshots are made where a parameter lives (offload.py). Nothing here imports accelerate: transformers does,
where it is asked to split.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from editkit.errors import ModelError, did_you_mean

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' own
_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)?", re.IGNORECASE)

DeviceMap = str | Mapping[str, str | int | torch.device]


def placement(
    device: str | torch.device,
    device_map: DeviceMap | None,
    max_memory: Mapping[str | int, str | int] | None,
    offload_folder: str | Path | None,
) -> dict[str, Any]:
    """The options of `from_pretrained` that place the parts of a model; {} for a model on one device.

    - `device`: "auto", unless everything is to be on it.
    - `device_map`: one of PLANS, or {module: device}, where a device is a number, "cuda:1", "cpu" or "disk".
    - `max_memory`: how much of each device a plan may take, {0: "20GiB", "cpu": "60GiB"}.
    - `offload_folder`: for what goes to "disk", where it is not a file of the checkpoint already.

    Raises ModelError for what contradicts itself, a device there is not, a size that cannot be read, and without
    accelerate.
    """
    if device_map is None:
        for name, value in (("max_memory", max_memory), ("offload_folder", offload_folder)):
            if value is not None:
                raise ModelError(f"model.{name}={value} says how to split a model: it goes with model.device_map=auto.")
        return {}
    if device != "auto":
        raise ModelError(
            f"device={device} and model.device_map={device_map} were both given: a device takes the whole model, a map "
            "splits it. Give one of them."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            "model.device_map splits a model through accelerate, which is not installed. Install it with: "
            "pip install 'editkit[split]'"
        )
    if isinstance(device_map, str):
        if device_map not in PLANS:
            raise ModelError(
                f"No plan '{device_map}' for model.device_map: {did_you_mean(device_map, PLANS)}. A plan splits a "
                "model; device=… puts all of it on one device, and {module: device} names each part's."
            )
    else:
        device_map = {module: _known(module, each) for module, each in device_map.items()}
    found: dict[str, Any] = {"device_map": device_map}
    if max_memory is not None:
        found["max_memory"] = {_number(key): _size(key, value) for key, value in max_memory.items()}
    if offload_folder is not None:
        found["offload_folder"] = str(Path(offload_folder).expanduser())
    return found


def _known(module: str, device: str | int | torch.device) -> str | int | torch.device:
    """The device, if there is one of that name."""
    device = _number(device)
    if device in ("cpu", "disk"):
        return device
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if kind is not None and torch.accelerator.is_available() else 0
    there = [f"{kind.type}:{number}" for number in range(count)] if kind is not None else []
    try:
        wanted = str(torch.device(device))
    except RuntimeError:
        wanted = str(device)
    if wanted not in there and f"{wanted}:0" not in there:
        raise ModelError(
            f"model.device_map puts '{module}' on '{device}', and there is no such device here; there are "
            f"{', '.join([*there, 'cpu', 'disk'])}."
        )
    return device


def _number(device: Any) -> Any:
    """The number of an accelerator, which the command line gives as text."""
    return int(device) if isinstance(device, str) and device.isdecimal() else device


def _size(device: str | int, size: str | int) -> str | int:
    if isinstance(size, bool) or not (isinstance(size, int) or _SIZE.fullmatch(str(size))):
        raise ModelError(f"model.max_memory gives '{device}' {size!r}, which is no size: write 20GiB, 500MB or bytes.")
    return int(size) if str(size).isdecimal() else size
