"""CrispEdit: fine-tuning that keeps out of the directions that running text uses (2026, arXiv 2602.15823).

For each weight W [q, p], over tokens of running text on the unedited model: a [p] the module's input, g [q] the
gradient at its output of the next token's NLL, and

    A = E[a aᵀ] = U_a diag(σ_a) U_aᵀ,   B = E[g gᵀ] = U_b diag(σ_b) U_bᵀ
    M [q, p]:  M_ij = 1 where σ_b,i σ_a,j < τ, else 0         A ⊗ B stands for the curvature of the text's loss

with τ such that the pairs of directions at or over it hold .99 of Σ σ_b,i σ_a,j. The loop is LocFT-BF's (ft_bf.py), in
mini-batches of 32; each gradient G of W is projected before Adam sees it:

    G ← U_b [(U_bᵀ G U_a) ∘ M] U_aᵀ

A and B are taken once, on the unedited model, and are shared by all steps of a session. For a mixture of experts a is
the stacked key of all experts, so A is large.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from editkit.edits import Edit, base_of, dense_delta
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.ft import trainable, tuned
from editkit.methods.ft_bf import shuffled
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.gradients import text_pairs
from editkit.methods.shared.likelihood import descend, kept_grads, mean_of_tokens
from editkit.methods.shared.prelude import Moments, checked_facts, provenance
from editkit.models.architecture import as_matrix, as_stored, experts_in, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.offload import require_trainable
from editkit.models.snapshot import Snapshot
from editkit.models.wrapped import require_all_editable
from editkit.nethook import get_module, get_parameter, requires_grad
from editkit.settings import Constants, CurvatureSettings, MomentSettings, require


class Curvature(NamedTuple):
    """Of one weight [q, p], in float64."""

    into: Tensor  # A [p, p]
    out: Tensor  # B [q, q]


Curvatures = dict[str, Curvature]  # by module


@dataclass(frozen=True)
class CrispEditSettings(CurvatureSettings):
    """CrispEdit (arXiv 2602.15823). A and B are over `tokens` of running text; the authors take 1,000 texts."""

    constants: ClassVar[Constants] = Constants(
        {"lr": 5e-4},
        {
            "atlas": {"layers": (3, 4), "lr": 3e-3},
            "Llama-3-8B": {"layers": (19, 20, 21, 22, 23)},
            "Qwen2.5-7B": {"layers": (15, 16, 17, 18, 19)},
        },
        blocks="range",
        like=ROME,
    )

    layers: tuple[int, ...] | None = None  # blocks whose down-projections are trained
    lr: float | None = None  # Adam's learning rate; there is no weight decay
    batch: int = 32  # facts a step of Adam
    end_of_text: bool = True  # train the end-of-text token after the target

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            require(len(self.layers) > 0, "method.layers", self.layers, "one block or more, or null")
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")


@in_eval_mode
def curvatures(
    lm: LanguageModel, settings: CrispEditSettings, *, moments: Moments, seed: int, progress: bool
) -> Curvatures:
    """A and B of each module that `settings` name, on `lm` as it is.

    - `moments`: names the running text. `seed`: of its order.
    - `progress`: nothing is shown.
    """
    settings = settings.resolved(lm.name, lm.layers)
    modules = [down_of(lm, lm.check_layer(layer)) for layer in settings.blocks]
    text = moments if isinstance(moments, MomentSettings) else MomentSettings()
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0
    for pairs in text_pairs(lm, modules, text, settings.tokens, seed):
        for name in modules:
            products = [side.T @ side for side in pairs[name]]
            a, b = products if name not in sums else (x + y for x, y in zip(sums[name], products, strict=True))
            sums[name] = a, b
        count += len(pairs[modules[0]].inputs)
    return {name: Curvature(a / count, b / count) for name, (a, b) in sums.items()}


@in_eval_mode
def crispedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: CrispEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    progress: bool = True,
    base: Curvatures | None = None,
) -> Edit:
    """Fine-tune the chosen weights on all of `facts`; the dense ΔW of each as an Edit.

    - `settings`: see CrispEditSettings; None for a field takes the model's constant.
    - `seed`: of the order of each pass, and of the running text. `moments`: names that text.
    - `progress`: show a bar with the loss of each pass.
    - `base`: A and B of the unedited model (`curvatures`); None takes them from `lm` as it is.

    The model is left bit for bit as it was, its flags and `.grad` too. Raises ModelError for a layer it does not
    have, FactError for a target without tokens, EditkitError for a loss or an update that is not finite.
    """
    found = checked_facts(lm, facts)
    settings = (settings or CrispEditSettings()).resolved(lm.name, lm.layers)
    assert settings.lr is not None  # resolved
    modules = [down_of(lm, lm.check_layer(layer)) for layer in settings.blocks]
    require_all_editable(lm.model, modules)
    for module in modules:
        require_trainable(lm.model, module, "crispedit")
    began = base_of(lm)
    if base is None:
        base = curvatures(lm, settings, moments=moments, seed=seed, progress=False)
    holders = {module: get_module(lm.model, module) for module in modules}
    names = {module: weight_name(module, experts_in(holder)) for module, holder in holders.items()}
    layouts = {module: orientation(holder, module) for module, holder in holders.items()}
    reports = []
    with (
        Snapshot.take(lm.model, list(names.values())),
        ExitStack() as training,
    ):
        trained = {module: training.enter_context(trainable(lm, module, name)) for module, name in names.items()}
        training.enter_context(kept_grads(lm.model))
        training.enter_context(requires_grad(lm.model, only=list(trained.values())))
        deltas = {}
        for module, name in trained.items():
            project, free = projection(base[module], settings.energy, layouts[module], experts_in(holders[module]))
            weight = get_parameter(lm.model, name)
            deltas[module] = training.enter_context(tuned(weight, settings.lr, project=project))
            reports.append({"module": module, "free": free})
        batches = shuffled(lm, found, settings.batch, seed, end_of_text=settings.end_of_text)
        steps = descend(lm, found, settings, progress=progress, batches=batches, loss_of=mean_of_tokens)
    changes = [dense_delta(lm, module, as_matrix(delta, layouts[module])) for module, delta in deltas.items()]
    how = provenance("crispedit", settings, found, seed=seed, modules=reports, reports=[{"steps": steps}])
    return Edit(tuple(changes), began, how)


def projection(
    curvature: Curvature, energy: float, layout: str, experts: int | None
) -> tuple[Callable[[Tensor], Tensor], float]:
    """The projection of a gradient as the module stores it, and the share of pairs of directions that are left free.

    - `layout`: how it is stored ("in_out" or "out_in"). `experts`: how many of them it holds; None: it is no mixture.
    """
    (low_a, u_a), (low_b, u_b) = (torch.linalg.eigh(side) for side in curvature)
    free = mask(low_b.clamp_min(0), low_a.clamp_min(0), energy)

    @functools.cache
    def on(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return u_b.to(device, dtype), u_a.to(device, dtype), free.to(device, dtype)

    def project(gradient: Tensor) -> Tensor:
        b, a, kept = on(gradient.device, gradient.dtype)
        inside = (b.T @ as_matrix(gradient, layout) @ a) * kept
        return as_stored(b @ inside @ a.T, layout, experts)

    return project, free.float().mean().item()


def mask(out: Tensor, into: Tensor, energy: float) -> Tensor:
    """M [q, p], True where σ_b,i σ_a,j < τ. `out` [q], `into` [p]: the eigenvalues σ_b and σ_a."""
    products = torch.outer(out, into)
    largest = products.flatten().sort(descending=True).values
    share = largest.cumsum(0) / largest.sum()
    return products < largest[int((share < energy).sum().clamp_max(len(largest) - 1))]


register("crispedit", crispedit, CrispEditSettings, base=curvatures)
