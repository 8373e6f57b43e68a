"""Predict what an edit will do to other prompts from their keys and gradients, before it is applied.

Let k′ be the input of the edited weight at a token of another prompt. The edit changes the output there by ΔW k′. Let g
be the gradient of an answer's log p at that output. To first order, log p decreases by −Σ g · ΔW k′.
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
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import keys_of
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import Scored, encode_with_targets, spaced, tokenise, unflatten
from editkit.nethook import Trace, requires_grad
from editkit.shown import Rows, Shown

BATCH = 16  # prompts in one forward pass
PROMPTS_SHOWN = 5  # in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class SideEffects(Shown):
    """The predicted effect of an edit on other prompts. All tensors are [prompts], float64."""

    prompts: tuple[str, ...]
    change: Tensor  # ‖ΔW k′‖ at the token where it is largest, all edited weights together
    relative: Tensor  # at the same token ‖ΔW k′‖ / ‖m‖, where m is the output of the unedited weights
    cosine: Tensor  # cos(k′, u) of largest size over tokens, with its sign; u: the input directions of ΔW
    cosine_key: Tensor  # likewise cos(k′, k) with the key of the edited fact; NaN if the edit does not name one fact
    drop: Tensor | None = None  # −Σ g · ΔW k′ over tokens: the decrease of log p(target), to first order

    def shown(self) -> tuple[str, Rows]:
        """The prompts that the edit moves most, and by how much."""
        order = self.relative.argsort(descending=True).tolist()
        rows = [(self.prompts[i], f"‖ΔW k′‖/‖m‖ {self.relative[i].item():.4f}") for i in order[:PROMPTS_SHOWN]]
        more = [("", f"and {len(order) - PROMPTS_SHOWN:,} more")] if len(order) > PROMPTS_SHOWN else []
        return "Predicted side effects", [*rows, *more]


@in_eval_mode
def side_effects(
    lm: LanguageModel, edit: Edit, prompts: Sequence[str], targets: Sequence[str] | None = None
) -> SideEffects:
    """Predict how much `edit` will change the outputs of its weights for `prompts`, from the unedited model's keys.

    This is exact for the first edited block; in later blocks the edit changes the keys as well.

    - `prompts`: texts. `targets`: a continuation of each; with them, `drop` is the decrease of the target's mean
      log-probability per token.

    Raises EditkitError for an edit of another base, one that is more than a change of weights, or another number of
    targets than prompts.
    """
    edit.require_weights("side_effects")
    edit.check_base(lm, whole=False)
    if targets is not None and len(targets) != len(prompts):
        raise EditkitError(f"{len(prompts)} prompts were given with {len(targets)} targets: give one for each.")
    own = _own_keys(lm, edit)
    written = [_Written(delta, _directions(delta), own.get(delta.module)) for delta in edit.deltas]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths, little padding
    predicted: dict[int, tuple[float, ...]] = {}
    for begin in range(0, len(order), BATCH):
        part = order[begin : begin + BATCH]
        asked = [spaced(targets[i]) if targets is not None else "" for i in part]
        scored = encode_with_targets(lm, [prompts[i] for i in part], asked)
        passed = _passed(lm, [each.delta.module for each in written], scored, graded=targets is not None)
        predicted |= {i: _predicted(lm, written, passed, scored, row) for row, i in enumerate(part)}
    values = torch.tensor([predicted[i] for i in range(len(prompts))], dtype=torch.float64).view(-1, 5)
    change, relative, cosine, cosine_key, drop = values.T
    return SideEffects(tuple(prompts), change, relative, cosine, cosine_key, None if targets is None else drop)


class _Written(NamedTuple):
    """What an edit adds to one weight."""

    delta: Delta
    directions: Tensor  # [r, d_ff], an orthonormal basis of the inputs that ΔW does not map to 0
    own: Tensor | None  # [d_ff], the key of the edit's own fact


def _passed(lm: LanguageModel, sites: Sequence[str], scored: Scored, *, graded: bool) -> Trace:
    """Capture inputs and outputs at `sites`; `graded`: also the gradient of each row's mean −log p per token."""
    with torch.set_grad_enabled(graded), requires_grad(lm.model, only=[]):
        # Copies, since Falcon adds to its MLP's output in place.
        with Trace(lm.model, sites, inputs=True, grads=graded, leaf=graded, clone=True) as trace:
            logits = lm.model(**scored.rows.inputs(), use_cache=False).logits
        if graded:
            nll_of_rows(logits, scored).sum().backward()
    return trace


def _predicted(
    lm: LanguageModel, written: Sequence[_Written], passed: Trace, scored: Scored, row: int
) -> tuple[float, ...]:
    """The fields of SideEffects for one row, in order; `drop` is 0 without gradients.

    `written`: by edited weight. `passed`: from `_passed`. `scored`: the batch, of which `row` is wanted.
    """
    rows, asked = len(scored.positions), scored.positions[row]
    tokens = asked[0] if asked else scored.rows.last(row) + 1  # of the prompt
    moved_by, put_out = torch.zeros(2, tokens, dtype=torch.float64)
    cosines, own_cosines, drop = [], [], 0.0

    def of_row(tensor: Tensor) -> Tensor:
        return unflatten(tensor, rows)[row].detach().double().cpu()

    for delta, directions, own in written:
        record = passed[delta.module]
        keys = keys_of(lm, delta.module, of_row(record.input))  # [tokens with the target's and padding, d_ff]
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
    """[r, d_ff]: an orthonormal basis of the row space of ΔW; for rank one the method's own u, with its sign."""
    if delta.right is not None and delta.rank == 1:
        return torch.nn.functional.normalize(delta.right.double(), dim=-1)
    _, s, vt = delta.svd()
    basis: Tensor = vt[s > 1e-6 * s.max()]
    return basis


def _into(keys: Tensor, basis: Tensor, *, signed: bool) -> Tensor:
    """[tokens]: the cosine of `keys` [tokens, d_ff] with the span of `basis` [r, d_ff]; `signed`: with its one row."""
    parts: Tensor = keys @ basis.T / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return parts[:, 0] if signed else parts.norm(dim=-1)


def _largest(values: Sequence[Tensor]) -> float:
    """The value of largest size, with its sign; NaN if there is none."""
    if not values:
        return float("nan")
    joined = torch.cat(list(values))
    return joined[joined.abs().argmax()].item()


@torch.no_grad()
def _own_keys(lm: LanguageModel, edit: Edit) -> dict[str, Tensor]:
    """{module: key [d_ff] of the edited fact}; empty unless the edit's provenance names exactly one fact."""
    facts = edit.provenance.get("facts", [])
    if len(facts) != 1:
        return {}
    fact = Fact(**facts[0])
    token = edit.provenance.get("settings", {}).get("token", "subject_last")
    rows = tokenise(lm, [fact.text])
    at = lookup_position(rows, 0, fact.prompt, fact.subject, token)
    with Trace(lm.model, [delta.module for delta in edit.deltas], inputs=True, outputs=False) as trace:
        lm.model(**rows.inputs(), use_cache=False)
    given = {site: unflatten(trace[site].input, 1)[0, at] for site in trace}
    return {site: keys_of(lm, site, x[None])[0].double().cpu() for site, x in given.items()}
