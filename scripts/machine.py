"""What a benchmark says of the machine it ran on."""

import subprocess
import sys
from pathlib import Path


def processor() -> str:
    """The processor's name, or the platform's where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), sys.platform)


def commit() -> str | None:
    """The checkout's commit, with -dirty where files differ from it; None outside of one."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        found = subprocess.run(asked, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
