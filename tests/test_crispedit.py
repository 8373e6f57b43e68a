"""CrispEdit against a plain float64 loop with the projection written out."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editkit import Session
from editkit.corpora import running_text
from editkit.errors import ConfigError
from editkit.methods.crispedit import CrispEditSettings, crispedit, mask
from editkit.models.architecture import experts_in, weight_name
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.moments import packed_blocks
from editkit.nethook import get_module
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import tokens_of, untouched
from tests.conftest import Near
from tests.expert_oracle import memory_of
from tests.present import present
from tests.test_ft_bf import FACTS
from tests.test_ultraedit import TEXT, passed

PLAIN = CrispEditSettings(layers=(0, 1), steps=4, lr=2e-3, batch=2, stop_loss=0.0, tokens=60, energy=0.7)


def loop(lm: LanguageModel, settings: CrispEditSettings) -> list[Tensor]:
    """ΔW [d_model, d_ff] of each block, by Adam written out, each gradient projected entry by entry of M."""
    model = copy.deepcopy(lm.model).double()
    layers = present(settings.layers)
    memories = [memory_of(model, site_of(lm, layer)) for layer in layers]
    # 1) A and B.
    count, tokens = -(-settings.tokens // (TEXT.block - 1)), []
    for _, block in zip(range(count), packed_blocks(lm, running_text(TEXT.source), TEXT.block), strict=False):
        tokens.append(passed(model, memories, block.tolist(), list(range(TEXT.block - 1))))
    masks = []
    for number in range(len(layers)):
        a, g = (torch.cat([row[number][side] for row in tokens]) for side in (0, 1))
        (sigma_a, u_a), (sigma_b, u_b) = (torch.linalg.eigh(x.T @ x / len(x)) for x in (a, g))
        product = sigma_b.clamp(min=0)[:, None] * sigma_a.clamp(min=0)[None]
        total, tau = 0.0, 0.0
        for value in product.flatten().sort(descending=True).values.tolist():
            total, tau = total + value, value
            if total >= settings.energy * product.sum().item():
                break
        masks.append((u_a, u_b, (product < tau).double()))
    # 2) The loop.
    names = [down_of(lm, layer) for layer in layers]
    parameters = [model.get_parameter(weight_name(name, experts_in(model.get_submodule(name)))) for name in names]
    start = [memory.matrix().detach().clone() for memory in memories]
    rows = [tokens_of(lm, fact.text, fact.target_new) for fact in FACTS]
    if settings.end_of_text:
        rows = [([*ids, lm.tokenizer.eos_token_id], n + 1) for ids, n in rows]
    order = torch.Generator().manual_seed(0)
    state = [(torch.zeros_like(w), torch.zeros_like(w)) for w in start]
    taken = 0
    for _ in range(settings.steps):
        drawn = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        for begin in range(0, len(drawn), settings.batch):
            nll = []
            for ids, n in drawn[begin : begin + settings.batch]:
                p = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
                nll += [-p[i - 1, ids[i]].log() for i in range(len(ids) - n, len(ids))]
            gradients = torch.autograd.grad(torch.stack(nll).mean(), parameters)
            taken += 1
            for number, (memory, stored, name) in enumerate(zip(memories, gradients, names, strict=True)):
                u_a, u_b, free = masks[number]
                gradient = of_matrix(lm, name, stored)
                gradient = u_b @ ((u_b.T @ gradient @ u_a) * free) @ u_a.T
                m, v = state[number]
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                state[number] = m, v
                step = m / (1 - 0.9**taken) / ((v / (1 - 0.999**taken)).sqrt() + 1e-8)
                with torch.no_grad():
                    memory.add(-present(settings.lr) * step)
    return [(memory.matrix() - w).detach() for memory, w in zip(memories, start, strict=True)]


def of_matrix(lm: LanguageModel, name: str, stored: Tensor) -> Tensor:
    """[d_model, d_ff], from a gradient as the module stores it."""
    if stored.ndim == 2:
        return stored.T if "Conv1D" in type(get_module(lm.model, name)).__name__ else stored
    transposed = getattr(get_module(lm.model, name), "is_transposed", False)
    return torch.cat([each.T if transposed else each for each in stored], 1)


@pytest.mark.parametrize("family", SITES)
def test_equal_to_a_plain_loop(family: str, near: Near) -> None:
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    settings = replace(PLAIN, end_of_text=family != "qwen2")
    edit = crispedit(lm, FACTS, settings, moments=TEXT, progress=False)
    # Adam's first steps are the signs of the gradient, whose small entries float32 does not have.
    within = 3e-2 if family == "gemma2" else 1e-4
    for delta, expected in zip(edit.deltas, loop(lm, settings), strict=True):
        near("crispedit", family, delta.change(), expected, within)
    assert all(0 < each["free"] < 1 for each in edit.provenance["modules"])


def test_the_mask_leaves_the_directions_under_tau() -> None:
    out, into = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0, 3.0])  # products 1 2 3 and 4 8 12, of 30 in all
    assert mask(out, into, 0.39).tolist() == [[True] * 3, [True, True, False]]  # 12 hold .4
    assert mask(out, into, 0.5).tolist() == [[True] * 3, [True, False, False]]  # 12 and 8 hold .67
    assert not mask(out, into, 0.999).any()


def test_the_curvature_is_of_the_unedited_model(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with Session(lm, "crispedit", PLAIN, moments=TEXT, progress=False) as session:
        first = session.edit(FACTS[0])
        session.save(tmp_path)
        second = session.edit(FACTS[1])
        alone = crispedit(lm, FACTS[2], PLAIN, moments=TEXT, progress=False)  # on the edited model
        third = session.edit(FACTS[2])
        assert not torch.equal(third.deltas[0].left, alone.deltas[0].left)
    assert crispedit(lm, FACTS[0], PLAIN, moments=TEXT, progress=False).to_bytes() == first.to_bytes()
    with Session.load(tmp_path, lm, moments=TEXT, progress=False) as again:
        assert again.edit(FACTS[1]).to_bytes() == second.to_bytes()


def test_the_model_is_left_as_it_was() -> None:
    lm = tiny_lm("llama")
    with untouched(lm, lm.architecture.down(1)):
        assert crispedit(lm, FACTS, PLAIN, moments=TEXT, progress=False).norm() > 0


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="method.energy must be between 0 and 1"):
        CrispEditSettings(energy=1.0)
    with pytest.raises(ConfigError, match="method.tokens must be positive"):
        CrispEditSettings(tokens=0)
