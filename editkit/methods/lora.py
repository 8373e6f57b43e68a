"""LoRA: fine-tuning of a low-rank change (Hu et al. 2021, arXiv 2106.09685), through peft.

    W x  ->  W x + (alpha / rank) B A x,      A [rank, d_ff] uniform in ±1/√d_ff, B [d_model, rank] zero at first

at the down-projection of the chosen blocks; A and B are trained with Adam on the facts alone, the target tokens
scored at their own positions (shared/likelihood.py), in float32 (float64 for a float64 model). No dropout. peft puts
its layers around the modules while it trains, and they are taken off again on every exit. The Edit holds
left = alpha/rank · B and right = A. A is drawn with the run's seed here and not by peft, so that it is the same on
every device and in every version. In a mixture of experts each expert has an A and a B of its own.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from editkit.edits import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.rome import CONSTANTS as ROME
from editkit.methods.shared.likelihood import descend, kept_grads
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.models.architecture import experts_in, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.offload import require_trainable
from editkit.models.precision import wide
from editkit.models.snapshot import Snapshot
from editkit.models.wrapped import require_all_editable
from editkit.nethook import get_module, replace_module, requires_grad
from editkit.settings import Constants, TuningSettings, require

ADAPTER = "editkit"


@dataclass(frozen=True)
class LoraSettings(TuningSettings):
    """Fine-tuning of a low-rank change ΔW = alpha/rank · B A through peft (Hu et al. 2021, arXiv 2106.09685)."""

    constants: ClassVar[Constants] = Constants(blocks="layers", like=ROME)

    layers: tuple[int, ...] | None = None  # blocks whose down-projection gets an adapter; None: the block ROME edits
    rank: int = 8
    alpha: float = 16.0
    steps: int = 50  # passes over the facts
    lr: float = 5e-3  # Adam's learning rate

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            require(len(self.layers) > 0, "method.layers", self.layers, "one block or more, or null")
        require(self.rank > 0, "method.rank", self.rank, "positive")
        require(self.alpha > 0, "method.alpha", self.alpha, "positive")
        require(self.lr > 0, "method.lr", self.lr, "positive")


@in_eval_mode
def lora(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: LoraSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """Fine-tune LoRA adapters on one fact, or on several at once; a low-rank Edit.

    - `settings`: see LoraSettings.
    - `seed`: of the first A.
    - `progress`: show a bar with the loss of each pass.

    The model is left as it was: the same module and parameter objects, the same bits, flags and `.grad`. Raises
    EditkitError without peft or for an update that is not finite, ModelError for a layer the model does not have,
    FactError for a target without tokens.
    """
    found = checked_facts(lm, facts)
    settings = (settings or LoraSettings()).resolved(lm.name, lm.layers)
    assert settings.layers is not None
    layers = [lm.check_layer(layer) for layer in settings.layers]
    require_all_editable(lm.model, [down_of(lm, layer) for layer in layers])
    for layer in layers:
        require_trainable(lm.model, down_of(lm, layer), "lora")
    base = base_of(lm)
    with (
        Snapshot.take(lm.model, []),  # verifies on exit that peft wrote to nothing
        kept_grads(lm.model),
        requires_grad(lm.model, only=[]),
        adapters(lm, layers, settings, seed) as factors,
    ):
        trained = [factor for pair in factors.values() for factor in pair]
        optimizer = torch.optim.Adam(trained, lr=settings.lr)

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        steps = descend(lm, found, settings, step=step, progress=progress)
    scaling = settings.alpha / settings.rank
    deltas = []
    for site, (a, b) in factors.items():
        left, right = factors_of(a.detach(), b.detach(), experts_in(get_module(lm.model, site)))
        deltas.append(low_rank_delta(lm, site, scaling * left, right))
    how = provenance("lora", settings, found, seed=seed, reports=[{"steps": steps}], peft=_peft().__version__)
    return Edit(tuple(deltas), base, how)


def factors_of(a: Tensor, b: Tensor, experts: int | None) -> tuple[Tensor, Tensor]:
    """left [d_model, r] and right [r, d_ff] of B A.

    For experts peft keeps A [E · rank, d_ff], expert by expert, and B [d_model, rank · E], with the expert running
    fastest. The factors of [W_1 … W_E] are those of the experts side by side, without the experts that no token was
    sent to: their B is 0 still.
    """
    if experts is None:
        return b, a
    left = rearrange(b, "d (r e) -> d (e r)", e=experts)
    right = torch.block_diag(*a.chunk(experts))  # [E · rank, E · d_ff]
    used = left.any(0)
    if not used.any():
        used[0] = True  # a change of nothing still has a rank
    return left[:, used], right[used]


@contextmanager
def adapters(
    lm: LanguageModel, layers: Sequence[int], settings: LoraSettings, seed: int
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """peft's adapters around the down-projections of `layers` while the body runs; yields A and B of each module.

    On every exit the modules themselves are back in their places. Raises EditkitError for a model that
    holds adapters already.
    """
    peft, model = _peft(), lm.model
    if hasattr(model, "peft_config"):
        raise EditkitError(
            f"'{lm.name}' holds adapters of peft already; lora edits a plain model. Merge them (merge_and_unload) or "
            "load the model without."
        )
    blocks = {down_of(lm, layer): lm.architecture.block.format(layer) for layer in layers}
    plain = {site: get_module(model, site) for site in blocks}
    try:
        random = torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else [])
        with random, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # nothing is merged here
            for site, block in blocks.items():  # in a whole model peft takes some names for those of older mixtures
                config = _config(plain[site], site, site.removeprefix(f"{block}."), settings)
                peft.inject_adapter_in_model(config, get_module(model, block), adapter_name=ADAPTER)
        generator = torch.Generator().manual_seed(seed)
        yield {site: _start(get_module(model, site), module, generator) for site, module in plain.items()}
    finally:
        for site, module in plain.items():
            replace_module(model, site, module)
            get_module(model, blocks[site]).__dict__.pop("peft_config", None)


def _config(module: nn.Module, site: str, target: str, settings: LoraSettings) -> Any:
    """peft's configuration for the weight in `module`, which is called `target` in its block."""
    experts = experts_in(module)
    where: dict[str, Any] = {
        "target_modules": [target],
        "fan_in_fan_out": orientation(module, site) == "in_out",
    }
    if experts is not None:
        where = {"target_modules": [], "target_parameters": [weight_name(target, experts)]}
    return _peft().LoraConfig(r=settings.rank, lora_alpha=settings.alpha, **where)


def _start(layer: nn.Module, plain: nn.Module, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of one of peft's layers at their first values, wide enough to be trained."""
    a: nn.Parameter = layer.lora_A[ADAPTER].weight  # type: ignore[index,union-attr]
    b: nn.Parameter = layer.lora_B[ADAPTER].weight  # type: ignore[index,union-attr]
    weight = plain.weight if experts_in(plain) is None else plain.down_proj
    assert isinstance(weight, Tensor)
    dtype = wide(weight.dtype)
    first = (2 * torch.rand(a.shape, generator=generator, dtype=dtype) - 1) / a.shape[1] ** 0.5
    a.data, b.data = first.to(weight.device), torch.zeros(b.shape, dtype=dtype, device=weight.device)
    return a, b


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise EditkitError(
            "method=lora trains through peft, which is not installed. Install it with: pip install 'editkit[peft]'"
        ) from error
    return peft


register("lora", lora, LoraSettings)
