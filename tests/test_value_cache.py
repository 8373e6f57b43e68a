"""The cache of values: a hit gives the same bytes, what a value depends on makes another entry, damage is noticed."""

import multiprocessing
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from editkit.methods.cache import RELEVANT, cached, key_of
from editkit.methods.memit import memit
from editkit.methods.pmet import pmet
from editkit.methods.rome import rome, rome_each
from editkit.methods.shared import value
from editkit.methods.shared.engine import AtLookup, rows_of
from editkit.methods.shared.value import Optimised
from editkit.models.load import LanguageModel
from editkit.settings import MemitSettings, MomentSettings, PmetSettings, RomeSettings, RRomeSettings, ValueSettings
from tests.conftest import tiny_lm
from tests.test_engines import CONTEXTS, FACTS, VALUE

GIVEN = {"moments": MomentSettings(enabled=False), "contexts": CONTEXTS, "progress": False}
ROME = RRomeSettings(layer=1, cache=True, **VALUE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path))
    return tmp_path / "values"


@pytest.fixture
def lm():
    return tiny_lm("gpt2")


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def not_again(monkeypatch) -> None:
    def computed(*_, **__) -> None:
        raise AssertionError("it was computed again")

    monkeypatch.setattr(value, "_optimised", computed)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (rome, ROME),
        (memit, MemitSettings(layers=[0, 1], mom2_update_weight=10.0, cache=True, **VALUE)),
        (pmet, PmetSettings(layers=[0, 1], mom2_update_weight=10.0, cache=True, **VALUE)),
    ],
    ids=["rome", "memit", "pmet"],
)
def test_a_hit_gives_the_bytes_that_computing_gave(
    folder: Path, lm: LanguageModel, method: str, settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = method(lm, FACTS, settings, **GIVEN)
    assert len(files(folder)) == (len(FACTS) if method is rome else 1)  # rome: one after the other, on other weights
    not_again(monkeypatch)
    assert method(lm, FACTS, settings, **GIVEN).to_bytes() == wanted.to_bytes()


def test_it_is_what_is_computed_without_a_cache(folder: Path, lm: LanguageModel) -> None:
    for edit, other in zip(
        (rome(lm, FACTS[0], ROME, **GIVEN), rome(lm, FACTS[0], ROME, **GIVEN)),
        (rome(lm, FACTS[0], replace(ROME, cache=False), **GIVEN),) * 2,
        strict=True,
    ):
        assert torch.equal(edit.deltas[0].left, other.deltas[0].left)
        assert edit.provenance["reports"] == other.provenance["reports"]


def test_it_is_off_unless_asked_for(folder: Path, lm: LanguageModel) -> None:
    rome(lm, FACTS[0], RRomeSettings(layer=1, **VALUE), **GIVEN)
    assert not folder.exists()


def test_what_has_no_part_in_a_value_shares_it(
    folder: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome(lm, FACTS[0], ROME, **GIVEN)
    not_again(monkeypatch)
    rome(lm, FACTS[0], RomeSettings(layer=1, cache=True, **VALUE), seed=3, **GIVEN)
    rome_each(lm, FACTS[:1], replace(ROME, transform="rect"), **GIVEN)


def test_every_setting_of_a_value_is_in_the_key_or_in_the_rows() -> None:
    elsewhere = {"fact_token", "contexts", "cache", "transform"}  # the first two decide the rows
    assert set(RELEVANT) == {each.name for each in fields(ValueSettings)} - elsewhere


CHANGES = {
    "steps": {"steps": 5},
    "lr": {"lr": 0.31},
    "weight_decay": {"weight_decay": 0.2},
    "kl_factor": {"kl_factor": 0.07},
    "clamp": {"clamp": 2.5},
    "stop_loss": {"stop_loss": 0.01},
    "engine": {"engine": "full"},
    "layer": {"layer": 0},
    "fact_token": {"fact_token": "subject_first"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_setting_is_another_entry(folder: Path, lm: LanguageModel, change) -> None:
    rome(lm, FACTS[0], ROME, **GIVEN)
    rome(lm, FACTS[0], replace(ROME, **change), **GIVEN)
    assert len(files(folder)) == 2


def test_another_model_fact_context_or_company_is_another_entry(folder: Path, lm: LanguageModel) -> None:
    rome(lm, FACTS[0], ROME, **GIVEN)
    with torch.no_grad():
        lm.model.transformer.h[2].mlp.c_fc.weight[0, 0] += 1e-7
    rome(lm, FACTS[0], ROME, **GIVEN)
    lm.model.config.layer_norm_epsilon = 1e-4  # not in the weights
    rome(lm, FACTS[0], ROME, **GIVEN)
    rome(lm, FACTS[0].with_target("Oslo"), ROME, **GIVEN)
    rome(lm, FACTS[1], ROME, **GIVEN)
    rome(lm, FACTS[0], ROME, **GIVEN | {"contexts": CONTEXTS[:2]})
    rome_each(lm, FACTS[:2], ROME, **GIVEN)
    rome(tiny_lm("gpt2", dtype=torch.float64), FACTS[0], ROME, **GIVEN)
    assert len(files(folder)) == 8


def test_place_and_versions_are_in_the_key(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [rows_of(lm, FACTS[0], "subject_last", CONTEXTS)]

    def key(**more):
        return key_of(lm, 1, ["a"], jobs, None, ROME, **more)

    keys = {key(), key(stop_kl=0.1), key_of(lm, 1, ["a", "b"], jobs, torch.ones(1, 2), ROME)}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    keys.add(key())
    torch.set_float32_matmul_precision(before)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0")
        keys.add(key())
    with monkeypatch.context() as patch:
        patch.setattr("editkit.methods.cache._source", lambda: "other code")
        keys.add(key())
    assert len(keys) == 6 and key() in keys


def test_a_model_with_hooks_is_not_cached(folder: Path, lm: LanguageModel) -> None:
    handle = lm.model.transformer.h[2].register_forward_hook(lambda *_: None)
    rome(lm, FACTS[0], ROME, **GIVEN)
    handle.remove()
    assert not files(folder)


@pytest.mark.parametrize("damage", ["cut", "bit", "other", "header"])
def test_a_damaged_file_is_computed_again(folder: Path, lm: LanguageModel, damage) -> None:
    wanted = rome(lm, FACTS[0], ROME, **GIVEN).to_bytes()
    (path,) = files(folder)
    good = path.read_bytes()
    bad = bytearray(good)
    if damage == "cut":
        bad = bad[:-8]
    elif damage == "bit":
        bad[-3] ^= 4
    elif damage == "other":
        rome(lm, FACTS[1], ROME, **GIVEN)
        bad = next(p for p in files(folder) if p != path).read_bytes()
    else:
        bad[20] ^= 1
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match="computed again, for .* is damaged"):
        assert rome(lm, FACTS[0], ROME, **GIVEN).to_bytes() == wanted
    assert path.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "values").write_text("a file where a folder should be")
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="values are not cached"):
        rome(lm, FACTS[0], ROME, **GIVEN)


def test_writers_of_one_entry_do_not_disturb_each_other(folder: Path, lm: LanguageModel) -> None:
    """Four processes compute and read one entry, which is deleted under them all the while."""
    result = Optimised(
        torch.randn(1, 50_000).double(), [{"loss": 0.1 + 0.2}], True, AtLookup(torch.ones(2, 3), torch.ones(2, 4))
    )

    def work(number, failed) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for turn in range(30):
                (found,) = cached(lm, "w" * 64, "k" * 64, lambda: [result], Optimised)
                if not torch.equal(found.delta, result.delta) or found.steps != result.steps:
                    failed.put(number)
                if turn % 4 == number:
                    for path in files(folder):
                        path.unlink(missing_ok=True)

    context = multiprocessing.get_context("fork")
    failed = context.Queue()
    processes = [context.Process(target=work, args=(number, failed)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4 and failed.empty()
