"""A llama2.c model of our own: its two files, and a slow forward pass that reads them as llama2.c's `run.c` does.

The model is trained here on three sentences, so that it has a story to tell: seconds on a
CPU. `forward` and `encode` share no code with scripts/convert_llama2c.py nor with transformers.
"""

import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Array = NDArray[numpy.float64]

STORY = "Once upon a time, there was a little fox named Ada. She lived by the sea and counted ships."
OTHERS = [f"Once upon a time, there was a little {animal}." for animal in ("bear named Otto", "cat named Mia")]
WORDS = [" " + word for text in (STORY, *OTHERS) for word in text.replace(",", "").replace(".", "").split()]
MERGED = sorted({word[:end] for word in WORDS for end in range(2, len(word) + 1)}, key=lambda text: (len(text), text))
DIM, D_FF, LAYERS, HEADS, KV_HEADS, POSITIONS = 32, 64, 4, 4, 2, 128


def pieces() -> list[str]:
    """Three specials, 256 bytes, the characters, then the merged pieces: the layout of llama2.c's tokenizers."""
    characters = sorted(set(STORY + "".join([*OTHERS, *MERGED])))
    return ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *characters, *MERGED]


def write_tokenizer(path: Path) -> None:
    """Longest piece, then (score, length, text) each; of the pieces the earlier merges first."""
    raw = [piece.encode() for piece in pieces()]
    data = struct.pack("<i", max(map(len, raw)))
    for number, text in enumerate(raw):
        data += struct.pack("<fi", -float(number) if number > 258 else 0.0, len(text)) + text
    path.write_bytes(data)


def encode(text: str) -> list[int]:
    """BOS, then the text with a space in front: the best-scored pair is merged until none is a piece."""
    ids = {piece: number for number, piece in enumerate(pieces())}
    found = [ids[character] for character in " " + text]
    while True:
        texts = [pieces()[i] for i in found]
        pairs = [(ids[a + b], at) for at, (a, b) in enumerate(pairwise(texts)) if a + b in ids]
        if not pairs:
            return [1, *found]
        new, at = min(pairs)  # scores fall with the number
        found[at : at + 2] = [new]


def trained() -> LlamaForCausalLM:
    """A tiny Llama that tells STORY."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces()),
        hidden_size=DIM,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    texts = [torch.tensor(encode(text)) for text in (STORY, STORY, *OTHERS)]  # twice: the likeliest of the three
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # <unk> behind the shorter ones
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=0).backward()
        optimizer.step()
    return model.eval()


def write_checkpoint(model: LlamaForCausalLM, path: Path) -> None:
    """The version 0 file: seven int32, then float32 matrices kind by kind; rotary pairs are neighbours."""
    state = {name: value.detach().float() for name, value in model.state_dict().items()}

    def all_blocks(name: str, heads: int | None = None) -> Tensor:
        found = [state[f"model.layers.{i}.{name}.weight"] for i in range(LAYERS)]
        if heads is not None:
            found = [w.view(heads, 2, -1, DIM).transpose(1, 2).reshape(w.shape) for w in found]
        return torch.stack(found)

    tables = torch.zeros(2, POSITIONS, DIM // HEADS // 2)  # cosines and sines: readers compute their own
    parts = [
        state["model.embed_tokens.weight"],
        all_blocks("input_layernorm"),
        all_blocks("self_attn.q_proj", HEADS),
        all_blocks("self_attn.k_proj", KV_HEADS),
        all_blocks("self_attn.v_proj"),
        all_blocks("self_attn.o_proj"),
        all_blocks("post_attention_layernorm"),
        all_blocks("mlp.gate_proj"),
        all_blocks("mlp.down_proj"),
        all_blocks("mlp.up_proj"),
        state["model.norm.weight"],
        tables,
    ]
    header = struct.pack("<7i", DIM, D_FF, LAYERS, HEADS, KV_HEADS, len(pieces()), POSITIONS)
    path.write_bytes(header + b"".join(part.numpy().astype("<f4").tobytes() for part in parts))


def forward(path: Path, ids: Sequence[int]) -> Array:
    """Logits [tokens, vocabulary] in float64 from the file, token by token and head by head."""
    data = path.read_bytes()
    dim, d_ff, layers, heads, kv_heads, vocabulary, _ = struct.unpack("<7i", data[:28])
    values, at, size = numpy.frombuffer(data, "<f4", offset=28).astype(float), 0, dim // heads

    def take(*shape: int) -> Array:
        nonlocal at
        begin, at = at, at + int(numpy.prod(shape))
        return values[begin:at].reshape(shape)

    table, norm1 = take(vocabulary, dim), take(layers, dim)
    q, k = take(layers, dim, dim), take(layers, kv_heads * size, dim)
    v, o = take(layers, kv_heads * size, dim), take(layers, dim, dim)
    norm2, gate = take(layers, dim), take(layers, d_ff, dim)
    down, up, last = take(layers, dim, d_ff), take(layers, d_ff, dim), take(dim)

    def normed(x: Array, weight: Array) -> Array:
        scaled: Array = weight * x / numpy.sqrt((x**2).mean() + 1e-5)
        return scaled

    def rotated(x: Array, position: int) -> Array:
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000.0 ** ((i % size) / size)
            c, s = numpy.cos(angle), numpy.sin(angle)
            out[i], out[i + 1] = x[i] * c - x[i + 1] * s, x[i] * s + x[i + 1] * c
        return out

    past: list[list[tuple[Array, Array]]] = [[] for _ in range(layers)]
    logits: list[Any] = []
    for position, token in enumerate(ids):
        x = table[token].copy()
        for layer in range(layers):
            h = normed(x, norm1[layer])
            query = rotated(q[layer] @ h, position)
            past[layer].append((rotated(k[layer] @ h, position), v[layer] @ h))
            mixed = numpy.zeros(dim)
            for head in range(heads):
                mine = slice(head * size, (head + 1) * size)
                group = head // (heads // kv_heads)
                theirs = slice(group * size, (group + 1) * size)
                scores = numpy.array([query[mine] @ key[theirs] for key, _ in past[layer]]) / numpy.sqrt(size)
                weights = numpy.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[mine] = sum(w * value[theirs] for w, (_, value) in zip(weights, past[layer], strict=True))
            x = x + o[layer] @ mixed
            h = normed(x, norm2[layer])
            g = gate[layer] @ h
            x = x + down[layer] @ (g / (1 + numpy.exp(-g)) * (up[layer] @ h))
        logits.append(table @ normed(x, last))
    return numpy.array(logits)
