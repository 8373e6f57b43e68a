"""llama.cpp's logits with an edit's GGUF adapter, against ours, peft's and the merged folder's.

    pip install 'editkit[gguf]' llama-cpp-python
    python scripts/llamacpp.py                                # a minute; prints the tables
    python scripts/llamacpp.py --into experiments/llamacpp    # results.json, and the tables of its README

Two models are converted to GGUF in float32 and given an edit each: a tiny random Llama (factors of rank 1 and 3 at
two blocks), and the bundled atlas model (r_rome's edit of one fact). Printed is the largest absolute difference between
logits over all tokens of a few prompts. The difference of the unedited models is what the two libraries' arithmetic
makes of the same weights: llama.cpp looks GPT-2's GELU up in a table of half precision, so atlas differs more.
For atlas the probability of the new answer is printed too, on a base in 8 bits (Q8_0) as well.

llama.cpp's own convert_hf_to_gguf.py converts checkpoints of the Hub; the converter here is for these two alone.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from machine import commit
from marked import between, table
from torch import Tensor, nn

from editkit import Edit, Fact, load, r_rome
from editkit.edits import base_of, low_rank_delta, write_checkpoint
from editkit.files import write_text
from editkit.models.architecture import architecture_of, matrix_shape, orientation
from editkit.models.load import LanguageModel
from editkit.models.tokens import spaced
from editkit.nethook import get_module
from editkit.testing.tiny import build, byte_level_tokenizer

FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
PROMPTS = (FACT.text, "The Louvre is located in the city of", "The capital of France is")
Logits = Sequence[Tensor]  # one [tokens, vocabulary] for each prompt


def tiny_llama() -> LanguageModel:
    """A random Llama of three blocks, with a byte-level tokenizer as Llama 3 has one."""
    tokenizer = byte_level_tokenizer()
    return LanguageModel("tiny-llama", build("llama", len(tokenizer)), tokenizer, architecture_of("llama"))


def random_edit(lm: LanguageModel) -> Edit:
    """Of rank 1 at block 0 and of rank 3 at block 2, so that one of them has to be padded."""
    draw = torch.Generator().manual_seed(0)
    deltas = []
    for layer, rank in ((0, 1), (2, 3)):
        site = lm.architecture.down(layer)
        module = get_module(lm.model, site)
        d_model, d_ff = matrix_shape(module.get_parameter("weight").shape, orientation(module, site))
        left, right = 0.1 * torch.randn(d_model, rank, generator=draw), torch.randn(rank, d_ff, generator=draw)
        deltas.append(low_rank_delta(lm, site, left, right))
    return Edit(tuple(deltas), base_of(lm), {"method": "random"})


# --- converting a model -------------------------------------------------------------------------------------------


def convert(lm: LanguageModel, path: Path, quantization: GGMLQuantizationType = GGMLQuantizationType.F32) -> None:
    """Write a Llama or GPT-2 with a byte-level tokenizer as a GGUF model. `quantization`: of the matrices of blocks."""
    config, family = lm.model.config, lm.architecture.llama_cpp
    assert family in ("llama", "gpt2"), f"no converter for {lm.architecture.family}"
    llama = family == "llama"
    writer = GGUFWriter(None, family)
    # 1) Sizes.
    writer.add_type("model")
    writer.add_name(lm.name)
    whole = quantization == GGMLQuantizationType.F32
    writer.add_file_type(LlamaFileType.ALL_F32 if whole else LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(lm.layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if llama:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    # 2) The vocabulary.
    add_vocabulary(writer, lm.tokenizer, config.vocab_size)
    # 3) The weights.
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    names = get_tensor_name_map(arch, lm.layers)
    for name, weight in lm.model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float()
        if not llama and array.ndim == 2 and name.split(".")[-2].startswith("c_"):  # Conv1D
            array = array.T
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _rotated_in_pairs(array, config.head_dim)
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, f"llama.cpp has no name for {name}"
        kind = quantization if array.ndim == 2 and found.startswith("blk.") else GGMLQuantizationType.F32
        writer.add_tensor(found, quantize(array.contiguous().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Add a byte-level tokenizer's vocabulary of `size` tokens."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    special = {*tokenizer.all_special_tokens}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in parts["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)


def _rotated_in_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection as llama.cpp rotates them: (0, 1), (2, 3), … and not (0, d/2), (1, d/2 + 1)."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


# --- logits -------------------------------------------------------------------------------------------------------


def llama_logits(model: Path, ids: Sequence[Sequence[int]], adapter: Path | None = None) -> Logits:
    """The logits of llama.cpp, on one CPU thread, with a cache in float32 and without flash attention."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    found = []
    llm: Any = llama_cpp.Llama(
        str(model),
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        lora_path=None if adapter is None else str(adapter),
        verbose=False,
    )
    for row in ids:
        llm.reset()
        llm.eval(list(row))
        found.append(torch.from_numpy(numpy.array(llm.scores[: len(row)])))
    llm.close()
    return found


@torch.no_grad()
def torch_logits(model: nn.Module, ids: Sequence[Sequence[int]]) -> Logits:
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0] for row in ids]


def far(one: Logits, other: Logits) -> float:
    """The largest absolute difference."""
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def measured(lm: LanguageModel, edit: Edit, folder: Path) -> dict[str, float]:
    """Largest differences between logits, by what is compared; `lm` is as it was afterwards."""
    # 1) The base, the adapter, and the merged folder, as files.
    ids = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    base, merged, adapter = folder / "base.gguf", folder / "merged.gguf", folder / "edit.gguf"
    convert(lm, base)
    edit.to_gguf(adapter, lm)
    edit.to_peft(folder / "peft")
    write_checkpoint([edit.save(folder / "edit.safetensors")], lm, folder / "merged")
    merged_lm = load(str(folder / "merged"), device="cpu")
    convert(merged_lm, merged)
    # 2) Logits of all of them.
    plain = torch_logits(lm.model, ids)
    with edit.applied(lm):
        ours = torch_logits(lm.model, ids)
    of_merged = torch_logits(merged_lm.model, ids)
    theirs = llama_logits(base, ids, adapter)
    found = {
        "what the edit moves, ours": far(ours, plain),
        "unedited: llama.cpp, transformers": far(llama_logits(base, ids), plain),
        "llama.cpp with the adapter, ours": far(theirs, ours),
        "llama.cpp with the adapter, the merged folder in transformers": far(theirs, of_merged),
        "llama.cpp with the adapter, the merged folder in llama.cpp": far(theirs, llama_logits(merged, ids)),
    }
    adapted = peft.PeftModel.from_pretrained(lm.model, folder / "peft")
    found["llama.cpp with the adapter, peft"] = far(theirs, torch_logits(adapted, ids))
    adapted.unload()
    return found


def landed(lm: LanguageModel, edit: Edit, fact: Fact, folder: Path) -> dict[str, float]:
    """P(first token of target_new) after the fact's prompt, by what runs the model. `folder`: as `measured` left it."""
    ids = [lm.tokenizer(fact.text)["input_ids"]]
    token = lm.tokenizer(spaced(fact.target_new))["input_ids"][0]
    small = folder / "base-q8_0.gguf"
    convert(lm, small, quantization=GGMLQuantizationType.Q8_0)

    def p(logits: Logits) -> float:
        return logits[0][-1].double().softmax(-1)[token].item()

    with edit.applied(lm):
        ours = p(torch_logits(lm.model, ids))
    base, adapter = folder / "base.gguf", folder / "edit.gguf"
    return {
        "transformers, unedited": p(torch_logits(lm.model, ids)),
        "transformers, edited": ours,
        "llama.cpp, unedited": p(llama_logits(base, ids)),
        "llama.cpp with the adapter": p(llama_logits(base, ids, adapter)),
        "llama.cpp in Q8_0, unedited": p(llama_logits(small, ids)),
        "llama.cpp in Q8_0 with the adapter": p(llama_logits(small, ids, adapter)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write results.json there, and its README's tables")
    options = parser.parse_args()
    # 1) Measure.
    differences: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for lm in (tiny_llama(), load("atlas", device="cpu")):
            folder = Path(name) / lm.name
            folder.mkdir()
            edit = r_rome(lm, FACT) if lm.name == "atlas" else random_edit(lm)
            differences[lm.name] = measured(lm, edit, folder)
        answers = landed(lm, edit, FACT, folder)
    # 2) Tables.
    rows = [
        [what, *(f"{found[what]:.1e}" for found in differences.values())] for what in next(iter(differences.values()))
    ]
    tables = table(["largest difference of logits", *differences], rows)
    tables += ["", *table([f"P({FACT.target_new})", "atlas"], [[what, f"{p:.4f}"] for what, p in answers.items()])]
    print("\n".join(tables))
    # 3) Files.
    if options.into:
        versions = {name: version(name) for name in ("llama_cpp_python", "gguf", "peft", "transformers", "torch")}
        made = {"command": " ".join(["python", *sys.argv]), "commit": commit(), "versions": versions}
        results = made | {"differences": differences, "answers": answers}
        write_text(options.into / "results.json", json.dumps(results, indent=2) + "\n")
        said = ", ".join(f"{name} {number}" for name, number in versions.items())
        between(options.into / "README.md", "made", [f"`{made['command']}` at commit {made['commit']}; {said}."])
        between(options.into / "README.md", "tables", tables)


if __name__ == "__main__":
    main()
