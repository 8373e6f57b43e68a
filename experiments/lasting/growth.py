"""Does a session hold more and more memory, or does the allocator? FT-L, whose changes are dense.

    python experiments/lasting/growth.py [STEPS]      # a minute; writes growth.json; then: stream.py tables

Every 100 steps: tensors and objects that Python holds, what tracemalloc has traced since the first look, and the
memory of the process that is no mapped file, before and after glibc has given free memory back (malloc_trim).
"""

import ctypes
import gc
import json
import sys
import tracemalloc
from pathlib import Path

import torch

from editkit import Session, load
from editkit.data import load_cases
from editkit.files import write_text
from editkit.methods.ft_l import FtLSettings
from editkit.models.memory import own_bytes
from editkit.settings import DataSettings


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 361
    lm, trim, rows = load("atlas", device="cpu"), ctypes.CDLL("libc.so.6").malloc_trim, []
    facts = [case.fact for case in load_cases(DataSettings(limit=steps), distinct=True).cases]
    with Session(lm, "ft_l", FtLSettings(steps=2), progress=False, keep=10) as session:
        for number, fact in enumerate(facts, 1):
            session.edit(fact)
            if number % 100 == 60:
                gc.collect()
                before, objects = own_bytes(), gc.get_objects()
                row = {
                    "step": number,
                    "tensors": sum(type(o) is torch.Tensor for o in objects),
                    "objects": len(objects),
                }
                del objects
                traced = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
                trim(0)
                rows.append(row | {"traced": traced, "before": before, "trimmed": own_bytes()})
                if not tracemalloc.is_tracing():
                    tracemalloc.start()
    write_text(Path(__file__).with_name("growth.json"), json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
