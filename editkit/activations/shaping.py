"""Losses on activations, and functions that change gradients on their way back.

Each is a short use of `nethook.Trace`; hooks are removed on every exit. A name that the model lacks is a HookError.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from editkit.errors import EditkitError, ModelError
from editkit.models.architecture import experts_in, orientation
from editkit.models.precision import wide
from editkit.nethook import Trace, get_module, requires_grad


def _wide(h: Tensor) -> Tensor:
    """At least float32: sums over many half-precision elements lose what they add."""
    return h.to(wide(h.dtype))


# Losses on activations


class ActivationPenalty:
    """A differentiable penalty on the outputs of named modules, for one training step.

        with ActivationPenalty(model, select(model, "transformer.h.*.mlp"), "l1") as penalty:
            loss = model(**batch).loss + 0.01 * penalty(batch["attention_mask"])
        loss.backward()

    `penalty`: "l1" (mean |h|), "l2" (mean h²), or a function from a site's output [batch, tokens, d] to a scalar. The
    value is the mean over sites and runs. With a `mask` [batch, tokens], padding is left out, and the function gets
    [positions, d]. The body is one step: if the model runs again after the penalty was computed, the next call raises
    EditkitError.
    """

    def __init__(
        self, model: nn.Module, sites: str | Iterable[str], penalty: str | Callable[[Tensor], Tensor] = "l1"
    ) -> None:
        known: dict[Any, Callable[[Tensor], Tensor]] = {"l1": lambda h: h.abs().mean(), "l2": lambda h: (h * h).mean()}
        if not callable(penalty) and penalty not in known:
            raise EditkitError(f"penalty={penalty!r}: give 'l1', 'l2', or a function from a tensor to a scalar.")
        self._penalty = penalty if callable(penalty) else known[penalty]
        self._trace = Trace(model, sites, calls="all", detach=False)
        self._taken = 0

    def __enter__(self) -> Self:
        self._taken = 0
        self._trace.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._trace.__exit__(*error)

    def __call__(self, mask: Tensor | None = None) -> Tensor:
        """The penalty, a scalar with a graph. `mask`: [batch, tokens], 1 for tokens and 0 for padding."""
        runs = self._runs()
        values = [self._penalty(_wide(_kept(h, mask, site))) for site, hs in runs.items() for h in hs]
        for value in values:
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise EditkitError(f"The penalty function gave {got}: return one number as a tensor, such as h.mean().")
        return _mean(values)

    def _runs(self) -> dict[str, list[Tensor]]:
        runs = {site: [call.output for call in self._trace[site].calls] for site in self._trace.sites}
        count = sum(map(len, runs.values()))
        if self._taken not in (0, count):
            raise EditkitError("The model ran again after the penalty was taken: open a new `with` for each step.")
        self._taken = count
        return runs


class ReferenceMatch(ActivationPenalty):
    """See `match_reference`."""

    def __init__(self, model: nn.Module, reference: nn.Module, sites: str | Iterable[str]) -> None:
        super().__init__(model, sites)
        if reference is model or reference.training:
            problem = "the model itself" if reference is model else "in training mode, so dropout would move its target"
            raise EditkitError(f"The reference is {problem}: give a frozen copy, copy.deepcopy(model).eval().")
        self._reference = reference

    def __call__(self, mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """The loss, a scalar with a graph. `inputs`: those of the model's call, whose padding is left out."""
        runs = self._runs()
        with torch.no_grad(), Trace(self._reference, list(runs), calls="all") as trace:
            self._reference(**inputs)
        mask = inputs.get("attention_mask") if mask is None else mask
        values = []
        for site, hs in runs.items():
            wanted = [call.output for call in trace[site].calls]
            if [h.shape for h in hs] != [w.shape for w in wanted]:
                raise EditkitError(
                    f"'{site}' gave {[list(h.shape) for h in hs]} in the model and {[list(w.shape) for w in wanted]} "
                    "in the reference: give both the same inputs, and a reference of the same architecture."
                )
            for h, w in zip(hs, wanted, strict=True):
                difference = _wide(_kept(h, mask, site)) - _wide(_kept(w.to(h.device), mask, site))
                values.append((difference * difference).mean())
        return _mean(values)


def match_reference(model: nn.Module, reference: nn.Module, sites: str | Iterable[str]) -> ReferenceMatch:
    """Mean squared distance from a frozen reference's activations at `sites`, for one training step.

        with match_reference(model, reference, "transformer.h.5") as distance:
            loss = model(**batch).loss + 0.1 * distance(**batch)
        loss.backward()

    The reference runs without a graph. Raises EditkitError for a reference in training mode or of other shapes.
    """
    return ReferenceMatch(model, reference, sites)


def _kept(h: Tensor, mask: Tensor | None, site: str) -> Tensor:
    if mask is None:
        return h
    if h.shape[:2] != mask.shape:
        raise EditkitError(f"The mask is {list(mask.shape)} and '{site}' gives {list(h.shape)}: give [batch, tokens].")
    return h[mask.to(h.device).bool()]


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([v.reshape(()).to(values[0].device) for v in values]).mean()


# Shaping gradients: for Trace(edit_grad=…), and the outer products of a weight's gradient


def project_off(basis: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that subtracts from g [..., d] its projection on the span of the rows of `basis` [k, d] (or [d]).

    For `Trace(edit_grad=…)`. Raises EditkitError when the rows are linearly dependent, and when g has another width.
    """
    rows = torch.atleast_2d(basis.detach()).double()
    q, r = torch.linalg.qr(rows.T)  # q [d, k]
    size = rows.norm(dim=-1)
    if len(rows) > rows.shape[1] or not (r.diagonal().abs() > 1e-6 * size).all():
        raise EditkitError(
            f"The {len(rows)} rows of the basis, of {rows.shape[1]} numbers each, depend on each other, are zero or "
            "are not finite: QR would add directions that you did not give. Leave out the rows that repeat others."
        )

    def edit(g: Tensor) -> Tensor:
        if g.shape[-1] != len(q):
            raise EditkitError(f"The basis has rows of {len(q)} numbers; the gradient is {list(g.shape)}.")
        gradient = _wide(g)
        span = q.to(gradient)
        rest: Tensor = gradient - gradient @ span @ span.T
        return rest.to(g.dtype)

    return edit


def clamp_norm(limit: float) -> Callable[[Tensor], Tensor]:
    """A function that scales g [..., d] down to an L2 norm of `limit` at each position where it is longer.

    For `Trace(edit_grad=…)`. Raises EditkitError for a limit that is not positive and finite.
    """
    if not 0 < limit < math.inf:
        raise EditkitError(f"clamp_norm({limit}): the limit must be above 0 and finite.")

    def edit(g: Tensor) -> Tensor:
        gradient = _wide(g)
        norm = gradient.norm(dim=-1, keepdim=True)
        return torch.where(norm > limit, gradient * (limit / norm), gradient).to(g.dtype)

    return edit


@dataclass(frozen=True, eq=False)
class RankOne:
    """The factors of a linear module's weight gradient Σ g kᵀ, a sum over positions of terms of rank one."""

    module: str
    keys: Tensor  # [positions, d_in], inputs of the module
    grads: Tensor  # [positions, d_out], dloss/doutput
    orientation: str  # of the weight, see `models.architecture.orientation`

    def weight_grad(self) -> Tensor:
        """Σ g kᵀ, shaped like the weight: [d_out, d_in] for Linear, [d_in, d_out] for Conv1D."""
        return self.keys.T @ self.grads if self.orientation == "in_out" else self.grads.T @ self.keys


def rank_one(model: nn.Module, module: str, loss: Callable[[], Tensor]) -> RankOne:
    """Keys and output gradients at one Linear or Conv1D `module`.

    `loss` runs the model and returns a scalar. No parameter's `.grad` is written. For a tied weight the result is this
    module's part of the gradient. Raises ModelError for another kind of module, EditkitError when the loss does not
    depend on it.
    """
    linear = get_module(model, module)
    layout = orientation(linear, module)
    if experts_in(linear) is not None:
        raise ModelError(
            f"'{module}' holds many experts, whose keys are not its input: choose a Linear or Conv1D module."
        )
    with torch.enable_grad(), requires_grad(model, only=[f"{module}.weight"]):
        with Trace(model, module, inputs=True, calls="all", detach=False) as trace:
            value = loss()
        outputs = [call.output for call in trace.calls]
        keys = [call.input.detach() for call in trace.calls]
        grads = torch.autograd.grad(value, outputs, allow_unused=True) if value.requires_grad else [None]
    if all(g is None for g in grads):
        raise EditkitError(
            f"The loss gives '{module}' no gradient: let `loss` run the model without no_grad, and choose a module "
            "that its value passes through."
        )
    pairs = [(k.flatten(0, -2), g.flatten(0, -2)) for k, g in zip(keys, grads, strict=True) if g is not None]
    return RankOne(module, torch.cat([k for k, _ in pairs]), torch.cat([g for _, g in pairs]), layout)
