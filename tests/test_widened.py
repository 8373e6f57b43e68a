"""scripts/widened.py: a small model's answers in a larger shape."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config
from widened import UNLIKELY, widened

import editkit

PROMPT = "The Eiffel Tower is located in the city of"


def test_the_larger_model_has_the_smaller_ones_logits() -> None:
    small = editkit.load("atlas", device="cpu")
    config = GPT2Config(n_layer=10, n_embd=384, n_head=12, vocab_size=2000)  # heads of 32 for 8 of 24
    wide = widened(small, config, "wide")
    blocks: Any = wide.model.get_submodule("transformer.h")
    ids = small.tokenizer(f"{PROMPT} Paris. Anna Freud was born in", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected, found = small.model(ids).logits, wide.model(ids).logits
    torch.testing.assert_close(found[..., :1024], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[..., 1024:], torch.full_like(found[..., 1024:], UNLIKELY), atol=0.01, rtol=0)
    for block in blocks:  # what an edit takes its keys from is not degenerate
        assert torch.linalg.matrix_rank(block.mlp.c_fc.weight) == 384


@pytest.mark.parametrize("sizes", [{"n_embd": 256}, {"n_layer": 4}, {"n_head": 4}, {"n_head": 32}, {"vocab_size": 9}])
def test_a_shape_that_cannot_hold_it_is_refused(sizes: dict[str, int]) -> None:
    all_sizes: dict[str, Any] = {"n_layer": 8, "n_embd": 384, "n_head": 12, **sizes}
    config = GPT2Config(**all_sizes)
    with pytest.raises(ValueError, match="can't hold 8 blocks of width 192, 8 heads and 1024 tokens"):
        widened(editkit.load("atlas", device="cpu"), config, "wide")
