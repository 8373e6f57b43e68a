"""Causal tracing of a model whose weights were set by hand, so that where it recalls is known.

At the subject the MLP of one block looks its name up and writes the answer; the attention of the last block copies that
to the last token. Nothing else in the model does anything.
"""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from editkit import Fact, trace
from editkit.models.architecture import architecture_of
from editkit.models.load import LanguageModel
from editkit.settings import TRACE_KINDS, TraceSettings

WORDS = ["the", "city", "of", "Paris", "Rome", "is", "in", "France", "Italy"]
FACT = Fact("the city of {} is in", "Paris", "Italy", "France")
SUBJECT, LAST = 3, 5  # tokens
NAME, LOOKED_UP, COPIED = (0, 1), (4, 5), (6, 7)  # dimensions: of Paris and Rome, of what each is answered by


def by_hand(idle: int) -> LanguageModel:
    """`idle` blocks that do nothing, one with the MLP that looks up, one with the attention that copies."""
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=8,
        n_layer=idle + 2,
        n_head=1,
        n_inner=2,
        n_positions=16,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        for word, token in zip(WORDS, range(len(WORDS)), strict=True):
            dimension = NAME[("Paris", "Rome").index(word)] if word in ("Paris", "Rome") else 2
            model.get_parameter("transformer.wte.weight")[token, dimension] = 1.0
        mlp = model.get_submodule(f"transformer.h.{idle}.mlp")
        attention = model.get_submodule(f"transformer.h.{idle + 1}.attn")
        for i in range(2):
            # The normed name is 2.6; everything else is far below the threshold.
            mlp.get_parameter("c_fc.weight")[NAME[i], i] = 10.0
            mlp.get_parameter("c_fc.bias")[i] = -15.0
            mlp.get_parameter("c_proj.weight")[i, LOOKED_UP[i]] = 0.5
            # Values; queries and keys are 0: even attention.
            attention.get_parameter("c_attn.weight")[LOOKED_UP[i], 16 + COPIED[i]] = 1.0
            attention.get_parameter("c_proj.weight")[COPIED[i], COPIED[i]] = 20.0
            model.get_parameter("lm_head.weight")[7 + i, COPIED[i]] = 9.0
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="the")
    return LanguageModel("by-hand", model, found, architecture_of("gpt2"))


def sites(idle: int) -> dict[str, set[tuple[int, int]]]:
    """Where each kind brings the answer back, all of it; nothing comes back anywhere else."""
    looks_up, copies = idle, idle + 1
    state = {(SUBJECT, block) for block in range(copies)} | {(LAST, copies)}
    return {
        "state": state,
        "mlp": {(SUBJECT, looks_up)},
        "attention": {(LAST, copies)},
        "severed_mlp": {(SUBJECT, looks_up), (LAST, copies)},  # before the look-up it is of no use
        "severed_attention": state,  # the attention that matters is the last token's, not the subject's
    }


@pytest.mark.parametrize("engine", ["replay", "full"])
@pytest.mark.parametrize("idle", [0, 1])
def test_the_known_sites_and_no_other(idle: int, engine: str) -> None:
    """Rome in the place of Paris: the rest of the stream has the same mean and size, so what comes back is exact."""
    lm = by_hand(idle)
    settings = TraceSettings(corruption="swap", window=1, kinds=TRACE_KINDS, engine=engine)
    found = trace(lm, FACT, settings, others=["Rome", "Paris"], progress=False)
    assert (found.answer, found.others, found.subject) == ("France", ("Rome",), (SUBJECT, SUBJECT))
    assert found.clean > 0.99 and found.corrupted < 0.01
    for kind, wanted in sites(idle).items():
        share = found.indirect_effect(kind) / found.total_effect
        expected = torch.zeros_like(share)
        for place in wanted:
            expected[place] = 1.0
        assert torch.allclose(share, expected, atol=1e-5), (kind, share)


@pytest.mark.parametrize("idle", [0, 1])
def test_noise_finds_them_too(idle: int) -> None:
    found = trace(by_hand(idle), FACT, TraceSettings(window=1, kinds=TRACE_KINDS), progress=False)
    for kind, wanted in sites(idle).items():
        effect = found.indirect_effect(kind)
        here = torch.zeros_like(effect, dtype=torch.bool)
        for place in wanted:
            here[place] = True
        # The noise that stays on the subject passes through the norm before the copy, so not all comes back there.
        assert effect[here].min() > 0.6 * found.total_effect > 0.2, kind
        assert effect[~here].abs().max() < 0.01, kind
