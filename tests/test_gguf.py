"""An edit exported as a GGUF LoRA adapter: what the file holds, what is refused, and llama.cpp's logits with it."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS
from llamacpp import measured, random_edit, tiny_llama

from editkit.edits import Edit, base_of, dense_delta, low_rank_delta
from editkit.edits.__main__ import main
from editkit.errors import EditkitError
from editkit.models.architecture import architecture_of, families
from editkit.models.load import LanguageModel
from editkit.testing.tiny import tiny_lm
from tests.test_peft import edit_of


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the file says of itself, and its tensors, rows first as torch has them."""
    found = GGUFReader(path)
    says = {name: field.contents() for name, field in found.fields.items()}
    return says, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in found.tensors}


@pytest.mark.parametrize(("family", "name"), [("llama", "llama"), ("gpt2", "gpt2"), ("gpt_neox", "gptneox")])
def test_the_file_holds_the_edit(family: str, name: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    edit = edit_of(lm)  # of rank 1 at block 0 and of rank 3 at block 2
    errors = edit.to_gguf(tmp_path / "edit.gguf", lm)
    says, tensors = read(tmp_path / "edit.gguf")
    assert says["general.architecture"] == name and says["general.type"] == "adapter"
    assert says["adapter.type"] == "lora" and says["adapter.lora.alpha"] == 3.0
    assert says["editkit.base.digest"] == edit.base.digest and "random" in says["general.name"]
    assert set(tensors) == {f"blk.{block}.ffn_down.weight.lora_{side}" for block in (0, 2) for side in "ab"}
    for block, delta in zip((0, 2), edit.deltas, strict=True):
        a, b = (tensors[f"blk.{block}.ffn_down.weight.lora_{side}"] for side in "ab")
        assert a.shape == (3, 64) and b.shape == (32, 3) and a.dtype == b.dtype == torch.float32
        assert torch.equal(a[: delta.rank], delta.right) and torch.equal(b[:, : delta.rank], delta.left)  # type: ignore[arg-type]
        assert not a[delta.rank :].any() and not b[:, delta.rank :].any()
    assert list(errors) == edit.parameters and set(errors.values()) == {0.0}


def test_the_order_of_the_edit_does_not_matter(tmp_path: Path) -> None:
    """Errors stay with their weights, and the file is the same."""
    lm = tiny_lm("llama")
    edit = edit_of(lm)
    errors = edit.to_gguf(tmp_path / "a.gguf", lm, rank=2)
    turned = Edit(edit.deltas[::-1], edit.base, edit.provenance).to_gguf(tmp_path / "b.gguf", lm, rank=2)
    assert errors == turned and errors[edit.parameters[0]] == 0.0 < errors[edit.parameters[1]]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_dense_edit_is_cut_to_its_rank(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = edit_of(lm, dense=True)
    assert max(edit.to_gguf(tmp_path / "edit.gguf", lm).values()) < 1e-6
    says, tensors = read(tmp_path / "edit.gguf")
    assert says["adapter.lora.alpha"] == 3.0
    for block, delta in zip((0, 2), edit.deltas, strict=True):
        a, b = (tensors[f"blk.{block}.ffn_down.weight.lora_{side}"].double() for side in "ab")
        torch.testing.assert_close(b @ a, delta.change(), rtol=0, atol=1e-6)


def test_the_names_of_families_are_those_of_gguf() -> None:
    """gguf's own tables: the architecture is one of llama.cpp's, and our down-projection is its ffn_down."""
    stated = {family: architecture_of(family) for family in families()}
    known = {family: entry for family, entry in stated.items() if entry.llama_cpp}
    assert {"llama", "mistral", "gpt2"} <= set(known) and not any(entry.experts for entry in known.values())
    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    for entry in known.values():
        assert entry.llama_cpp is not None
        arch = by_name[entry.llama_cpp]
        assert MODEL_TENSOR.FFN_DOWN in MODEL_TENSORS[arch]
        names = get_tensor_name_map(arch, 12)
        assert names.get_name(f"{entry.down(11)}.weight", (".weight",)) == "blk.11.ffn_down.weight"


# What is refused


def attention_edit(lm: LanguageModel) -> Edit:
    delta = low_rank_delta(lm, "model.layers.1.self_attn.q_proj", torch.ones(32, 1), torch.ones(1, 32))
    return Edit((delta,), base_of(lm))


def experts_edit(lm: LanguageModel) -> Edit:
    return Edit((low_rank_delta(lm, "model.layers.0.mlp.experts", torch.ones(32, 1), torch.ones(1, 256)),), base_of(lm))


@pytest.mark.parametrize(
    ("family", "make", "says"),
    [
        ("mixtral", experts_edit, "family 'mixtral', whose experts llama.cpp holds in one tensor of its own"),
        ("gptj", edit_of, "family 'gptj', which llama.cpp does not run"),
        ("llama", attention_edit, "q_proj.weight, which is no down-projection .* permuted or joined"),
        ("llama", lambda lm: Edit((), base_of(lm)), "changes nothing"),
    ],
)
def test_what_llama_cpp_cannot_take_is_refused(family: str, make: Any, says: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    with pytest.raises(EditkitError, match=says):
        make(lm).to_gguf(tmp_path / "edit.gguf", lm)
    assert list(tmp_path.iterdir()) == []


def test_another_base_a_folder_and_no_gguf_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    wide = dense_delta(lm, lm.architecture.down(0), torch.ones(32, 64))
    object.__setattr__(wide, "left", torch.ones(32, 65))
    with pytest.raises(EditkitError, match=r"ΔW \[32, 65\], and the weight in 'tiny-llama' is \[32, 64\]"):
        Edit((wide,), base_of(lm)).to_gguf(tmp_path / "edit.gguf", lm)
    with pytest.raises(EditkitError, match=r"one file: name FILE\.gguf"):
        edit_of(lm).to_gguf(tmp_path / "folder", lm)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EditkitError, match=r"pip install 'editkit\[gguf\]'"):
        edit_of(lm).to_gguf(tmp_path / "edit.gguf", lm)
    assert list(tmp_path.iterdir()) == []


def test_the_command_reads_no_weights_of_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_lm("llama")
    lm.model.save_pretrained(tmp_path / "base")
    lm.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    path = edit_of(lm).save(tmp_path / "edit.safetensors")
    asked = ["export", str(path), "--to", "gguf", "--into", str(tmp_path / "edit.gguf")]
    assert main([*asked, "--model", str(tmp_path / "base")]) == 0
    assert "relative error 0.0e+00" in capsys.readouterr().out and len(read(tmp_path / "edit.gguf")[1]) == 4
    object.__setattr__(moved := Edit.load(path), "base", replace(moved.base, name=str(tmp_path / "gone")))
    moved.save(path)
    assert main(asked) == 1
    assert capsys.readouterr().err.endswith("Or name the base where it is now: --model NAME.\n")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_gives_our_logits(tmp_path: Path) -> None:
    """With the adapter on the converted base: ours, peft's, the merged folder's, and its own of the merged folder."""
    lm = tiny_llama()
    found = measured(lm, random_edit(lm), tmp_path)
    assert found.pop("what the edit moves, ours") > 1
    assert max(found.values()) < 1e-4, found
