"""Every family takes an edit: the target rises, logits stay finite, every bit is back. scripts/method_families.py has
the whole matrix; here are one method of each sort."""

import importlib.util
import sys
from pathlib import Path

import pytest

from editkit.models.architecture import families
from editkit.testing.tiny import SITES, tiny_lm

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large

SCRIPT = Path(__file__).parent.parent / "scripts" / "method_families.py"
spec = importlib.util.spec_from_file_location("method_families", SCRIPT)
assert spec is not None and spec.loader is not None
method_families = importlib.util.module_from_spec(spec)
sys.modules["method_families"] = method_families
spec.loader.exec_module(method_families)


@pytest.mark.cells
@pytest.mark.parametrize("method", ["r_rome", "memit", "lora"])
@pytest.mark.parametrize("family", SITES)
def test_an_edit_lands_and_comes_off(family: str, method: str, tmp_path: Path) -> None:
    cell = method_families.check(tiny_lm(family), method, tmp_path)
    assert cell["failures"] == [] and cell["rise"] > 0.5


def test_every_family_has_an_entry() -> None:
    assert set(SITES) == {family.removesuffix("_text") for family in families()}
