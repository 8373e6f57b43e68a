"""UltraEdit: no subject and no optimisation, one backward pass for a batch (Gu et al. 2025, arXiv 2505.14679).

For each weight W [q, p], over the T positions of all facts whose next token is one of the target: h [p] is the module's
input there, and g [q] the gradient of the target's NLL at its output.

    ĥ = (h − μ_h)/σ_h,  ĝ = (g − μ_g)/σ_g      μ, σ over all tokens of the session, these ones included
    v = −η ‖ĥ‖² ĝ
    ΔWᵀ = (HᵀH + α I)⁻¹ Hᵀ V                   H [T, p] the inputs as they are, V [T, q]; p × p, as the authors solve it
        = Hᵀ (H Hᵀ + α I)⁻¹ V                  the same, T × T

The second form is solved here where T < p: its factors, left = Vᵀ (H Hᵀ + α I)⁻¹ [q, T] and right = H, are the Edit as
they stand, and ΔW is never formed.

The authors share μ and σ among weights of one shape (`method.statistics=shape`); the paper has them for each weight.
Here g is that of the sum over tokens, not of the mean over a batch: ĝ has no scale, and so a step may have any size.
Variances are those of all tokens together, where the authors' code weighs those of a batch by n/(n − 1).

μ and σ are the session's: each edit keeps its batch's in its memory. A first batch of few tokens has none that are
worth much, and of one token none at all: `method.warm_up` takes so many tokens of running text before, on the unedited
model. The authors start with none, at 100 facts a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from editkit.edits import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.carried import Carried, Form, Tensors
from editkit.methods.shared.gradients import Pairs, answer_pairs, modules_of, text_pairs, weight_shape
from editkit.methods.shared.prelude import Moments, checked_facts, provenance
from editkit.methods.shared.running import Running, remembered
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.wrapped import require_all_editable
from editkit.settings import Constants, MomentSettings, OnePassSettings, require, require_one_of

LLAMA = tuple(f"model.layers.{i}.mlp.gate_proj" for i in range(11, 16))
LLAMA += tuple(f"model.layers.{i}.mlp.up_proj" for i in range(18, 25))
QWEN = tuple(f"model.layers.{i}.mlp.{part}_proj" for part in ("gate", "up") for i in range(18, 27))

# The authors' files, but for the atlas model.
CONSTANTS = Constants(
    default={"lr": 1e-6},
    published={
        # Measured on 200 facts that no study uses; η is far larger, since a token of a small model asks for less.
        "atlas": {"layers": (6, 7), "lr": 2e-3, "warm_up": 200},
        "gpt-j-6b": {"layers": tuple(range(18, 27))},
        "Mistral-7B-v0.3": {"layers": (29, 30)},
        "Llama-3-8B": {"modules": LLAMA},
        "Qwen2.5-7B": {"modules": QWEN},
    },
)
FLOOR = 1e-6  # of the eigenvalues of a covariance, as StableEdit's authors' code has it
FIRST, LAST = 0.65, 0.95  # of the depth: the down-projections that GPT-J's authors' file names
Statistics = dict[str, Running]  # of each weight, or of each shape


@dataclass(frozen=True)
class UltraEditSettings(OnePassSettings):
    """UltraEdit (arXiv 2505.14679)."""

    constants: ClassVar[Constants] = CONSTANTS

    lr: float | None = None  # η
    alpha: float = 1.0  # α
    statistics: str = "shape"  # shape: μ and σ are shared among weights of one shape; weight: each has its own

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")
        require(self.alpha > 0, "method.alpha", self.alpha, "positive")
        require_one_of(self.statistics, "method.statistics", ("shape", "weight"))

    method: ClassVar[str] = "ultraedit"

    def resolved(self, model_name: str, layers: int) -> Self:
        """These settings with the constants of the model where they say None, but for modules where layers are given
        and layers where modules are."""
        found = self.constants.of(model_name, layers)
        if self.modules is not None or self.layers is not None:
            found = {name: value for name, value in found.items() if name not in ("modules", "layers")}
        elif "modules" not in found and "layers" not in found:
            first = min(round(FIRST * layers), layers - 1)
            found["layers"] = tuple(range(first, max(round(LAST * layers), first + 1)))
        return self.filled({"warm_up": 0} | found)


@in_eval_mode
def warmed(
    lm: LanguageModel, settings: UltraEditSettings, *, moments: Moments, seed: int, progress: bool
) -> Statistics:
    """μ and σ before the first edit, from `settings.warm_up` tokens of running text on `lm` as it is.

    - `moments`: names the text. `seed`: of its order.
    - `progress`: nothing is shown.
    """
    settings = settings.resolved(lm.name, lm.layers)
    modules, found = modules_of(lm, settings), Statistics()
    text = moments if isinstance(moments, MomentSettings) else MomentSettings()
    for pairs in text_pairs(lm, modules, text, settings.warm_up or 0, seed):
        memory: dict[str, Tensor] = {}
        for name in modules:
            memory |= remembered(name, pairs[name], products=settings.whitens)
        found = with_batch(found, groups_of(lm, modules, settings), memory)
    return found


def groups_of(lm: LanguageModel, modules: Sequence[str], settings: UltraEditSettings) -> dict[str, str]:
    """Whose statistics each module takes: its own, or those of all that have a weight of its shape."""
    if settings.statistics == "weight":
        return {name: name for name in modules}
    return {name: " x ".join(map(str, weight_shape(lm, name))) for name in modules}


def with_batch(statistics: Statistics, groups: dict[str, str], memory: Mapping[str, Tensor]) -> Statistics:
    """`statistics` and those of the batch that an edit remembers. `groups`: whose they are, by module."""
    found = dict(statistics)
    for name, group in groups.items():
        if f"{name}.count" in memory:
            batch = Running.read(memory, name)
            found[group] = found[group].merged(batch) if group in found else batch
    return found


@in_eval_mode
def ultraedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: UltraEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
    base: Statistics | None = None,
) -> Edit:
    """One edit for all of `facts` at once, from one backward pass.

    - `settings`: see UltraEditSettings; None for a field takes the model's constant.
    - `seed`, `moments`: of the running text that `warm_up` reads.
    - `earlier`: this method's edits that `lm` already holds; μ and σ are over their tokens too.
    - `carried`: what a session has computed from them.
    - `base`: μ and σ before them (`warmed`); None takes them from `lm` as it is.

    The model is left bit for bit as it was; its weights are never written. Raises ModelError for a layer that it does
    not have, NameNotFound for a module, FactError for a target without tokens, EditkitError for a weight that has seen
    one token only.
    """
    found = checked_facts(lm, facts)
    settings = (settings or UltraEditSettings()).resolved(lm.name, lm.layers)
    modules, began = modules_of(lm, settings), base_of(lm)
    require_all_editable(lm.model, modules)
    groups = groups_of(lm, modules, settings)
    # 1) h and g, and what the session will know of them.
    pairs, losses = answer_pairs(lm, modules, found)
    memory: dict[str, Tensor] = {}
    for name in modules:
        memory |= remembered(name, pairs[name], products=settings.whitens)
    # 2) μ and σ with these tokens.
    first = warmed(lm, settings, moments=moments, seed=seed, progress=False) if base is None else base

    def add(statistics: Statistics, edit: Edit) -> Statistics:
        return with_batch(statistics, groups, edit.memory)

    before = (carried or Carried()).state("statistics", earlier, lambda: first, add, Form(written, read))
    statistics = with_batch(before, groups, memory)
    # 3) The factors of each weight.
    deltas, reports = [], []
    assert settings.lr is not None  # resolved
    for name in modules:
        running = statistics[groups[name]]
        if running.count < 2:
            raise EditkitError(
                f"UltraEdit has seen one token at {name}, and one token has no variance. Give several facts at once, "
                "or begin with running text, as method.warm_up=2000."
            )
        values, whitened = targets(running, pairs[name], settings)
        delta = low_rank_delta(lm, name, *ridge(pairs[name].inputs, values, settings.alpha))
        deltas.append(delta)
        reports.append({"module": name, "tokens": running.count, "norm": delta.norm(), "whitened": whitened})
    how = provenance(
        settings.method,
        settings,
        found,
        seed=seed,
        modules=reports,
        reports=[{"steps": [{"loss": loss}]} for loss in losses],
    )
    return Edit(tuple(deltas), began, how, memory=memory)


def written(statistics: Statistics) -> dict[str, Tensor]:
    """What `read` makes the statistics of again."""
    return {
        f"{group}.{name}": part for group, running in statistics.items() for name, part in running.tensors().items()
    }


def read(tensors: Tensors) -> Statistics:
    """The statistics that were `written`."""
    groups = [name.removesuffix(".count") for name in tensors if name.endswith(".count")]
    return {group: Running.of(tensors, group) for group in groups}


def targets(running: Running, pairs: Pairs, settings: UltraEditSettings) -> tuple[Tensor, bool]:
    """V [T, q], the change that is wanted at each position, and whether ĝ is whitened and not only scaled."""
    assert settings.lr is not None  # resolved
    h, g = running.normalised(pairs)
    whitened = running.whitened(pairs.gradients, FLOOR) if settings.whitens else None
    g = g if whitened is None else whitened
    return -settings.lr * h.square().sum(1, keepdim=True) * g, whitened is not None


def ridge(inputs: Tensor, values: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """left [q, T] and right [T, p] of ΔW, from H [T, p] and V [T, q], by the smaller of two solves."""
    tokens, p = inputs.shape
    if tokens < p:
        gram = inputs @ inputs.T + alpha * torch.eye(tokens, dtype=inputs.dtype)
        left: Tensor = torch.cholesky_solve(values, torch.linalg.cholesky(gram)).T
        return left, inputs
    gram = inputs.T @ inputs + alpha * torch.eye(p, dtype=inputs.dtype)
    return values.T, torch.cholesky_solve(inputs.T, torch.linalg.cholesky(gram)).T


register("ultraedit", ultraedit, UltraEditSettings, base=warmed)
