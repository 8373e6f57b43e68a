"""What many edits share gives the edits that each would be alone, byte for byte."""

from typing import Any

import pytest

from editkit import Fact, Session
from editkit.methods import get_method
from editkit.methods.shared.prelude import shared_inputs
from editkit.models.load import LanguageModel
from editkit.settings import ContextSettings, MomentSettings

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FEW = ContextSettings(lengths=(4,), counts=(2,))
MOMENTS = MomentSettings(tokens=3000, ridge=0.05)  # another ridge than the default: it must not get lost


@pytest.mark.parametrize("method", ["rome", "memit", "emmet", "pmet", "alphaedit", "ft"])
def test_an_edit_with_shared_inputs_is_the_edit_without(atlas_lm: LanguageModel, method: str) -> None:
    registered = get_method(method)
    quick: dict[str, Any] = {"steps": 3} | ({} if method == "ft" else {"contexts": FEW})
    quick |= {"fraction": 0.5} if method == "alphaedit" else {}
    settings = registered.settings(**quick)
    alone = registered(atlas_lm, FACT, settings, moments=MOMENTS, progress=False)
    shared = shared_inputs(atlas_lm, settings, MOMENTS, 0, False)
    together = registered(atlas_lm, FACT, settings, progress=False, **({"moments": MOMENTS} | shared))
    assert together.to_bytes() == alone.to_bytes()
    with Session(atlas_lm, method, settings, moments=MOMENTS, progress=False) as session:
        assert session.edit(FACT).to_bytes() == alone.to_bytes()
