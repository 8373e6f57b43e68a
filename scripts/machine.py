"""What a benchmark says of the machine it ran on."""

import sys
from pathlib import Path


def processor() -> str:
    """The processor's name, or the platform's where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), sys.platform)
