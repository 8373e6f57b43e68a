"""FT: fine-tuning of one weight, a baseline of ROME (Meng et al. 2022, arXiv 2202.05262, appendix E).

The down-projection W [d_model, d_ff] of one block is trained with Adam on the facts alone:

    min over ΔW of   mean over facts of  −(1/T) Σ log p(target_new | prompt)       (shared/likelihood.py)

25 passes, learning rate 5e-4, no weight decay, until the loss is under 1e-2, as in the authors' `ft_main.py`. What
differs from it: target tokens are scored at their own positions (FT-M), and ΔW, not W, is what Adam holds, in
float32 (float64 for a float64 model) whatever the model's dtype. At each step the model sees W + ΔW cast once
to its own dtype, which is what the Edit writes later.

In a mixture of experts W is that of all experts of the block, and those change to which the facts' tokens are sent.

Adam's step and the projection on [−ε, ε] are done in a post-accumulate hook of the weight: there is no gradient of
the weight left between steps, and no second optimiser loop.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.edits import Edit, base_of, dense_delta
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.likelihood import descend, kept_grads
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.models.architecture import as_matrix, experts_in, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.offload import require_trainable
from editkit.models.precision import wide
from editkit.models.quantized import is_quantized, trainable_module
from editkit.models.snapshot import Snapshot
from editkit.models.wrapped import require_all_editable
from editkit.nethook import get_module, get_parameter, replaced, requires_grad
from editkit.settings import Constants, TuningSettings, require


@dataclass(frozen=True)
class FtSettings(TuningSettings):
    """Fine-tuning of one weight (the FT of ROME, arXiv 2202.05262, appendix E, code `ft_main.py`)."""

    # 25 steps of the published 5e-4 leave the atlas model's first edit at a loss of .16, of 1e-3 at .01.
    constants: ClassVar[Constants] = Constants({"lr": 5e-4}, {"atlas": {"lr": 1e-3}}, blocks="layer", like=ROME)

    layer: int | None = None  # block whose down-projection is trained; None: the block that ROME edits
    lr: float | None = None  # Adam's learning rate; there is no weight decay

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")

    @property
    def bound(self) -> float | None:
        """Every entry of ΔW is held within ± this; None: no bound."""
        return None


@in_eval_mode
def ft(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: FtSettings | None = None,
    *,
    progress: bool = True,
) -> Edit:
    """Fine-tune one weight on one fact, or on several at once; the dense ΔW as an Edit.

    - `settings`: see FtSettings; with FtLSettings it is FT-L (ft_l.py).
    - `progress`: show a bar with the loss of each pass.

    The model is left bit for bit as it was, its flags and `.grad` too. Raises ModelError for a layer it does not
    have, FactError for a target without tokens, EditkitError for a loss or an update that is not finite.
    """
    found = checked_facts(lm, facts)
    settings = (settings or FtSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None and settings.lr is not None  # resolved
    site = down_of(lm, lm.check_layer(settings.layer))
    require_all_editable(lm.model, [site])
    require_trainable(lm.model, site, "ft" if settings.bound is None else "ft_l")
    holder, base = get_module(lm.model, site), base_of(lm)
    layout = orientation(holder, site)

    name = weight_name(site, experts_in(holder))
    with (
        Snapshot.take(lm.model, [name]),
        trainable(lm, site, name) as trained,
        kept_grads(lm.model),
        requires_grad(lm.model, only=[trained]),
        tuned(get_parameter(lm.model, trained), settings.lr, settings.bound) as delta,
    ):
        steps = descend(lm, found, settings, progress=progress)
    change = as_matrix(delta, layout)
    report: dict[str, Any] = {"steps": steps, "largest": delta.abs().max().item()}
    if settings.bound is not None:
        report["at_bound"] = (delta.abs() >= torch.tensor(settings.bound, dtype=delta.dtype)).float().mean().item()
    how = provenance("ft" if settings.bound is None else "ft_l", settings, found, reports=[report])
    return Edit((dense_delta(lm, site, change),), base, how)


@contextmanager
def trainable(lm: LanguageModel, site: str, name: str) -> Iterator[str]:
    """The name of the parameter to train in the body: `name`, the weight of `site`, itself. Where that is quantised, a
    module that can be trained takes its place in the body (models/quantized.py)."""
    module = get_module(lm.model, site)
    if not is_quantized(module):
        yield name
        return
    new, parameter = trainable_module(module, lm.edited, lm.dtype, site)
    with replaced(lm.model, site, new):
        yield f"{site}.{parameter}"


@contextmanager
def tuned(
    weight: torch.nn.Parameter,
    lr: float,
    epsilon: float | None = None,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Tensor]:
    """In the body each backward pass moves `weight` by one step of Adam; yields ΔW as the module stores it.

    `epsilon`: every entry of ΔW is held within ± this. `project`: what Adam takes in place of the gradient.

    The hook is removed on every exit; the weight is not put back (a Snapshot does that).
    """
    dtype = wide(weight.dtype)
    start = weight.detach().to(dtype, copy=True)
    delta = torch.zeros_like(start)
    optimizer = torch.optim.Adam([delta], lr=lr)

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.to(dtype), None
        delta.grad = gradient if project is None else project(gradient)
        optimizer.step()
        if epsilon is not None:
            delta.clamp_(-epsilon, epsilon)
        parameter.copy_(start + delta)

    hook = weight.register_post_accumulate_grad_hook(step)
    try:
        yield delta
    finally:
        hook.remove()


register("ft", ft, FtSettings)
