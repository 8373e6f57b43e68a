"""The lenses against plain hooks, transformers' own attentions, autograd and differences of edited runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import editkit
from editkit import Fact
from editkit.edits import Edit, base_of, dense_delta, low_rank_delta
from editkit.errors import EditkitError, FactError
from editkit.lenses import (
    attention_to_subject,
    before_and_after,
    logit_lens,
    side_effects,
    stream_change,
)
from editkit.models.architecture import as_matrix, experts_in, orientation, weight_name
from editkit.models.experts import down_of, keys_of
from editkit.models.load import LanguageModel
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import plain_nll, tokens_of, untouched
from tests.hooking import by_hand

FAMILIES = list(SITES)
FACT = Fact("Because of this the town of {} is in the state of", "Big Ben", "Oslo")
TEXTS = ["The Eiffel Tower is located in the city of", "Rain", "The capital of the country France is the city of"]
TARGETS = ["Rome", "Berlin Madrid", "Oslo"]


def ids_of(lm: LanguageModel, text: str) -> Tensor:
    return torch.tensor([lm.tokenizer(text)["input_ids"]])


def keeping(kept: list[Tensor], shaped: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """A hook that keeps the input, or as a forward hook the output."""

    def keep(module: nn.Module, *passed: Any) -> None:
        h = passed[-1]
        kept.append(shaped(h[0] if isinstance(h, tuple) else h))

    return keep


def capped(lm: LanguageModel, logits: Tensor) -> Tensor:
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def random_edit(lm: LanguageModel, layer: int = 1, rank: int = 2) -> Edit:
    site = down_of(lm, layer)
    module = lm.model.get_submodule(site)
    weight = lm.model.get_parameter(weight_name(site, experts_in(module)))
    d_model, d_ff = as_matrix(weight, orientation(module, site)).shape
    g = torch.Generator().manual_seed(layer)
    left, right = torch.randn(d_model, rank, generator=g) / 50, torch.randn(rank, d_ff, generator=g)
    return Edit((low_rank_delta(lm, site, left, right),), base_of(lm))


def with_odd_bits(lm: LanguageModel) -> LanguageModel:
    """A buffer with a NaN and a −0.0, and a −0.0 in a weight: what comparing values would not see lost."""
    lm.model.register_buffer("odd", torch.tensor([float("nan"), -0.0]))
    with torch.no_grad():
        lm.model.get_parameter(f"{lm.architecture.down(1)}.weight")[0, 0] = -0.0
    return lm


# Answers over depth


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_depth_is_the_models_own_answer(family: str) -> None:
    lm = tiny_lm(family)
    words = ["Oslo", "Rome"]
    with torch.no_grad():
        logits = lm.model(ids_of(lm, FACT.text)).logits[0, -1].double()
    found = logit_lens(lm, FACT.text, words)
    pairs = [tokens_of(lm, FACT.text, word) for word in words]
    first = [ids[len(ids) - count] for ids, count in pairs]
    assert found.probability.shape == found.rank.shape == (lm.layers + 1, 2) and len(found.said) == lm.layers + 1
    assert torch.allclose(found.probability[-1], logits.softmax(-1)[first], rtol=1e-5, atol=0)
    assert found.rank[-1].tolist() == [int((logits > logits[i]).sum()) for i in first]
    assert found.said[-1] == lm.tokenizer.decode([int(logits.argmax())])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_inner_depth_is_the_norm_and_the_head_of_a_hooked_stream(family: str) -> None:
    lm = tiny_lm(family)
    found = logit_lens(lm, FACT.text, ["Oslo"])
    ids, count = tokens_of(lm, FACT.text, "Oslo")
    sites = [SITES[family].block.format(i) for i in range(lm.layers)]
    kept = []
    handle = lm.model.get_submodule(sites[0]).register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad(), by_hand(lm.model, sites) as seen:
        lm.model(ids_of(lm, FACT.text))
    handle.remove()
    norm, head = lm.model.get_submodule(lm.architecture.final_norm), lm.model.get_output_embeddings()
    assert head is not None
    with torch.no_grad():
        for depth, stream in enumerate([kept[0], *(seen[site] for site in sites)]):
            logits = capped(lm, head(norm(stream.view(1, -1, stream.shape[-1])[0, -1]))).double()
            probability = logits.softmax(-1)[ids[len(ids) - count]]
            assert found.probability[depth, 0].item() == pytest.approx(probability.item(), rel=1e-4), depth
    assert len({f"{p:.6f}" for p in found.probability[:, 0].tolist()}) == lm.layers + 1  # no depth is another's


def test_the_lens_as_a_table_and_what_it_refuses() -> None:
    lm = tiny_lm("gpt2")
    found = logit_lens(lm, FACT.text, ["Oslo", "Rome"])
    frame = found.to_frame()
    assert list(frame.columns) == ["depth", "word", "probability", "rank", "said"] and len(frame) == 8
    row = frame[(frame.depth == 2) & (frame.word == "Rome")].iloc[0]
    assert (row.probability, row["rank"], row.said) == (
        found.probability[2, 1].item(),
        int(found.rank[2, 1]),
        found.said[2],
    )
    for words in ([], [""], ["Oslo", "  "]):
        with pytest.raises(EditkitError, match="name one or more, none of them empty"):
            logit_lens(lm, FACT.text, words)
    with pytest.raises(FactError):
        logit_lens(lm, "", ["Oslo"])


# Attention to the subject


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_the_attention_modules_give_under_eager(family: str) -> None:
    lm, other = tiny_lm(family), tiny_lm(family)
    before = lm.model.config._attn_implementation
    found = attention_to_subject(lm, FACT)
    other.model.config._attn_implementation = "eager"
    kept: list[Tensor] = []
    handles = []
    for i in range(lm.layers):

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(next(each for each in output[1:] if each is not None and each.ndim == 4))

        handles.append(other.model.get_submodule(SITES[family].attention.format(i)).register_forward_hook(keep))
    with torch.no_grad():
        own = other.model(ids_of(lm, FACT.text), output_attentions=True, use_cache=False).attentions
    for handle in handles:
        handle.remove()
    tokens = len(found.tokens)
    assert found.weights.shape == (lm.layers, lm.model.config.num_attention_heads, tokens)
    for block in range(lm.layers):
        assert torch.equal(found.weights[block], own[block][0, :, -1])
        assert torch.equal(found.weights[block], kept[block][0, :, -1])
    sums = found.weights.sum(-1)
    assert torch.allclose(sums, torch.ones(1), atol=1e-5) or (family == "gpt_oss" and (sums < 1).all())  # to a sink
    first, last = found.subject
    assert "".join(found.tokens[first : last + 1]).strip() == "Big Ben"
    summed = torch.stack([found.weights[..., i] for i in range(first, last + 1)]).sum(0)
    assert torch.allclose(found.to_subject, summed) and 0 < found.to_subject.min() < found.to_subject.max() < 1
    assert lm.model.config._attn_implementation == before


def test_attention_of_gpt2_from_its_queries_and_keys() -> None:
    lm = tiny_lm("gpt2")
    found = attention_to_subject(lm, FACT)
    with torch.no_grad(), by_hand(lm.model, ["transformer.h.1.attn.c_attn"]) as seen:
        lm.model(ids_of(lm, FACT.text))
    q, k, _ = seen["transformer.h.1.attn.c_attn"][0].view(-1, 3, 4, 8).unbind(1)  # [tokens, heads, d_head]
    scores = torch.einsum("hd,thd->ht", q[-1], k) / 8**0.5
    assert torch.allclose(found.weights[1], scores.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_the_models_own_attention_is_set_back(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    lm.model.set_attn_implementation(before)
    attention_to_subject(lm, FACT)
    assert lm.model.config._attn_implementation == before

    def broken(*args: Any, **kwargs: Any) -> None:
        assert lm.model.config._attn_implementation == "eager"
        raise KeyboardInterrupt

    monkeypatch.setattr(lm.model.model.layers[1], "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        attention_to_subject(lm, FACT)
    assert lm.model.config._attn_implementation == before


def test_a_model_whose_attention_gives_no_weights_is_named() -> None:
    lm = tiny_lm("gpt2")
    handle = lm.model.get_submodule("transformer.h.1.attn").register_forward_hook(
        lambda _, __, output: (output[0], None)
    )
    with pytest.raises(EditkitError, match="'gpt2' gives attention weights in 2 of 3 blocks"):
        attention_to_subject(lm, FACT)
    handle.remove()


# Side effects


@pytest.mark.parametrize("family", FAMILIES)
def test_the_change_is_that_of_the_modules_output_with_the_edit(family: str) -> None:
    lm = tiny_lm(family)
    edit = random_edit(lm, layer=1, rank=1)
    site = down_of(lm, 1)
    found = side_effects(lm, edit, TEXTS)
    assert found.drop is None and found.prompts == tuple(TEXTS) and found.cosine_key.isnan().all()
    right = edit.deltas[0].right
    assert right is not None
    u = right[0].double()
    for i, text in enumerate(TEXTS):
        ids = ids_of(lm, text)
        keys: list[Tensor] = []
        seen: list[Tensor] = []
        handle = lm.model.get_submodule(site).register_forward_pre_hook(keeping(keys, lambda h: h))
        puts_out = lm.model.get_submodule(site)
        later = puts_out.register_forward_hook(keeping(seen, lambda h: h.flatten(0, -2).clone()))
        with torch.no_grad():
            lm.model(ids)
            with edit.applied(lm):
                lm.model(ids)
        handle.remove()
        later.remove()
        before, after = seen
        moved = (after - before).norm(dim=-1)  # [tokens]
        where = moved.argmax()
        assert found.change[i].item() == pytest.approx(moved[where].item(), rel=1e-4)
        assert found.relative[i].item() == pytest.approx((moved / before.norm(dim=-1))[where].item(), rel=1e-4)
        of_text = keys_of(lm, site, keys[0].view(ids.shape[1], -1)).double()
        cosines = torch.cosine_similarity(of_text, u, dim=-1)
        assert found.cosine[i].item() == pytest.approx(cosines[cosines.abs().argmax()].item(), abs=1e-5)


def two_blocks(lm: LanguageModel) -> Edit:
    return Edit(tuple(random_edit(lm, layer=block).deltas[0] for block in (0, 2)), base_of(lm))


def nlls(lm: LanguageModel) -> list[Tensor]:
    return [plain_nll(lm.model, [tokens_of(lm, *pair)]) for pair in zip(TEXTS, TARGETS, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drop_is_the_gradient_of_the_weights_times_the_edit(family: str) -> None:
    """No hooks: the whole model's backward pass to the weights, ⟨∂(−log p)/∂W, ΔW⟩ summed over both blocks."""
    lm = tiny_lm(family)
    edit = two_blocks(lm)
    weights = [lm.model.get_parameter(delta.parameter) for delta in edit.deltas]
    wanted = []
    for nll in nlls(lm):
        gradients = torch.autograd.grad(nll, weights)
        wanted.append(sum((g * d.matrix()).sum().item() for g, d in zip(gradients, edit.deltas, strict=True)))
    found = side_effects(lm, edit, TEXTS, TARGETS)
    assert found.drop is not None and found.drop.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert found.drop.abs().min() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi"])  # those that compute in float64 throughout
def test_the_drop_is_the_slope_of_the_log_probability(family: str) -> None:
    """Central differences in float64 through the model with ± a hundred-thousandth of the edit applied."""
    lm, step = tiny_lm(family, dtype=torch.float64), 1e-5
    edit = two_blocks(lm)
    with torch.no_grad():
        with (edit * step).applied(lm, check=False):
            above = nlls(lm)
        with (edit * -step).applied(lm, check=False):
            below = nlls(lm)
    slopes = [(a - b).item() / (2 * step) for a, b in zip(above, below, strict=True)]
    found = side_effects(lm, edit, TEXTS, TARGETS)
    assert found.drop is not None and found.drop.tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom", "gemma2"])
def test_many_prompts_at_once_are_as_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.lenses.prediction.BATCH", 2)
    lm = tiny_lm(family)
    edit = random_edit(lm, layer=1)
    together = side_effects(lm, edit, TEXTS, TARGETS)
    for i, (text, target) in enumerate(zip(TEXTS, TARGETS, strict=True)):
        alone = side_effects(lm, edit, [text], [target])
        for name in ("change", "relative", "cosine", "drop"):
            assert getattr(alone, name)[0].item() == pytest.approx(getattr(together, name)[i].item(), rel=1e-4), name
    none = side_effects(lm, edit, [])
    assert none.change.shape == (0,) and none.drop is None


def test_what_a_rank_one_edit_reads_has_its_sign_and_a_wider_one_has_none() -> None:
    lm = tiny_lm("gpt2")
    one, two = random_edit(lm, rank=1), random_edit(lm, rank=2)
    right, both = one.deltas[0].right, two.deltas[0].right
    assert right is not None and both is not None
    turned = low_rank_delta(lm, one.deltas[0].module, -one.deltas[0].left, -right)  # the same ΔW
    a, b = side_effects(lm, one, TEXTS), side_effects(lm, Edit((turned,), one.base), TEXTS)
    assert torch.equal(a.change, b.change) and torch.equal(a.cosine, -b.cosine)
    wide = side_effects(lm, two, TEXTS)
    for text, cosine in zip(TEXTS, wide.cosine, strict=True):
        keys: list[Tensor] = []
        site = lm.model.get_submodule(two.deltas[0].module)
        handle = site.register_forward_pre_hook(keeping(keys, lambda h: h[0].double()))
        with torch.no_grad():
            lm.model(ids_of(lm, text))
        handle.remove()
        read = both.double().T  # [d_ff, 2]
        part = read @ torch.linalg.lstsq(read, keys[0].detach().T).solution
        assert cosine.item() == pytest.approx((part.norm(dim=0) / keys[0].norm(dim=-1)).max().item(), rel=1e-6)


def test_factors_and_their_product_predict_the_same() -> None:
    lm = tiny_lm("llama")
    edit = random_edit(lm)
    delta = edit.deltas[0]
    dense = Edit((dense_delta(lm, delta.module, delta.change().float()),), edit.base)
    a, b = side_effects(lm, edit, TEXTS, TARGETS), side_effects(lm, dense, TEXTS, TARGETS)
    for name in ("change", "relative", "cosine", "drop"):
        assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-4), name


def test_the_edits_own_prompt_is_the_nearest_to_its_key() -> None:
    lm = tiny_lm("gpt2")
    edit = random_edit(lm, rank=1)
    said = {"facts": [{"prompt": FACT.prompt, "subject": FACT.subject, "target_new": "Oslo", "target_true": ""}]}
    edit = Edit(edit.deltas, edit.base, said)
    found = side_effects(lm, edit, [FACT.text, *TEXTS])
    assert found.cosine_key[0].item() == pytest.approx(1.0, abs=1e-6) and found.cosine_key[1:].abs().max() < 1


def test_what_side_effects_refuse() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(EditkitError, match="3 prompts were given with 1 targets"):
        side_effects(lm, random_edit(lm), TEXTS, ["Rome"])
    with pytest.raises(EditkitError, match="This edit was computed for"):
        side_effects(tiny_lm("gpt2", seed=1), random_edit(lm), TEXTS)


# Where an edit is felt


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_moves_by_the_difference_of_two_hooked_runs(family: str) -> None:
    lm = tiny_lm(family)
    edit = random_edit(lm, layer=1)
    found = stream_change(lm, edit, TEXTS[0])
    sites = [SITES[family].block.format(i) for i in range(lm.layers)]
    with torch.no_grad(), by_hand(lm.model, sites) as seen:
        lm.model(ids_of(lm, TEXTS[0]))
        before = dict(seen)
        with edit.applied(lm):
            lm.model(ids_of(lm, TEXTS[0]))
        after = dict(seen)
    assert found.norm.shape == found.relative.shape == (lm.layers, len(found.tokens))
    for block, site in enumerate(sites):
        d = before[site].shape[-1]
        was, now = before[site].view(-1, d).double(), after[site].view(-1, d).double()
        norm = torch.tensor([(n - w).pow(2).sum().sqrt() for w, n in zip(was, now, strict=True)]).double()
        assert torch.allclose(found.norm[block], norm, rtol=1e-5)
        assert torch.allclose(found.relative[block], norm / was.pow(2).sum(-1).sqrt(), rtol=1e-5)
    assert (found.norm[0] == 0).all() and (found.norm[1] > 0).all()


# What is left behind


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_looking_leaves_everything_as_it_was(family: str) -> None:
    lm = with_odd_bits(tiny_lm(family))
    edit = random_edit(lm, layer=1)
    with untouched(lm, lm.architecture.down(1)):
        logit_lens(lm, FACT.text, ["Oslo"])
        side_effects(lm, edit, TEXTS, TARGETS)
        side_effects(lm, edit, TEXTS)
        stream_change(lm, edit, FACT.text)
        attention_to_subject(lm, FACT)


def test_frozen_models_and_no_grad_are_no_hindrance() -> None:
    lm = tiny_lm("gpt2")
    edit = random_edit(lm)
    free = side_effects(lm, edit, TEXTS, TARGETS)
    lm.model.requires_grad_(False)
    with torch.no_grad():
        frozen = side_effects(lm, edit, TEXTS, TARGETS)
    assert free.drop is not None and frozen.drop is not None and torch.equal(free.drop, frozen.drop)
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_an_error_while_looking_at_the_edited_model_takes_the_edit_back() -> None:
    lm = with_odd_bits(tiny_lm("gpt2"))
    seen = []

    def look() -> None:
        seen.append(lm.model.get_parameter("transformer.h.1.mlp.c_proj.weight").detach().clone())
        if len(seen) == 2:
            raise KeyboardInterrupt

    with untouched(lm, lm.architecture.down(1)), pytest.raises(KeyboardInterrupt):
        before_and_after(lm, random_edit(lm), look)
    assert not torch.equal(*seen)
    before, after = before_and_after(lm, random_edit(lm), lambda: 1)
    assert (before, after) == (1, 1)


def test_they_are_had_from_editkit() -> None:
    for name in ("attention_to_subject", "logit_lens", "side_effects", "stream_change"):
        assert getattr(editkit, name).__module__.startswith("editkit.lenses.") and name in editkit.__all__
