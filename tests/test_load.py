"""Loading: the bundled model, local folders, and a clear refusal of everything else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from editkit import load
from editkit.errors import ModelError
from editkit.models.architecture import architecture_of, families, orientation
from editkit.models.experts import down_of
from editkit.models.load import BUNDLED, LanguageModel, _NoFirstWeights
from editkit.models.snapshot import digests, tensors_of
from editkit.testing.tiny import EXPERTS, SITES, build, tiny_lm


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def saved(tmp_path: Path, family: str = "gpt2") -> Path:
    lm = tiny_lm(family)
    lm.model.save_pretrained(tmp_path / family)
    lm.tokenizer.save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2", "qwen3", *EXPERTS])
def test_a_local_folder(family: str, tmp_path: Path) -> None:
    lm = load(saved(tmp_path, family), device="cpu")
    assert lm.architecture.family == family and lm.layers == 3 and not lm.model.training
    assert down_of(lm, 1) == (SITES[family].down_projection or "model.layers.{}.mlp.experts").format(1)
    assert lm.digest == load(saved(tmp_path, family), device="cpu").digest


@pytest.mark.parametrize("family", families())
def test_every_name_of_an_architecture_is_a_module(family: str) -> None:
    model, architecture = build(family.removesuffix("_text")), architecture_of(family)
    names = {"embedding", "block", "attention", "mlp", "mlp_norm", "down_projection", "final_norm", "head"}
    if family in EXPERTS:
        names = names - {"down_projection"} | {"experts", "router"}
    for name in names:
        if (where := getattr(architecture, name)) is not None:
            model.get_submodule(where.format(1))
    down = architecture.experts if family in EXPERTS else architecture.down_projection
    assert down is not None
    stored = "in_out" if family in ("gpt2", "gpt_oss") else "out_in"
    assert orientation(model.get_submodule(down.format(1)), "") == stored


def test_the_bundled_model(atlas_lm: LanguageModel) -> None:
    assert atlas_lm.name == "atlas" and atlas_lm.dtype == torch.float32 and atlas_lm.layers == 8
    weights = load_file(BUNDLED["atlas"] / "model.safetensors")
    assert all(t.dtype == torch.float16 for t in weights.values())
    assert (BUNDLED["atlas"] / "model.safetensors").stat().st_size <= 25 << 20
    assert sum(p.numel() for p in atlas_lm.model.parameters()) <= 12_000_000


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom"])
def test_it_is_the_model_that_transformers_loads(family: str, tmp_path: Path) -> None:
    """Bits, buffers that are in no file among them; and no random number was drawn."""
    folder = saved(tmp_path, family)
    before = torch.random.get_rng_state()
    ours = load(folder, device="cpu").model
    assert torch.equal(torch.random.get_rng_state(), before)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(ours) is type(theirs) and ours.config.to_dict() == theirs.config.to_dict()
    assert digests(tensors_of(ours)) == digests(tensors_of(theirs))


def test_first_weights_are_left_out_on_the_meta_device_alone() -> None:
    with _NoFirstWeights():
        torch.manual_seed(0)
        real = torch.nn.Linear(3, 2)
        assert torch.nn.init.zeros_(torch.ones(2)).tolist() == [0, 0]
        empty = torch.nn.Linear(3, 2, device="meta")
    torch.manual_seed(0)
    assert torch.equal(real.weight, torch.nn.Linear(3, 2).weight) and empty.weight.is_meta


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "auto"])
def test_dtypes(dtype: str | torch.dtype) -> None:
    expected = dtype if isinstance(dtype, torch.dtype) else torch.float16
    assert load("atlas", device="cpu", dtype=dtype).dtype == expected


def test_unknown_names_say_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"No model 'gpt2-xxl'.*Without a network use model=atlas") as caught:
        load("gpt2-xxl")
    assert "\n" not in str(caught.value)


def test_an_unknown_family_says_which_are_known(tmp_path: Path) -> None:
    build("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "xglm"}))
    with pytest.raises(ModelError, match=r"model family 'xglm' \(known: bloom, deepseek_v2, .*23 in all"):
        load(tmp_path)


def test_folders_that_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it holds nothing"):
        load(tmp_path)
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load(folder)


def test_remote_code_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code of the repository ran')")
    with pytest.raises(ModelError, match=r"needs code from its repository.*trust_remote_code"):
        load(folder)


@pytest.mark.parametrize("options", [{"device": "gpu"}, {"dtype": "float12"}])
def test_wrong_devices_and_dtypes(options: dict[str, Any]) -> None:
    ((option, value),) = options.items()
    with pytest.raises(ModelError, match=f"No {option} '{value}'"):
        load("atlas", **options)


def test_damaged_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="does not load"):
        load(folder)
    save_file({"other": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack \d+ parameters"):
        load(folder)


@pytest.mark.gpu
def test_auto_takes_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert load("atlas").device.type == "cuda"


@pytest.mark.hub
def test_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.undo()
    try:
        huggingface_hub.HfApi().model_info("openai-community/gpt2", timeout=5)
    except Exception as error:
        pytest.skip(f"needs the Hugging Face Hub: {type(error).__name__}")
    assert load("openai-community/gpt2", device="cpu").layers == 12


def test_experts_run_in_float64_too(tmp_path: Path) -> None:
    """By the loop over experts: the grouped products that transformers takes else know no float64."""
    folder = saved(tmp_path, "mixtral")
    ids = torch.arange(2, 16).view(2, 7)
    with torch.no_grad():
        exact, single = (
            load(folder, device="cpu", dtype=dtype).model(ids).logits for dtype in (torch.float64, "float32")
        )
    assert exact.dtype == torch.float64 and (exact - single).abs().max() <= 1e-5 * exact.abs().max()
