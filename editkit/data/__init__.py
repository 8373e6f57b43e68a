"""Data: loaders that turn each format into cases, facts with the prompts that measure their edit.

cases.py        Case and Probe: what every format becomes
formats/        one file a format: a raw record to a Case; the registry of formats
templates/      one file a template: probes made from a case's facts; wording.py: the words of their relations
fields.py       a raw record's fields, read with checks; where a prompt names its subject
atlas.py        the atlas as a benchmark
records.py      raw records from files, folders and the Hub
stream.py       cases one after the other; atlas_stream.py, in which a fact comes again and again
sources.py      load_cases, load_texts: what is skipped is named; limits and shards
"""

import importlib
from typing import TYPE_CHECKING, Any

# Imported when first used, so that the command line can check data.name without torch.
__all__ = ["Cases", "Rejected", "Texts", "load_cases", "load_texts", "streamed"]

if TYPE_CHECKING:
    from editkit.data.sources import Cases, Rejected, Texts, load_cases, load_texts, streamed


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'editkit.data' has no attribute '{name}'")
    return getattr(importlib.import_module("editkit.data.sources"), name)
