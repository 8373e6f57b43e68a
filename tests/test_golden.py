"""Our ΔW are those of the authors' own code (kmeng01/rome, kmeng01/memit, jianghoucheng/AlphaEdit) to 1e-5.

The fixture of tests/golden.py is always compared; the full files, every entry of every ΔW, where they are.
`pytest tests/test_golden.py -s` prints the table of differences.
"""

from typing import Any

import pytest
import torch

from editkit.methods.shared import value
from editkit.models.load import LanguageModel
from tests.conftest import SHARED_DATA
from tests.covering import spread
from tests.golden import FIXTURE, METHODS, Golden, Ours, computed, read_fixture, read_full

BAR = 1e-5  # relative difference of every ΔW
PRINTED = 5.1e-4  # losses are printed to three decimals
FULL = SHARED_DATA / "golden"
SOURCES = ["fixture", *(["full"] if FULL.is_dir() else [])]


@pytest.fixture(scope="module", params=[(source, method) for source in SOURCES for method in METHODS], ids="-".join)
def pair(request: pytest.FixtureRequest, atlas_lm: LanguageModel) -> tuple[str, Golden, Ours]:
    source, method = request.param
    golden = read_fixture(method) if source == "fixture" else read_full(FULL, method)
    return source, golden, computed(atlas_lm, golden)


def test_every_change_is_the_authors(pair: tuple[str, Golden, Ours]) -> None:
    source, golden, ours = pair
    found = {key: golden.difference(key, ours.changes[key]) for key in golden.changes}
    what = {"rome": "fact", "memit": "batch", "alphaedit": "batch"}[golden.method]
    for (number, layer), difference in found.items():
        print(f"\n{source:8} {golden.method:10} {what} {number}  block {layer}  {difference:.1e}", end="")
    assert set(found) <= set(ours.changes) and len(found) >= 2
    assert max(found.values()) <= BAR


def test_every_step_has_the_printed_loss(pair: tuple[str, Golden, Ours]) -> None:
    _, golden, ours = pair
    assert len(ours.losses) == len(golden.losses) > len(golden.facts)
    assert max(abs(a - b) for a, b in zip(ours.losses, golden.losses, strict=True)) <= PRINTED


@pytest.mark.parametrize("engine", ["replay", "full"])
def test_both_engines_give_the_authors_numbers(atlas_lm: LanguageModel, engine: str) -> None:
    golden = read_fixture("memit")
    ours = computed(atlas_lm, golden, engine=engine)
    assert max(golden.difference(key, ours.changes[key]) for key in golden.changes) <= BAR


@pytest.mark.parametrize("method", METHODS)
def test_the_kl_the_wrong_way_round_is_noticed(
    atlas_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def turned(first: torch.Tensor, second: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.nn.functional.kl_div(second, first, **options)

    monkeypatch.setattr(value, "kl_div", turned)
    golden = read_fixture(method)
    ours = computed(atlas_lm, golden)
    found = max(golden.difference(key, ours.changes[key]) for key in golden.changes)
    print(f"\nKL the wrong way round: {method} differs by {found:.1%}", end="")
    assert found > 100 * BAR


CONSTANTS = {"v_lr": 1.01, "v_weight_decay": 1.1, "kl_factor": 1.1, "clamp_norm_factor": 0.9, "v_num_grad_steps": 0.9}


@pytest.mark.parametrize("constant", spread(CONSTANTS, 5))
def test_a_wrong_constant_is_noticed(atlas_lm: LanguageModel, constant: str) -> None:
    golden = read_fixture("rome")
    golden.hyperparameters[constant] *= CONSTANTS[constant]
    ours = computed(atlas_lm, golden)
    assert max(golden.difference(key, ours.changes[key]) for key in golden.changes) > BAR


def test_the_fixture_is_small() -> None:
    assert FIXTURE.stat().st_size < 100_000
