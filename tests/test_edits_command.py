"""python -m editkit.edits: what edit files hold, on and off a model, merged, compared and exported."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from editkit import Edit, FtSettings, Session
from editkit.edits import write_checkpoint
from editkit.edits.__main__ import main
from editkit.edits.peft import SERVED_RANKS
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.models.load import load
from editkit.testing.tiny import tiny_lm
from tests.test_peft import edit_of, logits

FACTS = [Fact("{} is in the city of", "The Eiffel Tower", "Rome"), Fact("{} is in the city of", "Big Ben", "Oslo")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on the disk; one.safetensors, and two.safetensors made on top of it."""
    folder = tmp_path_factory.mktemp("edits")
    tiny = tiny_lm("llama")
    tiny.model.save_pretrained(folder / "base")
    tiny.tokenizer.save_pretrained(folder / "base")
    lm = load(str(folder / "base"))
    with Session(lm, "ft", FtSettings(layer=1, steps=3), progress=False) as session:
        for name, fact in zip(("one", "two"), FACTS, strict=True):
            session.edit(fact).save(folder / f"{name}.safetensors")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(each) for each in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_show(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show", home / "one.safetensors", home / "two.safetensors")
    one, two = (Edit.load(home / f"{name}.safetensors") for name in ("one", "two"))
    assert code == 0 and one.digest in out and two.digest in out and f"on top of  {one.digest[:16]}" in out
    assert "The Eiffel Tower is in the city of → Rome" in out and "model.layers.1.mlp.down_proj.weight" in out


def test_verify_puts_every_bit_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [home / "one.safetensors", home / "two.safetensors"]
    code, out, _ = run(capsys, "verify", *files, "--model", home / "base")
    assert code == 0 and out.count("whole, digest") == 2
    line = next(line for line in out.splitlines() if "restored" in line)
    before, edited, restored = (part.split()[-1] for part in line.split(": ")[1].split(", "))
    assert before == restored != edited and before == load(str(home / "base")).digest[:16]
    assert "all equal" in out
    # Out of order, cut short, and for another base: one line each, exit code 1.
    code, _, error = run(capsys, "verify", *reversed(files), "--model", home / "base")
    assert code == 1 and error.count("editkit: ") == 1 and "'" + str(files[1]) in error
    half = home / "half.safetensors"
    half.write_bytes(files[0].read_bytes()[:-100])
    code, _, error = run(capsys, "verify", half)
    assert code == 1 and error.count("\n") == 1 and str(half) in error
    other = tiny_lm("llama", seed=1)
    other.model.save_pretrained(home / "other")
    other.tokenizer.save_pretrained(home / "other")
    code, _, error = run(capsys, "verify", files[0], "--model", home / "other")
    assert code == 1 and "was computed for" in error


def test_apply_says_both_sides(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [home / "one.safetensors", home / "two.safetensors"]
    code, out, _ = run(capsys, "apply", *files, "--model", home / "base", "--tokens", 3)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == [
        "The",
        "without",
        "with",
        "Big",
        "without",
        "with",
    ]
    code, out, _ = run(capsys, "apply", files[0], "--model", home / "base", "--prompt", "Paris is", "--tokens", 3)
    assert out.splitlines()[0] == "Paris is"


def test_a_merged_checkpoint_is_the_edited_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [home / "one.safetensors", home / "two.safetensors"]
    code, out, _ = run(capsys, "merge", *files, "--model", home / "base", "--into", home / "merged")
    assert code == 0 and "the same when loaded again" in out
    lm = load(str(home / "base"))
    expected = lm.model.get_parameter("model.layers.1.mlp.down_proj.weight").detach().double()
    for path in files:
        expected = expected + Edit.load(path).deltas[0].change()
    merged = AutoModelForCausalLM.from_pretrained(home / "merged")  # without editkit
    weight = merged.get_parameter("model.layers.1.mlp.down_proj.weight").double()
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    assert AutoTokenizer.from_pretrained(home / "merged")("The")["input_ids"] == lm.tokenizer("The")["input_ids"]
    made_of = json.loads((home / "merged" / "edits.json").read_text(encoding="utf-8"))
    assert [each["facts"][0]["subject"] for each in made_of["edits"]] == ["The Eiffel Tower", "Big Ben"]
    assert made_of["digest"] == load(str(home / "merged")).digest
    code, _, error = run(capsys, "merge", *files, "--model", home / "base", "--into", home / "merged")
    assert code == 1 and "is there already" in error


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load(str(home / "base"))
    before = lm.digest

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(lm.tokenizer), "save_pretrained", full)
    with pytest.raises(EditkitError, match="No space left on device"):
        write_checkpoint([home / "one.safetensors"], lm, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == [] and lm.digest == before


def test_diff(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = home / "one.safetensors", home / "two.safetensors"
    assert run(capsys, "diff", one, one)[1] == "the same edit\n"
    code, out, _ = run(capsys, "diff", one, two)
    a, b = (Edit.load(path).deltas[0].change() for path in (one, two))
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()
    assert code == 0 and f"cosine {cosine:.4f}" in out and f"‖difference‖ {(a - b).norm():.4g}" in out
    assert "Big Ben" in out and "reports" not in out


# vLLM and SGLang


def test_a_served_adapter_keeps_their_rules(tmp_path: Path) -> None:
    """One rank and one alpha for all weights, no patterns, a rank that vLLM takes, names as peft writes them."""
    lm = tiny_lm("llama")
    edit = edit_of(lm)  # of rank 1 at block 0 and of rank 3 at block 2
    edit.to_peft(tmp_path / "served", served=True)
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["r"] in SERVED_RANKS
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["bias"] == "none"
    assert (
        "target_parameters" not in config
        and not config["fan_in_fan_out"]
        and isinstance(config["target_modules"], list)
    )
    tensors = load_file(tmp_path / "served" / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}
    assert all(name.startswith("base_model.model.model.layers.") for name in tensors)
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in tensors.items()} == {8}
    with edit.applied(lm):
        edited = logits(lm.model)
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path / "served")
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-5, atol=1e-5)


def test_what_servers_cannot_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EditkitError, match=r"Conv1D weights\. Merge it"):
        edit_of(tiny_lm("gpt2")).to_peft(tmp_path / "a", served=True)
    monkeypatch.setattr("editkit.edits.peft.SERVED_RANKS", (1, 2))
    with pytest.raises(EditkitError, match="rank 3, and vLLM takes 2 at most"):
        edit_of(tiny_lm("llama")).to_peft(tmp_path / "b", served=True)
    assert list(tmp_path.iterdir()) == []


def test_export(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "export", home / "one.safetensors", "--into", home / "adapter", "--to", "vllm", "--rank", 4
    )
    assert code == 0 and "relative error" in out
    assert json.loads((home / "adapter" / "adapter_config.json").read_text())["r"] == 8
