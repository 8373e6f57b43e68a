"""How much memory there is: of the machine, and of an accelerator. Where the system does not say, None."""

from pathlib import Path

import torch

_MEMINFO, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")  # it is Linux that says
# What a container may use, and what it uses; of the second and the first version of control groups.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that a new allocation on `device` can have, in bytes.

    On the CPU that is what the kernel calls available, and no more than a container's limit leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available = _kib(_MEMINFO, "MemAvailable:")
    return available if available is None else min([available, *_container()])


def own_bytes() -> int:
    """Memory of this process that is not a mapped file, in bytes; 0 where the system does not say."""
    return _kib(_STATUS, "RssAnon:") or 0


def resident_bytes() -> int:
    """Memory of this process that is resident, mapped files too, in bytes; 0 where the system does not say."""
    return _kib(_STATUS, "VmRSS:") or 0


def _container() -> list[int]:
    for limit, used in _LIMITS:
        try:
            return [max(0, int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))]
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return []


def _kib(path: Path, field: str) -> int | None:
    """A field of one of the kernel's tables, in bytes."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    except (OSError, StopIteration, ValueError):
        return None
