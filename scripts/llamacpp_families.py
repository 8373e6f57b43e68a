"""Is the down-projection of every family that we export llama.cpp's ffn_down? By llama.cpp's own conversion of each.

    git clone https://github.com/ggml-org/llama.cpp    # or unpack llama-cpp-python's source, which holds one
    python scripts/llamacpp_families.py llama.cpp      # a minute; --into experiments/llamacpp: families.json, table

A tiny random model of each family whose entry has `Architecture.llama_cpp` is saved, converted by the classes of
llama.cpp's convert_hf_to_gguf.py, with a vocabulary of ours, and run there without and with the adapter of an edit
of two blocks. The largest difference from our logits must stay about what it is without an edit. It is larger where
llama.cpp looks GELU up in a table of half precision.
"""

import argparse
import json
import logging
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from editkit.files import write_text
from editkit.models.architecture import architecture_of, families
from editkit.models.load import LanguageModel
from editkit.testing.tiny import build, byte_level_tokenizer

# What the conversion takes for granted: d_ff = 4 · d_model, one key for all heads, full attention in each sixth block.
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 128},
    "phi": {"intermediate_size": 128},
    "falcon": {"ffn_hidden_size": 128, "multi_query": True, "new_decoder_architecture": False},
    "gemma3": {"layer_types": ["sliding_attention"] * 4, "sliding_window": 64},
}
IDS = [list(range(2, 22)), list(range(40, 70))]


def named(family: str) -> str:
    """What editkit.testing.tiny calls a `config.model_type`."""
    return {"gemma3_text": "gemma3"}.get(family, family)


def convert(folder: Path, path: Path) -> None:
    """llama.cpp's conversion of a saved model, in float32. Its package `conversion` must be importable."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # pyright: ignore[reportMissingImports]
    from llamacpp import add_vocabulary

    # Names that it reads and transformers writes no more.
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    about |= {"n_ctx": about["n_positions"]} if about["model_type"] == "gpt2" else {}
    about |= {"num_kv_heads": 1} if about["model_type"] == "falcon" else {}
    write_text(folder / "config.json", json.dumps(about))
    sizes = ModelBase.load_hparams(folder, False)
    if about["model_type"] == "gpt_neox":
        sizes["rotary_pct"] = sizes["rope_parameters"]["partial_rotary_factor"]
    theirs: Any = get_model_class(get_model_architecture(sizes, ModelType.TEXT))

    class Converted(theirs):  # type: ignore[misc]
        model_arch = theirs.model_arch  # which each class must state itself

        def set_vocab(self) -> None:
            add_vocabulary(self.gguf_writer, byte_level_tokenizer(), len(byte_level_tokenizer()))

    Converted(folder, gguf.LlamaFileType.ALL_F32, path, hparams=sizes).write()


def measured(family: str, folder: Path) -> dict[str, float]:
    """The largest differences between logits, in the order of the table."""
    from llamacpp import far, llama_logits, random_edit, torch_logits

    tokenizer = byte_level_tokenizer()
    model = build(named(family), len(tokenizer), **OPTIONS.get(named(family), {}))
    lm = LanguageModel(f"tiny-{family}", model, tokenizer, architecture_of(family))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    convert(folder / "model", folder / "base.gguf")
    edit = random_edit(lm)
    edit.to_gguf(folder / "edit.gguf", lm)
    plain = torch_logits(model, IDS)
    with edit.applied(lm):
        ours = torch_logits(model, IDS)
    return {
        "what the edit moves": far(ours, plain),
        "unedited": far(llama_logits(folder / "base.gguf", IDS), plain),
        "with the adapter": far(llama_logits(folder / "base.gguf", IDS, folder / "edit.gguf"), ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="FOLDER", help="of llama.cpp")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="write families.json there, and its README's table")
    options = parser.parse_args()
    # Its gguf is as new as its conversion is.
    sys.path[:0] = [str(options.checkout / "gguf-py"), str(options.checkout)]
    logging.disable(logging.INFO)
    from machine import commit
    from marked import between, table

    found: dict[str, dict[str, float]] = {}
    for family in families():
        if architecture_of(family).llama_cpp:
            with tempfile.TemporaryDirectory() as folder:
                found[family] = measured(family, Path(folder))
            print(family, *(f"{name} {value:.1e}" for name, value in found[family].items()), sep="  ", flush=True)
    if options.into:
        command = ["python", sys.argv[0], options.checkout.name, *sys.argv[2:]]
        about = {"command": " ".join(command), "commit": commit(), "llama_cpp_python": version("llama_cpp_python")}
        write_text(options.into / "families.json", json.dumps(about | {"differences": found}, indent=2) + "\n")
        rows = [[family, *(f"{value:.1e}" for value in each.values())] for family, each in found.items()]
        between(options.into / "README.md", "families", table(["family", *next(iter(found.values()))], rows))


if __name__ == "__main__":
    main()
