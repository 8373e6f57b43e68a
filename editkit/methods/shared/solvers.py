"""Two solvers for the δ of a value: Adam, as the authors' code has it, and steepest descent with Polyak's step.

A solver holds δ of the facts that are in the batch now. Each fact has its own place, state and clamp, and one call of
`step` moves all of them. No call waits for an accelerator.

**Adam** moves every coordinate by about its learning rate, so ‖δ‖ grows with the number of steps in all dimensions: 20
to 60 evaluations.

**Descent** asks how far down the gradient g the loss would be `aim` if it were linear there (Polyak 1969):

    δ ← δ − (loss − aim) / ‖g‖² · g

It has no learning rate. A step is held under a trust radius, which shrinks where the loss has not fallen and grows
where it has fallen as g promised. A δ that does not better the loss is left for the best one. Near the end the loss of
the likeliest answer is convex, a step falls short of its aim, and δ ends close to the boundary where the loss is
`stop_loss`: the least change that says the target, without a weight decay.
"""

from typing import Protocol

import torch
from torch import Tensor

from editkit.models.load import LanguageModel
from editkit.models.precision import wide
from editkit.settings import ValueSettings

# Descent's constants, measured on facts of the atlas that no study uses (experiments/solver).
AIM = 0.5  # the step's aim, as a share of stop_loss: at stop_loss itself the last steps would only come near to it
FIRST_RADIUS = 1.0  # of the trust radius, in units of ‖v0‖
AS_PROMISED = 0.3  # the least share of the promised fall in loss at which the radius grows
GROW = 2.0  # what a step's length is multiplied by for the next radius, where the loss has fallen as promised
SHRINK = 0.4  # and where it has not fallen
LAST_RADIUS = 1e-3  # a fact whose radius is under this has ended: no step helps it


class Solver(Protocol):
    """δ of the facts in a batch. Every tensor has a place for each of them."""

    delta: Tensor  # [sites, facts, d_model]: where the model is run next
    facts: list[int]  # which fact of the first batch has each place
    alive: Tensor  # [facts], False: it has ended, and its δ stays as it is

    def decay(self) -> Tensor:
        """The term of weight decay [facts] at `delta`, summed over sites."""
        ...

    def stuck(self) -> Tensor:
        """[facts], True where no step helps any more."""
        ...

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        """Move the facts that are alive.

        - `losses` [facts]: at `delta`.
        - `gradient` [sites, facts, d_model]: of the loss without weight decay.
        """
        ...

    def result(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """δ [sites, facts, d_model], and whether the clamp has held it back [facts]. `losses` [facts]: at `delta`."""
        ...

    def keep(self, places: list[int]) -> None:
        """Go on with the facts at these places alone."""
        ...


def solver(name: str, lm: LanguageModel, norms: Tensor, settings: ValueSettings) -> Solver:
    """The solver of this name at δ = 0. `norms` [facts, sites]: ‖v0‖. `settings`: resolved."""
    return (Descent if name == "descent" else Adam)(lm, norms, settings)


class _Places:
    """What both solvers hold."""

    def __init__(self, lm: LanguageModel, norms: Tensor, settings: ValueSettings) -> None:
        count, device, dtype = len(norms), lm.device, wide(lm.dtype)
        assert settings.clamp  # resolved by the method
        self._clamp = settings.clamp
        self._v0 = norms.T[..., None].to(device, dtype)  # ‖v0‖ [sites, facts, 1]
        width = lm.model.config.get_text_config().hidden_size
        self.delta = torch.zeros(*self._v0.shape[:2], width, dtype=dtype, device=device)
        self.facts = list(range(count))
        self.alive = torch.ones(count, dtype=torch.bool, device=device)

    def _over_limit(self, delta: Tensor) -> Tensor:
        """‖δ‖ / (clamp · ‖v0‖) [sites, facts, 1]."""
        size: Tensor = delta.norm(dim=-1, keepdim=True)
        return size / (self._clamp * self._v0)

    def keep(self, places: list[int]) -> None:
        self.delta, self._v0 = self.delta[:, places], self._v0[:, places]
        self.alive = self.alive[places]
        self.facts = [self.facts[i] for i in places]


class Adam(_Places):
    """Adam on the loss with weight decay, and the clamp after each step (the authors' code)."""

    def __init__(self, lm: LanguageModel, norms: Tensor, settings: ValueSettings) -> None:
        super().__init__(lm, norms, settings)
        assert settings.lr and settings.weight_decay is not None  # resolved by the method
        self._lr, self._weight_decay = settings.lr, settings.weight_decay
        self._norm = torch.zeros_like(self._v0)  # ‖δ‖ before the next step
        self._hit = torch.zeros_like(self.alive)
        self._adam = torch.optim.Adam([self.delta], lr=self._lr)

    def decay(self) -> Tensor:
        """weight_decay · ‖δ‖ / ‖v0‖² [facts], summed over sites."""
        self._norm = self.delta.norm(dim=-1, keepdim=True)
        return (self._weight_decay * self._norm / self._v0**2).sum((0, 2))

    def stuck(self) -> Tensor:
        return torch.zeros_like(self.alive)

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        # The norm has no gradient at 0; torch takes 0 there.
        of_decay = self._weight_decay / self._v0**2 * self.delta / torch.where(self._norm > 0, self._norm, 1.0)
        self.delta.grad = gradient + of_decay
        before = self.delta.clone()
        self._adam.step()
        over_limit = self._over_limit(self.delta)
        self.delta.div_(over_limit.clamp_min(1.0))
        torch.where(self.alive[:, None], self.delta, before, out=self.delta)
        self._hit = self._hit | (self.alive & (over_limit[..., 0] > 1).any(0))

    def result(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        return self.delta, self._hit

    def keep(self, places: list[int]) -> None:
        state = self._adam.state[self.delta]
        super().keep(places)
        self._norm, self._hit = self._norm[:, places], self._hit[places]
        self._adam = torch.optim.Adam([self.delta], lr=self._lr)
        if state:  # empty before the first step; the count of steps has no dimensions
            self._adam.state[self.delta] = {k: v if v.ndim == 0 else v[:, places] for k, v in state.items()}


class Descent(_Places):
    """Steepest descent with Polyak's step, a trust radius for each fact, and the clamp."""

    def __init__(self, lm: LanguageModel, norms: Tensor, settings: ValueSettings) -> None:
        super().__init__(lm, norms, settings)
        self._aim = AIM * settings.stop_loss
        self._best, self._gradient = self.delta, torch.zeros_like(self.delta)  # the best δ yet, and g there
        self._loss = self.delta.new_full(self.alive.shape, torch.inf)  # the loss at the best δ
        self._radius = self.delta.new_full(self.alive.shape, FIRST_RADIUS)  # of each fact, in units of ‖v0‖

    def decay(self) -> Tensor:
        """0: the least δ is what the steps themselves look for."""
        return torch.zeros_like(self._loss)

    def stuck(self) -> Tensor:
        return self._radius < LAST_RADIUS

    def step(self, losses: Tensor, gradient: Tensor) -> None:
        # 1) The best δ, and the radius around it. A loss that is not a number is no better.
        tried = self.delta - self._best
        fell, better = self._loss - losses, losses < self._loss
        promised = -(self._gradient * tried).sum((0, 2))
        length = self._relative(tried)
        wider = torch.maximum(self._radius, GROW * length)
        held = torch.where(fell > AS_PROMISED * promised, wider, self._radius)
        self._radius = torch.where(better, held, SHRINK * length)
        self._best = torch.where(better[:, None], self.delta, self._best)
        self._gradient = torch.where(better[:, None], gradient, self._gradient)
        self._loss = torch.where(better, losses, self._loss)

        # 2) A step from there, under the radius and the clamp.
        step = -self._length()[:, None] * self._gradient
        step = step * (self._radius / self._relative(step)).clamp_max(1.0)[:, None]
        goal = self._best + step
        goal = goal / self._over_limit(goal).clamp_min(1.0)
        self.delta = torch.where(self.alive[:, None], goal, self.delta)

    def _length(self) -> Tensor:
        """Polyak's step from the best δ, in units of g [facts]: to where the loss would be the aim, were it linear."""
        return (self._loss - self._aim) / self._gradient.square().sum((0, 2))

    def _relative(self, step: Tensor) -> Tensor:
        """The length of a step [facts], in units of ‖v0‖; the largest of all sites."""
        sizes: Tensor = step.norm(dim=-1) / self._v0[..., 0]
        return sizes.amax(0)

    def result(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        delta = torch.where((losses < self._loss)[:, None], self.delta, self._best)
        # The loss of the unedited model was no number, and no step could be taken: say so by a δ that is none either.
        delta = torch.where((self._loss.isfinite() | losses.isfinite())[:, None], delta, torch.nan)
        return delta, (self._over_limit(delta)[..., 0] > 1 - 1e-5).any(0)

    def keep(self, places: list[int]) -> None:
        super().keep(places)
        self._best, self._gradient = self._best[:, places], self._gradient[:, places]
        self._loss, self._radius = self._loss[places], self._radius[places]
