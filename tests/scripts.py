"""Scripts as modules, for the tests of what is in them."""

import importlib.util
import sys
import types
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str) -> types.ModuleType:
    """The module of scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
