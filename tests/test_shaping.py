"""Losses on activations and shaped gradients, each against loops and hooks written by hand, on GPT-2 (Conv1D) and
Llama (Linear)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit.activations.shaping import ActivationPenalty, clamp_norm, match_reference, project_off, rank_one
from editkit.errors import EditkitError, ModelError
from editkit.models.load import LanguageModel
from editkit.nethook import Trace, get_parameter
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import count_hooks
from tests.hooking import TEXTS, assert_same, batch_of, by_hand, gradients, sites_of

FAMILIES = ["gpt2", "llama"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lm(family: str) -> LanguageModel:
    return tiny_lm(family)


# Losses on activations

PENALTIES: dict[str, tuple[str | Callable[[Tensor], Tensor], Callable[[Tensor], Any]]] = {
    "l1": ("l1", lambda h: sum(h.abs().flatten()) / h.numel()),
    "l2": ("l2", lambda h: sum((h**2).flatten()) / h.numel()),
    "own": (lambda h: h.relu().amax(-1).mean(), lambda h: h.clamp(min=0).max(-1).values.sum() / h[..., 0].numel()),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalty_gradients_equal_those_written_by_hand(lm: LanguageModel, family: str, name: str, masked: bool) -> None:
    sites, batch = sites_of(family)[:2], batch_of(lm)
    given, plain = PENALTIES[name]
    with ActivationPenalty(lm.model, sites, given) as penalty:
        loss = lm.model(**batch).loss
        value = penalty(batch["attention_mask"] if masked else None)
        (loss + 0.3 * value).backward()
    mine = gradients(lm.model)
    lm.model.zero_grad()
    with by_hand(lm.model, sites) as seen:
        loss = lm.model(**batch).loss
    rows = [h[batch["attention_mask"].bool()] if masked else h for h in seen.values()]
    expected: Any = sum(plain(h) for h in rows) / len(rows)
    (loss + 0.3 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same(mine, gradients(lm.model), 1e-5)
    assert count_hooks(lm.model) == 0


def test_an_l1_penalty_makes_activations_smaller(lm: LanguageModel, family: str) -> None:
    site, batch = SITES[family].mlp_of(1), batch_of(lm)

    def trained(weight: float) -> Any:
        model = copy.deepcopy(lm.model)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(15):
            with ActivationPenalty(model, site) as penalty:
                loss = model(**batch).loss + weight * penalty(batch["attention_mask"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with by_hand(model, [site]) as seen:
            model(**batch)
        return seen[site][batch["attention_mask"].bool()].abs().mean().item()

    assert trained(5.0) < 0.8 * trained(0.0)


def test_a_penalty_leaves_no_hook_behind_an_exception_and_takes_one_step_a_body(lm: LanguageModel, family: str) -> None:
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(KeyboardInterrupt), ActivationPenalty(lm.model, site):
        raise KeyboardInterrupt
    with pytest.raises(EditkitError, match="open a new `with` for each step"), ActivationPenalty(lm.model, site) as p:
        for _ in range(2):
            lm.model(**batch)
            p()
    assert count_hooks(lm.model) == 0
    with ActivationPenalty(lm.model, site) as p:  # two runs, such as a pair of views, are one step
        lm.model(**batch)
        first = p().item()
    with p:
        lm.model(**batch)
        lm.model(input_ids=batch["input_ids"][:1])
        both = p().item()
    with p:
        lm.model(input_ids=batch["input_ids"][:1])
        assert both == pytest.approx((first + p().item()) / 2, rel=1e-5)


def test_penalties_that_cannot_be_taken_are_refused(lm: LanguageModel, family: str) -> None:
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(EditkitError, match="'l1', 'l2', or a function"):
        ActivationPenalty(lm.model, site, "l3")
    with ActivationPenalty(lm.model, site, lambda h: h) as penalty:
        lm.model(**batch)
        with pytest.raises(EditkitError, match="return one number"):
            penalty()
        with pytest.raises(EditkitError, match=r"The mask is \[1, 2\]"):
            penalty(torch.ones(1, 2))


def test_distance_from_a_reference_and_its_gradients(lm: LanguageModel, family: str) -> None:
    sites, batch = sites_of(family)[:2], batch_of(lm)
    model, reference = copy.deepcopy(lm.model), tiny_lm(family, seed=1).model
    graphs = []
    handle = reference.register_forward_hook(lambda module, args, out: graphs.append(out.logits.requires_grad))
    with match_reference(model, reference, sites) as distance:
        loss = model(**batch).loss
        value = distance(**batch)
        (loss + 0.1 * value).backward()
    handle.remove()
    assert graphs == [False]
    assert not gradients(reference) and count_hooks(reference) == 0 and count_hooks(model) == 0
    assert all(p.requires_grad for p in reference.parameters())
    with by_hand(lm.model, sites) as seen, by_hand(reference, sites) as wanted:
        loss = lm.model(**batch).loss
        reference(**batch)
    terms = []
    for site in sites:
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            terms.append(((seen[site][row, :length] - wanted[site][row, :length].detach()) ** 2).flatten())
    expected = torch.cat(terms).mean()  # both sites have one width, so the mean of means is the mean
    (loss + 0.1 * expected).backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_same(gradients(model), gradients(lm.model), 1e-5)
    with match_reference(lm.model, copy.deepcopy(lm.model), sites) as distance:
        lm.model(**batch)
        assert distance(**batch).item() == 0


def test_references_that_would_mislead_are_refused(lm: LanguageModel, family: str) -> None:
    site, batch = sites_of(family)[0], batch_of(lm)
    with pytest.raises(EditkitError, match="is the model itself"):
        match_reference(lm.model, lm.model, site)
    with pytest.raises(EditkitError, match="in training mode"):
        match_reference(lm.model, copy.deepcopy(lm.model).train(), site)
    with match_reference(lm.model, copy.deepcopy(lm.model), site) as distance:
        lm.model(**batch)
        with pytest.raises(EditkitError, match="give both the same inputs"):
            distance(input_ids=batch["input_ids"][:2])


# Shaping gradients


def test_project_off_takes_away_the_span_and_nothing_else(lm: LanguageModel, family: str) -> None:
    site, batch = sites_of(family)[0], batch_of(lm)
    basis = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [100.0], [0.01]])
    with Trace(lm.model, site, grads=True) as plain:
        lm.model(**batch).loss.backward()
    with Trace(lm.model, site, grads=True, edit_grad=project_off(basis)) as shaped:
        lm.model(**batch).loss.backward()
    units = basis / basis.norm(dim=1, keepdim=True)
    assert (shaped.grad @ units.T).abs().max() < 1e-6 < 1e-4 < (plain.grad @ units.T).abs().max()
    # What was taken away is in the span: least squares leaves no residual.
    taken = (plain.grad - shaped.grad).reshape(-1, 32).T.double()
    fitted = units.T.double() @ torch.linalg.lstsq(units.T.double(), taken).solution
    assert torch.allclose(fitted, taken, atol=1e-7)
    one = torch.eye(32)[5]
    assert torch.equal(project_off(one)(torch.ones(2, 32)), (1 - one).expand(2, 32))


def test_clamp_norm_shortens_what_is_too_long_and_turns_nothing(lm: LanguageModel, family: str) -> None:
    site, batch = sites_of(family)[0], batch_of(lm)
    with Trace(lm.model, site, grads=True) as plain:
        lm.model(**batch).loss.backward()
    norms = plain.grad.norm(dim=-1)
    limit = norms[norms > 0].median().item()
    with Trace(lm.model, site, grads=True, edit_grad=clamp_norm(limit)) as shaped:
        lm.model(**batch).loss.backward()
    expected = plain.grad.clone()
    for row in range(norms.shape[0]):
        for token in range(norms.shape[1]):
            if norms[row, token] > limit:
                expected[row, token] *= limit / norms[row, token]
    assert torch.allclose(shaped.grad, expected, atol=1e-9, rtol=1e-5)
    assert (norms > 1.01 * limit).any() and (shaped.grad.norm(dim=-1) <= limit * (1 + 1e-6)).all()
    assert clamp_norm(1.0)(torch.zeros(2, 3, dtype=torch.bfloat16)).tolist() == [[0.0] * 3] * 2  # 0/0 is not NaN


def test_shaping_refuses_what_it_cannot_do() -> None:
    for basis in (torch.ones(2, 4), torch.zeros(1, 4), torch.eye(4)[[0, 1, 2, 3, 0]], torch.full((1, 4), torch.nan)):
        with pytest.raises(EditkitError, match="depend on each other"):
            project_off(basis)
    with pytest.raises(EditkitError, match=r"rows of 4 numbers; the gradient is \[2, 3\]"):
        project_off(torch.eye(4)[:2])(torch.ones(2, 3))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(EditkitError, match="above 0 and finite"):
            clamp_norm(limit)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj"),  # Conv1D [64, 32]
        ("gpt2", "transformer.h.1.attn.c_proj"),  # Conv1D, square: no shape tells how it lies
        ("llama", "model.layers.1.mlp.down_proj"),  # Linear [32, 64]
        ("llama", "model.layers.1.self_attn.o_proj"),  # Linear, square
    ],
)
def test_rank_one_terms_sum_to_autograds_weight_gradient(family: str, site: str) -> None:
    lm = tiny_lm(family)
    batch, other = batch_of(lm), batch_of(lm, TEXTS[:2])
    switches = [p.requires_grad for p in lm.model.parameters()]

    def loss() -> Any:
        return lm.model(**batch).loss + 2 * lm.model(**other).loss

    found = rank_one(lm.model, site, loss)
    assert not gradients(lm.model) and count_hooks(lm.model) == 0
    assert switches == [p.requires_grad for p in lm.model.parameters()]
    assert len(found.keys) == len(found.grads) == batch["input_ids"].numel() + other["input_ids"].numel()
    loss().backward()
    grad = get_parameter(lm.model, f"{site}.weight").grad
    assert grad is not None and found.weight_grad().shape == grad.shape
    assert torch.allclose(found.weight_grad(), grad, atol=1e-6, rtol=1e-4)
    term = torch.outer(found.grads[0], found.keys[0])  # g kᵀ of the first position
    alone = type(found)(site, found.keys[:1], found.grads[:1], found.orientation).weight_grad()
    assert torch.equal(alone, term.T if found.orientation == "in_out" else term)


def test_rank_one_says_what_is_wrong(lm: LanguageModel, family: str) -> None:
    batch, down = batch_of(lm), SITES[family].down_of(1)
    with pytest.raises(ModelError, match="editkit edits the weights of Linear and Conv1D modules"):
        rank_one(lm.model, SITES[family].mlp_of(1), lambda: lm.model(**batch).loss)

    def elsewhere() -> Any:
        lm.model(**batch)
        return get_parameter(lm.model, f"{down}.weight").square().sum()

    @torch.no_grad()
    def dead() -> Any:
        return lm.model(**batch).loss

    for loss in (elsewhere, dead):
        with pytest.raises(EditkitError, match=f"gives '{down}' no gradient"):
            rank_one(lm.model, down, loss)
    assert count_hooks(lm.model) == 0 and get_parameter(lm.model, f"{down}.weight").requires_grad
