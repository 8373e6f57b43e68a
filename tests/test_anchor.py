"""NAS: values brought to one norm, by every method that has values, against the oracles."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit import RomeSettings
from editkit.edits import Edit
from editkit.edits.base import Base
from editkit.errors import ConfigError, EditkitError
from editkit.methods import get_method
from editkit.methods.shared.anchor import anchored, pilot_anchor
from editkit.models.experts import site_of
from editkit.models.load import LanguageModel
from editkit.moments import second_moments
from editkit.testing.tiny import tiny_lm
from tests.conftest import Near, inputs_of
from tests.expert_oracle import memory_of
from tests.oracles import rome_update, spread_updates
from tests.test_experts import CONTEXTS, FACTS, MOMENTS, blocks_of
from tests.test_methods import SETTINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),  # on tiny random models it is large
    pytest.mark.filterwarnings("ignore:The second moment at"),  # and few tokens are read
]
ADAM: dict[str, Any] = {"steps": 4, "clamp": 0.75, "stop_loss": 0.0, "solver": "adam", "lr": 0.02, "weight_decay": 1e-3}


def norms_of(lm: LanguageModel, method: str, settings: Any) -> list[float]:
    edit = get_method(method)(lm, FACTS, settings, moments=MOMENTS, contexts=CONTEXTS, progress=False)
    return [report["value_norm"] for report in edit.provenance["reports"]]


@pytest.mark.cells
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mixtral"])
def test_many_facts_are_the_oracles(family: str, method: str, near: Near) -> None:
    """With an anchor under which one fact is left out."""
    lm = tiny_lm(family, dtype=torch.float64)
    layers = [1] if method == "emmet" or lm.architecture.mlp_norm is not None else [0, 1]
    settings = replace(SETTINGS[method], layers=layers, **ADAM)
    norms = sorted(norms_of(lm, method, settings))
    settings = replace(settings, anchor=0.5 * (norms[-1] + norms[-2]) / 2)
    moments = second_moments(lm, layers, MOMENTS, progress=False)
    edit = get_method(method)(lm, FACTS, settings, moments=moments, contexts=CONTEXTS, progress=False)
    expected = spread_updates(
        lm.model,
        method,
        lm.architecture.block,
        lm.architecture.attention,
        [site_of(lm, layer) for layer in layers],
        layers,
        [inputs_of(lm, fact, CONTEXTS) for fact in FACTS],
        [blocks_of(moments[i], 0.0 if method == "alphaedit" else MOMENTS.ridge) for i in layers],
        settings,
        memory_of,
        own_target=lm.architecture.mlp_norm is not None,
    )
    for delta, update in zip(edit.deltas, expected, strict=True):
        near(f"{method}, NAS", family, delta.change(), update, 1e-4)
    reports = edit.provenance["reports"]
    assert sum(report["skipped"] for report in reports) == 1
    assert all((report["delta_norm"] == 0) is report["skipped"] for report in reports)


@pytest.mark.parametrize("keys", ["mixed", "mean"])
def test_rome_is_the_oracles(keys: str, near: Near) -> None:
    lm = tiny_lm("llama", dtype=torch.float64)
    constants = {name: value for name, value in ADAM.items() if name != "solver"}
    settings = RomeSettings(keys=keys, layer=1, **constants)
    anchor = 0.7 * norms_of(lm, "rome", settings)[0]
    settings = replace(settings, anchor=anchor)
    moments = second_moments(lm, [1], MOMENTS, progress=False)
    edit = get_method("rome")(lm, FACTS[0], settings, moments=moments, contexts=CONTEXTS, progress=False)
    expected, _ = rome_update(
        lm.model,
        site_of(lm, 1),
        *inputs_of(lm, FACTS[0], CONTEXTS),
        blocks_of(moments[1], MOMENTS.ridge),
        mixed=keys == "mixed",
        kl_factor=settings.kl_factor,
        anchor=anchor,
        **constants,
    )
    near("rome, NAS" if keys == "mixed" else "r_rome, NAS", "llama", edit.deltas[0].change(), expected, 1e-4)
    assert not edit.provenance["reports"][0]["skipped"]


def test_a_value_is_scaled_or_left() -> None:
    start = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    delta = torch.tensor([[0.0, 4.0], [0.0, 0.5]]).double()  # values of norms 5 and 1.5
    found = anchored(start, delta, 2.0)
    assert found.norms.tolist() == [5.0, 1.5] and found.skipped.tolist() == [True, False]
    torch.testing.assert_close(start + found.delta, torch.tensor([[3.0, 0.0], [0.0, 2.0]]).double())
    assert anchored(start, delta, None).delta is delta


def test_the_anchor_is_the_mean_of_pilots_without_the_largest() -> None:
    lm = tiny_lm("gpt2")
    settings = replace(SETTINGS["memit"], layers=[1], **ADAM)
    edit = get_method("memit")(lm, FACTS, settings, moments=MOMENTS, contexts=CONTEXTS, progress=False)
    assert pilot_anchor(edit) == pytest.approx(sum(norms_of(lm, "memit", settings)) / len(FACTS))
    reports = [{"value_norm": float(i)} for i in range(40)]
    many = [Edit((), Base("", "", ""), {"reports": part, "settings": {}}) for part in (reports[:7], reports[7:])]
    assert pilot_anchor(many) == sum(range(38)) / 38
    wrongs: list[dict[str, Any]] = [
        {"settings": {}},
        {"reports": [{"steps": []}]},
        {"reports": reports, "settings": {"anchor": 2.0}},
    ]
    for wrong in wrongs:
        with pytest.raises(EditkitError, match="pilot edits.*method.anchor=null"):
            pilot_anchor(Edit((), Base("", "", ""), wrong))
    with pytest.raises(ConfigError, match="method.anchor must be positive"):
        RomeSettings(anchor=0.0)
