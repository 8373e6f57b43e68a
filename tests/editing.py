"""One edit of a tiny model by any method, in a few steps: what tests of all methods share."""

from pathlib import Path

from editkit.edits.edit import Edit
from editkit.methods import get_method
from editkit.methods.mend import Mend
from editkit.models.load import LanguageModel
from editkit.settings import MomentSettings
from tests.scripts import script

method_families = script("method_families")  # a copy of its own
method_families.SETTINGS["steps"] = 3


def edited(lm: LanguageModel, name: str, folder: Path) -> Edit:
    """The edit by a method, in a few steps."""
    method = get_method(name)
    if name == "mend":
        network = Mend.for_model(lm, [1], rank=2, lr=method_families.UNTRAINED_LR)
        method_families.FITTED["mend"] = {"hypernetwork": str(network.save(folder / "mend.safetensors"))}
    settings = method_families.fitted(method, name, several=lm.architecture.mlp_norm is None)
    facts = method_families.facts_for(method, name)
    return method(lm, facts, settings, moments=MomentSettings(tokens=1000), progress=False)
