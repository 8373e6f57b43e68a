"""Convert a llama2.c model (version 0 checkpoint and tokenizer) to a Hugging Face folder that `editkit.load` reads.

    python scripts/convert_llama2c.py stories260K.bin tok512.bin --out models/stories260K
    python -m editkit.run model=models/stories260K edit.subject=... edit.prompt=... edit.target_new=...

The checkpoint holds a header of seven int32 and float32 matrices (karpathy/llama2.c, `export.py`, legacy_export). Its
rotary pairs are neighbours, those of transformers lie half a head apart, so rows of the query and key matrices change
places.
"""

import argparse
import struct
import sys
from pathlib import Path

import numpy
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"


def read_model(path: Path) -> LlamaForCausalLM:
    """The checkpoint as a transformers model. Raises ValueError when the file's size is not what its header says."""
    data = path.read_bytes()
    if len(data) < 28:
        raise ValueError(f"'{path}' has {len(data)} bytes: it is no llama2.c checkpoint.")
    dim, d_ff, layers, heads, kv_heads, vocabulary, positions = struct.unpack("<7i", data[:28])
    tied, vocabulary = vocabulary > 0, abs(vocabulary)
    if not (0 < dim < 1 << 16 and 0 < heads <= dim and 0 < kv_heads <= heads and dim % heads == 0 and layers > 0):
        raise ValueError(f"'{path}' is no llama2.c checkpoint of version 0: its header is {dim, d_ff, layers, heads}.")
    head = dim // heads
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocabulary, dim),
        "attention_norm": (layers, dim),
        "q": (layers, dim, dim),
        "k": (layers, kv_heads * head, dim),
        "v": (layers, kv_heads * head, dim),
        "o": (layers, dim, dim),
        "mlp_norm": (layers, dim),
        "gate": (layers, d_ff, dim),
        "down": (layers, dim, d_ff),
        "up": (layers, d_ff, dim),
        "final_norm": (dim,),
        "cosines": (positions, head // 2),
        "sines": (positions, head // 2),
    }
    if not tied:
        shapes["head"] = (vocabulary, dim)
    wanted = 28 + 4 * sum(int(numpy.prod(shape)) for shape in shapes.values())
    if len(data) != wanted:
        raise ValueError(f"'{path}' has {len(data)} bytes; its header asks for {wanted}. Download it again.")
    values = torch.from_numpy(numpy.frombuffer(data, "<f4", offset=28).copy())
    part, at = {}, 0
    for name, shape in shapes.items():
        size = int(numpy.prod(shape))
        part[name], at = values[at : at + size].view(shape), at + size

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    state = {"model.embed_tokens.weight": part["embedding"], "model.norm.weight": part["final_norm"]}
    state["lm_head.weight"] = part["embedding"] if tied else part["head"]
    for i in range(layers):
        block = f"model.layers.{i}"
        state |= {
            f"{block}.input_layernorm.weight": part["attention_norm"][i],
            f"{block}.self_attn.q_proj.weight": halves_apart(part["q"][i], heads),
            f"{block}.self_attn.k_proj.weight": halves_apart(part["k"][i], kv_heads),
            f"{block}.self_attn.v_proj.weight": part["v"][i],
            f"{block}.self_attn.o_proj.weight": part["o"][i],
            f"{block}.post_attention_layernorm.weight": part["mlp_norm"][i],
            f"{block}.mlp.gate_proj.weight": part["gate"][i],
            f"{block}.mlp.down_proj.weight": part["down"][i],
            f"{block}.mlp.up_proj.weight": part["up"][i],
        }
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def halves_apart(weight: Tensor, heads: int) -> Tensor:
    """Rows (pair, 2) of each head put as (2, pair): [heads · d_head, dim]."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The tokenizer: pieces with scores, merged best score first, unknown characters as bytes."""
    data, at = path.read_bytes(), 4  # after the longest piece's length
    pieces: dict[str, tuple[int, float]] = {}
    try:
        for number in range(vocabulary):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            text = data[at - length : at].decode("utf-8").replace(" ", "▁")
            pieces[{0: UNKNOWN, 1: BEGIN, 2: END}.get(number, text)] = number, score
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no tokenizer of llama2.c with {vocabulary} pieces: {error}.") from error
    ids = {text: number for text, (number, _) in pieces.items()}
    merges = [
        (score, text[:cut], text[cut:])
        for text, (number, score) in pieces.items()
        if number > 258  # after the special pieces and the bytes
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    merges.sort(key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))
    bpe = Tokenizer(
        models.BPE(ids, [(a, b) for _, a, b in merges], unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BEGIN, END)])
    bpe.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    try:
        model = read_model(options.checkpoint)
        tokenizer = read_tokenizer(options.tokenizer, model.config.vocab_size)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"wrote {options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
