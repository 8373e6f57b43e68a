"""Models split over two pretended devices, the CPU's memory and files: edits, scores and what comes back are the whole
model's, bit for bit."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils.offload
import pytest
import torch
import transformers.integrations.accelerate
from accelerate.utils.modeling import convert_file_size_to_int
from safetensors import safe_open

from editkit import Edit, Session, load
from editkit.errors import ModelError
from editkit.metrics.scoring import score_targets
from editkit.models import passes
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of, write_values
from editkit.models.snapshot import digests, same_bits, tensors_of
from editkit.nethook import HookError, get_parameter, requires_grad
from editkit.settings import MomentSettings
from editkit.testing.tiny import tiny_lm
from tests import pretended
from tests.editing import edited
from tests.run_folders import FAST, really_run, record_of
from tests.test_pretended_looks import LOOKS, plain
from tests.test_session import FACTS
from tests.test_session import SETTINGS as SESSION_SETTINGS

pytestmark = pytest.mark.filterwarnings(
    "ignore:the update of",
    "ignore:C has",
    "ignore:You are calling .generate",  # tiny models: large updates, few keys
)

FAMILIES = ("gpt2", "llama")
# of: the embedding and block 0, block 1, block 2
PLACES = {
    "two devices": ("pretended:0", "pretended:1", "pretended:1"),
    "CPU and disk": ("cpu", "cpu", "disk"),
    "a device, CPU and disk": ("pretended:0", "cpu", "disk"),
    "the embedding on disk": ("disk", "pretended:1", "cpu"),
}


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With what accelerate asks of CUDA alone: the memory of each device, and tensors read from a file onto one."""

    def opened(file: str, framework: str, device: Any) -> Any:
        if torch.device(device).type == pretended.NAME:
            raise TypeError("accelerate reads it to the CPU then, and moves it")
        return safe_open(file, framework=framework, device=device)

    def memory(given: dict[Any, Any] | None = None) -> dict[Any, Any]:
        found: dict[Any, Any] = {0: "1GB", 1: "1GB", "cpu": "1GB"} if given is None else given
        for device, size in found.items():
            found[device] = convert_file_size_to_int(size)
        return found

    monkeypatch.setattr(accelerate.utils.offload, "safe_open", opened)
    monkeypatch.setattr(passes, "room", lambda *_: 0)  # a split model takes no packs: the whole one shall not either
    monkeypatch.setattr(transformers.integrations.accelerate, "accelerate_max_memory", memory)
    with pretended.accelerator(), pretended.same_kernels():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the checkpoint of each family."""
    folders = {}
    for family in FAMILIES:
        lm, folders[family] = tiny_lm(family), tmp_path_factory.mktemp(family)
        lm.model.save_pretrained(folders[family])
        lm.tokenizer.save_pretrained(folders[family])
    return folders


def map_of(family: str, places: tuple[str, str, str]) -> dict[str, str]:
    first, second, third = places
    if family == "gpt2":  # its head is the embedding
        parts = {"transformer.wte": first, "transformer.wpe": first, "lm_head": first, "transformer.ln_f": third}
        return parts | {f"transformer.h.{i}": place for i, place in enumerate(places)}
    parts = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": third, "lm_head": second}
    return parts | {f"model.layers.{i}": place for i, place in enumerate(places)}


def split(saved: Mapping[str, Path], family: str, places: tuple[str, str, str], folder: Path) -> LanguageModel:
    return load(saved[family], device_map=map_of(family, places), offload_folder=folder)


def whole(saved: Mapping[str, Path], family: str, *, mapped: bool = False) -> LanguageModel:
    """The model on the CPU. `mapped`: its weights lie in the mapped file, where a CPU's products may round otherwise
    than on copies of them, which begin at multiples of 64 bytes."""
    lm = load(saved[family], device="cpu")
    for parameter in lm.model.parameters() if not mapped else ():
        parameter.data = parameter.data.clone()
    return lm


def file_digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def scores(lm: LanguageModel) -> Any:
    return score_targets(lm, ["The city of The Eiffel Tower", "The capital of France"], ["Rome", "Madrid"])


def assert_edited_like(lm: LanguageModel, other: LanguageModel, edit: Edit) -> None:
    """With the edit both models are the same, and after it both are what they were."""
    before, flags = lm.digest, [p.requires_grad for p in lm.model.parameters()]
    assert other.digest == before
    with edit.applied(lm, everything=True) as one, edit.applied(other):
        assert lm.digest == other.digest != before
        assert scores(lm) == scores(other)
    assert one.reversal is not None and one.reversal.exact and one.reversal.digested > 0
    assert lm.digest == before and scores(lm) == scores(other)
    assert [p.requires_grad for p in lm.model.parameters()] == flags == [True] * len(flags)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_a_split_model_is_the_whole_models(
    saved: Mapping[str, Path], family: str, places: str, tmp_path: Path
) -> None:
    files, on_devices = file_digests(saved[family]), any(place.startswith("pretended") for place in PLACES[places])
    lm, other = split(saved, family, PLACES[places], tmp_path / "off"), whole(saved, family, mapped=not on_devices)
    assert {str(p.device) for p in lm.model.parameters()} == {
        {"disk": "meta", "cpu": "meta" if on_devices else "cpu"}.get(place, place) for place in PLACES[places]
    }
    for name in ("r_rome", "memit"):
        edit = edited(lm, name, tmp_path)
        assert edit.digest == edited(other, name, tmp_path).digest
        assert_edited_like(lm, other, edit)
    assert file_digests(saved[family]) == files  # what lies on disk is the checkpoint itself


SORTS = ("pmet", "ft", "lora", "mend", "ultraedit", "stableedit", "crispedit", "ft_bf", "anyedit", "kn", "grace", "ike")


@pytest.mark.parametrize("name", SORTS)
def test_each_sort_of_method_edits_a_split_model(saved: Mapping[str, Path], name: str, tmp_path: Path) -> None:
    lm, other = split(saved, "gpt2", PLACES["two devices"], tmp_path / "off"), whole(saved, "gpt2")
    edit = edited(lm, name, tmp_path)
    assert edit.digest == edited(other, name, tmp_path).digest
    assert_edited_like(lm, other, edit)


@pytest.mark.parametrize(
    ("name", "places"),
    [(name, "two devices") for name in ("tracing", "lenses", "measurements")] + [("tracing", "a device, CPU and disk")],
)
def test_what_is_seen_of_a_split_model_is_the_whole_models(
    saved: Mapping[str, Path], places: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    lm, other = split(saved, "llama", PLACES[places], tmp_path / "off"), whole(saved, "llama")
    before = lm.digest
    assert repr(plain(LOOKS[name](lm, tmp_path / "one"))) == repr(plain(LOOKS[name](other, tmp_path / "other")))
    assert lm.digest == before


@pytest.mark.parametrize("name", ["ft", "lora", "ft_bf", "crispedit"])
def test_training_an_offloaded_weight_is_refused(saved: Mapping[str, Path], name: str, tmp_path: Path) -> None:
    lm = split(saved, "gpt2", PLACES["a device, CPU and disk"], tmp_path / "off")
    with pytest.raises(ModelError, match=f"method={name} trains transformer.h.1.mlp.c_proj.weight, which is offloaded"):
        edited(lm, name, tmp_path)


# The stores


@pytest.mark.parametrize("to", ["cpu", "dat files"])
def test_a_model_that_accelerate_offloaded_itself(to: str, tmp_path: Path) -> None:
    """accelerate's own calls, on a real CPU: its map of CPU tensors, and NAME.dat files."""
    other = tiny_lm("gpt2")
    lm = tiny_lm("gpt2")
    folder = tmp_path / "dat"
    if to == "cpu":
        accelerate.cpu_offload(lm.model, torch.device("cpu"))
    else:
        accelerate.disk_offload(lm.model, folder, torch.device("cpu"))
    assert all(p.is_meta for p in lm.model.parameters()) and lm.device == torch.device("cpu")
    files = file_digests(tmp_path)
    assert bool(files) == (to == "dat files")
    edit = edited(lm, "memit", tmp_path / "..")
    assert edit.digest == edited(other, "memit", tmp_path / "..").digest
    assert_edited_like(lm, other, edit)
    assert file_digests(tmp_path) == files


def test_values_are_written_before_the_file_and_dropped_when_they_are_its_own(
    saved: Mapping[str, Path], tmp_path: Path
) -> None:
    lm = split(saved, "gpt2", PLACES["CPU and disk"], tmp_path / "off")
    name = "transformer.h.2.mlp.c_proj.weight"
    hook: Any = lm.model.get_submodule(name.removesuffix(".weight"))
    memory = hook._hf_hook.weights_map.dataset.state_dict
    start = values_of(lm.model, name).clone()
    assert same_bits(start, whole(saved, "gpt2").model.get_parameter(name)) and name not in memory
    for new in (start + 1, -start):
        write_values(lm.model, name, new)
        assert same_bits(values_of(lm.model, name), new) and name in memory
    new[0, 0] = 7.0
    assert not same_bits(values_of(lm.model, name), new)  # it is a copy
    write_values(lm.model, name, start)
    assert same_bits(values_of(lm.model, name), start) and name not in memory
    with pytest.raises(HookError, match="is offloaded"):
        get_parameter(lm.model, name)


def test_an_empty_model_has_no_values() -> None:
    lm = tiny_lm("gpt2")
    lm.model.to("meta")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="'transformer.h.0.mlp.c_proj.weight' has no values: .*model.device_map=auto"):
        values_of(lm.model, "transformer.h.0.mlp.c_proj.weight")


def test_flags_come_back_on_the_objects_that_a_pass_puts_in(saved: Mapping[str, Path], tmp_path: Path) -> None:
    lm = split(saved, "gpt2", PLACES["CPU and disk"], tmp_path / "off")
    for inference in (False, True):
        with requires_grad(lm.model, only=[]):
            with torch.inference_mode(inference):
                lm.model(torch.tensor([[5, 6]]))
            assert not any(p.requires_grad for p in lm.model.parameters())
        assert all(p.requires_grad for p in lm.model.parameters())


def test_an_exception_puts_the_store_back(saved: Mapping[str, Path], tmp_path: Path) -> None:
    lm = split(saved, "llama", PLACES["a device, CPU and disk"], tmp_path / "off")
    edit, before = edited(lm, "memit", tmp_path), digests(tensors_of(lm.model), lm.model)
    with pytest.raises(KeyError), edit.applied(lm):
        raise KeyError
    assert digests(tensors_of(lm.model), lm.model) == before
    settings = replace(SESSION_SETTINGS["r_rome"], layer=2)  # type: ignore[call-arg]  # on disk
    with Session(lm, "r_rome", settings, moments=MomentSettings(enabled=False), progress=False) as session:
        session.edit(FACTS[0])
        session.edit(FACTS[1])
        session.undo(0)
        assert digests(tensors_of(lm.model), lm.model) != before
    assert digests(tensors_of(lm.model), lm.model) == before


# Asking for it


@pytest.mark.parametrize("plan", ["auto", "balanced"])
def test_plans(saved: Mapping[str, Path], plan: str, tmp_path: Path) -> None:
    memory: dict[str | int, str | int] = {"0": "150KB", "1": "1MB", "cpu": "1GB"}
    lm = load(saved["llama"], device_map=plan, max_memory=memory, offload_folder=tmp_path)
    places: Any = lm.model.hf_device_map
    assert {*places.values()} == {0, 1}
    other = whole(saved, "llama")
    assert lm.digest == other.digest and scores(lm) == scores(other)


def test_from_the_command_line(tmp_path: Path) -> None:
    memory = "model.max_memory={0:30MB,1:1GB,cpu:1GB}"
    options = ("edit=gpt2_fact", "task.continuation=2", "method.steps=2", "model.device_map=balanced", memory)
    record = record_of(really_run(tmp_path / "run", *FAST, *options))
    assert record["model"]["device"] == "0, 1"
    assert record["model"]["digest"] == load("atlas", device="cpu").digest


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two answers": ({"device": "cpu", "device_map": "auto"}, "device=cpu and model.device_map=auto were both given"),
    "no such plan": ({"device_map": "balancd"}, "No plan 'balancd' for model.device_map: did you mean 'balanced'"),
    "a device as a plan": ({"device_map": "cuda:0"}, "No plan 'cuda:0'.*device=… puts all of it on one"),
    "no such device": (
        {"device_map": {"transformer": "cuda:3", "lm_head": "cpu"}},
        "puts 'transformer' on 'cuda:3', and there is no such device here; there are pretended:0, pretended:1, cpu",
    ),
    "no such number": ({"device_map": {"transformer": 2, "lm_head": "cpu"}}, "puts 'transformer' on '2'"),
    "no size": ({"device_map": "auto", "max_memory": {"0": "much"}}, "model.max_memory gives '0' 'much'"),
    "memory alone": ({"max_memory": {"0": "1GB"}}, "model.max_memory=.* says how to split a model"),
    "a folder alone": ({"offload_folder": "off"}, "model.offload_folder=off says how to split a model"),
    "a part without a place": (
        {"device_map": {"transformer.h": 0, "lm_head": "cpu"}},
        "model.device_map does not fit 'atlas'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_line(what: str) -> None:
    options, message = WRONG[what]
    with pytest.raises(ModelError, match=message) as caught:
        load("atlas", **options)
    assert "\n" not in str(caught.value)


def test_without_accelerate_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else found(name, *a))
    with pytest.raises(ModelError, match=r"accelerate, which is not installed.*pip install 'editkit\[split\]'"):
        load("atlas", device_map="auto")
