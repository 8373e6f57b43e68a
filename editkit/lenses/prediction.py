"""What an edit will do to other prompts, told from their keys and gradients before it is applied.

With k′ what the edited weight reads at a token of another prompt, ΔW k′ is how much its output there will change, and
−Σ g · ΔW k′ how much log p of an answer will lose to first order, g being its gradient at that output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from editkit.edits import Delta, Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods.shared.likelihood import nll_of_rows
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import Scored, encode_with_targets, spaced, tokenise, unflatten
from editkit.nethook import Trace, requires_grad

BATCH = 16  # prompts side by side


@dataclass(frozen=True, eq=False)
class SideEffects:
    """What an edit will do to other prompts, predicted from their keys. Everything is [prompts], float64."""

    prompts: tuple[str, ...]
    change: Tensor  # ‖ΔW k′‖ at the token where it is largest, over the edited weights together
    relative: Tensor  # the same token's ‖ΔW k′‖ / ‖m‖, of what the weights put out unedited
    cosine: Tensor  # cos(k′, u), the largest in size over tokens, with its sign; u: the directions that ΔW reads
    cosine_key: Tensor  # cos(k′, k) with the edited fact's own key likewise; NaN where the edit does not say its fact
    drop: Tensor | None = None  # −Σ g · ΔW k′ over tokens: what log p(target) will lose, to first order


def side_effects(
    lm: LanguageModel, edit: Edit, prompts: Sequence[str], targets: Sequence[str] | None = None
) -> SideEffects:
    """How much `edit` will change what its weights put out for `prompts`, from the keys k′ of the model as it is.

    Exact for the first edited block; for later ones the keys themselves will have moved a little. With `targets`, a
    continuation of each prompt, `drop` is what the target's mean log-probability a token loses, by the gradient g of
    it at the outputs of the edited weights. Raises EditkitError for an edit of another base.
    """
    edit.check_base(lm, whole=False)
    if targets is not None and len(targets) != len(prompts):
        raise EditkitError(f"{len(prompts)} prompts were given with {len(targets)} targets: give one for each.")
    own = _own_keys(lm, edit)
    written = [_Written(delta, _directions(delta), own.get(delta.module)) for delta in edit.deltas]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padding
    found: dict[int, tuple[float, ...]] = {}
    for begin in range(0, len(order), BATCH):
        part = order[begin : begin + BATCH]
        asked = [spaced(targets[i]) if targets is not None else "" for i in part]
        scored = encode_with_targets(lm, [prompts[i] for i in part], asked)
        passed = _passed(lm, [each.delta.module for each in written], scored, graded=targets is not None)
        found |= {i: _predicted(written, passed, scored, row) for row, i in enumerate(part)}
    values = torch.tensor([found[i] for i in range(len(prompts))], dtype=torch.float64).view(-1, 5)
    change, relative, cosine, cosine_key, drop = values.T
    return SideEffects(tuple(prompts), change, relative, cosine, cosine_key, None if targets is None else drop)


class _Written(NamedTuple):
    """What an edit writes into one weight."""

    delta: Delta
    directions: Tensor  # [r, d_ff], orthonormal: what ΔW reads
    own: Tensor | None  # [d_ff], the key of the edit's own fact


def _passed(lm: LanguageModel, sites: Sequence[str], scored: Scored, *, graded: bool) -> Trace:
    """What passes through the edited weights; `graded`, with the gradient of each row's mean −log p a token."""
    with torch.set_grad_enabled(graded), requires_grad(lm.model, only=[]):
        # Falcon adds to what its MLP puts out in place, hence the copies.
        with Trace(lm.model, sites, inputs=True, grads=graded, leaf=graded, clone=True) as trace:
            logits = lm.model(**scored.rows.inputs(), use_cache=False).logits
        if graded:
            nll_of_rows(logits, scored).sum().backward()
    return trace


def _predicted(written: Sequence[_Written], passed: Trace, scored: Scored, row: int) -> tuple[float, ...]:
    """The fields of SideEffects of one row; `drop` is 0 where no gradient was taken."""
    rows, asked = len(scored.positions), scored.positions[row]
    tokens = asked[0] if asked else scored.rows.last(row) + 1  # of the prompt
    moved_by, put_out = torch.zeros(2, tokens, dtype=torch.float64)
    cosines, own_cosines, drop = [], [], 0.0

    def of_row(tensor: Tensor) -> Tensor:
        return unflatten(tensor, rows)[row].detach().double().cpu()

    for delta, directions, own in written:
        record = passed[delta.module]
        keys = of_row(record.input)  # [tokens with the target's and padding, d_ff]
        moved = _moved(delta, keys)
        moved_by += moved[:tokens].square().sum(-1)
        put_out += of_row(record.output)[:tokens].square().sum(-1)
        cosines.append(_into(keys[:tokens], directions, signed=delta.rank == 1))
        if own is not None:
            own_cosines.append(torch.cosine_similarity(keys[:tokens], own, dim=-1))
        if asked:
            drop += (of_row(record.grad) * moved).sum().item()
    where = int(moved_by.argmax())
    change, relative = moved_by[where].sqrt().item(), (moved_by[where] / put_out[where]).sqrt().item()
    return change, relative, _largest(cosines), _largest(own_cosines), drop


def _moved(delta: Delta, keys: Tensor) -> Tensor:
    """ΔW k for keys [tokens, d_ff]: [tokens, d_model]."""
    if delta.right is None:
        return keys @ delta.left.double().T
    return keys @ delta.right.double().T @ delta.left.double().T


def _directions(delta: Delta) -> Tensor:
    """[r, d_ff]: an orthonormal basis of what ΔW reads; of a rank-one edit u itself, whose sign is the method's."""
    if delta.right is not None and delta.rank == 1:
        return torch.nn.functional.normalize(delta.right.double(), dim=-1)
    _, s, vt = delta.svd()
    return vt[s > 1e-6 * s.max()]


def _into(keys: Tensor, basis: Tensor, *, signed: bool) -> Tensor:
    """[tokens]: the cosine of keys with the space of `basis`; `signed`: with its one direction, sign and all."""
    parts = keys @ basis.T / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return parts[:, 0] if signed else parts.norm(dim=-1)


def _largest(values: Sequence[Tensor]) -> float:
    """The value largest in size, with its sign; NaN of none."""
    if not values:
        return float("nan")
    joined = torch.cat(list(values))
    return joined[joined.abs().argmax()].item()


@torch.no_grad()
def _own_keys(lm: LanguageModel, edit: Edit) -> dict[str, Tensor]:
    """The key [d_ff] of the edit's fact at each of its weights, where its provenance names one fact."""
    facts = edit.provenance.get("facts", [])
    if len(facts) != 1:
        return {}
    fact = Fact(**facts[0])
    token = edit.provenance.get("settings", {}).get("token", "subject_last")
    rows = tokenise(lm, [fact.text])
    at = lookup_position(rows, 0, fact.prompt, fact.subject, token)
    with Trace(lm.model, [delta.module for delta in edit.deltas], inputs=True, outputs=False) as trace:
        lm.model(**rows.inputs(), use_cache=False)
    return {site: unflatten(trace[site].input, 1)[0, at].double().cpu() for site in trace}
