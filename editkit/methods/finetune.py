"""FT and FT-L: fine-tuning of one weight, the baselines of ROME (Meng et al. 2022, arXiv 2202.05262, appendix E).

The down-projection W [d_model, d_ff] of one block is trained with Adam on the facts alone:

    min over ΔW of   mean over facts of  −(1/T) Σ log p(target_new | prompt)       (likelihood.py)
    ft_l:  subject to  max |ΔW_ij| ≤ ε                                             (Zhu et al. 2020, arXiv 2012.00363)

25 passes, learning rate 5e-4, no weight decay, until the loss is under 1e-2, as in the authors' `ft_main.py`. What
differs from it: target tokens are scored at their own positions (FT-M), and ΔW, not W, is what Adam holds, in
float32 (float64 for a float64 model) whatever the model's dtype. At each step the model sees W + ΔW cast once
to its own dtype, which is what the Edit writes later.

Adam's step and the projection on [−ε, ε] are done in a post-accumulate hook of the weight: there is no gradient of
the weight left between steps, and no second optimiser loop.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from editkit.edits.edit import Edit, base_of, dense_delta
from editkit.facts import Fact
from editkit.methods.shared.likelihood import descend, kept_grads
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.models.architecture import orientation
from editkit.models.load import LanguageModel
from editkit.models.precision import wide
from editkit.models.snapshot import Snapshot
from editkit.nethook import get_module, get_parameter, requires_grad
from editkit.settings import FtLSettings, FtSettings


def ft(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: FtSettings | None = None,
    *,
    seed: int = 0,
    moments: object = None,
    contexts: object = None,
    progress: bool = True,
) -> Edit:
    """Fine-tune one weight on one fact, or on several at once; the dense ΔW as an Edit.

    - `settings`: see FtSettings; FtLSettings holds every entry of ΔW within ±epsilon.
    - `seed`, `moments`, `contexts`: of other methods; nothing here is random.
    - `progress`: show a bar with the loss of each pass.

    The model is left bit for bit as it was, its flags and `.grad` too. Raises ModelError for a layer it does not
    have, FactError for a target without tokens, EditkitError for a loss or an update that is not finite.
    """
    found = checked_facts(lm, facts)
    settings = (settings or FtSettings()).resolved(lm.name, lm.layers)
    epsilon = settings.epsilon if isinstance(settings, FtLSettings) else None
    assert settings.layer is not None and settings.lr is not None  # resolved
    site = lm.architecture.down(lm.check_layer(settings.layer))
    base = base_of(lm)

    name = f"{site}.weight"
    with (
        Snapshot.take(lm.model, [name]),
        kept_grads(lm.model),
        requires_grad(lm.model, only=[name]),
        tuned(get_parameter(lm.model, name), settings.lr, epsilon) as delta,
    ):
        steps = descend(lm, found, settings, progress=progress)
    change = delta.T if orientation(get_module(lm.model, site), site) == "in_out" else delta
    report: dict[str, Any] = {"steps": steps, "largest": delta.abs().max().item()}
    if epsilon is not None:
        report["at_bound"] = (delta.abs() >= torch.tensor(epsilon, dtype=delta.dtype)).float().mean().item()
    how = provenance("ft" if epsilon is None else "ft_l", settings, found, seed, reports=[report])
    return Edit((dense_delta(lm, site, change),), base, how)


def ft_l(lm: LanguageModel, facts: Fact | Sequence[Fact], settings: FtLSettings | None = None, **options: Any) -> Edit:
    """`ft` with every entry of ΔW held within ±epsilon, by model where the settings say None."""
    return ft(lm, facts, settings or FtLSettings(), **options)


@contextmanager
def tuned(weight: torch.nn.Parameter, lr: float, epsilon: float | None = None) -> Iterator[Tensor]:
    """In the body each backward pass moves `weight` by one step of Adam; yields ΔW as the module stores it.

    The hook is removed on every exit; the weight is not put back (a Snapshot does that).
    """
    dtype = wide(weight.dtype)
    start = weight.detach().to(dtype, copy=True)
    delta = torch.zeros_like(start)
    optimizer = torch.optim.Adam([delta], lr=lr)

    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        assert parameter.grad is not None
        delta.grad, parameter.grad = parameter.grad.to(dtype), None
        optimizer.step()
        if epsilon is not None:
            delta.clamp_(-epsilon, epsilon)
        parameter.copy_(start + delta)

    hook = weight.register_post_accumulate_grad_hook(step)
    try:
        yield delta
    finally:
        hook.remove()
