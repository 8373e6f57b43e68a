"""MEND: fast model editing by transformed gradients (Mitchell et al. 2022, arXiv 2110.11309).

The gradient of a linear layer W [d_model, d_ff] on one token is rank one, g kᵀ: k [d_ff] the layer's input, g
[d_model] the gradient at its output. A small network maps each pair to a better one, and

    ΔW = −α Σ_tokens g~ k~ᵀ        a low-rank edit: its rank is the number of tokens that have a gradient

    z = [(k − μ_k)/σ_k ; (g − μ_g)/σ_g]                        normalised over the training facts
    h = z + relu(s₁ ⊙ (U₁ V₁ z + b₁) + o₁)                     paper, equation 3a
    y = h + s₂ ⊙ (U₂ V₂ h + b₂) + o₂                           equation 3b; no activation, as in the authors' code
    [k~ ; g~] = [k ; g] + [σ_k ; σ_g] ⊙ (y − z)

U, V, b are shared by all weights of one shape (here: all down-projections of the model); s, o and the learning rate
α belong to each weight. U = b = o = 0 and s = 1 at first, so an untrained network takes one step of SGD. One
difference from the authors: their network gives y itself, in normalised units; here the correction is scaled back, so
that the identity stays the gradient whatever μ and σ are. The network is trained by scripts/train_mend.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editkit.edits import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError, ModelError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.carried import Carried, json_form
from editkit.methods.shared.likelihood import nll_of_rows, targets_after_prompts
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.models.architecture import experts_in, matrix_shape, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of, keys_of
from editkit.models.load import LanguageModel
from editkit.models.offload import shape_of
from editkit.models.precision import wide
from editkit.models.wrapped import require_all_editable
from editkit.nethook import Trace, get_module, requires_grad
from editkit.settings import MethodSettings
from editkit.tensorfiles import FileKind, explained, read_tensors, write_tensors

HOW_TO_TRAIN = (
    "Train one with: python scripts/train_mend.py --model NAME --out FILE, then set method.hypernetwork=FILE."
)
HYPERNETWORK_FILE = FileKind(
    format="editkit-mend/1",
    noun="a hypernetwork of MEND",
    fields={"sites": (list,), "d_ff": (int,), "d_model": (int,), "rank": (int,), "base": (str,)},
    remedy=HOW_TO_TRAIN,
    origin=HOW_TO_TRAIN,
    renew="Mend.load(path).save(path)",
)
BUNDLED = Path(__file__).parent.parent / "models"  # NAME_mend.safetensors, for the bundled models that have one
Pairs = dict[str, tuple[Tensor, Tensor]]  # module: k [tokens, d_ff], g [tokens, d_model]


@dataclass(frozen=True)
class MendSettings(MethodSettings):
    """MEND (arXiv 2110.11309): everything else is in the file of the trained hypernetwork."""

    hypernetwork: str | None = None  # the file; None: the bundled one of this model


class Mend(nn.Module):
    """The hypernetwork for the weights `sites` of one base model: (k, g) -> (k~, g~), and α of each weight.

    `d_ff`, `d_model`: the shape of the weights. `rank`: width of both low-rank layers. `base`: digest of the
    model it is for. It is the identity until it has been trained, with learning rate `lr` for every weight.
    """

    def __init__(
        self, sites: Sequence[str], d_ff: int, d_model: int, *, rank: int, base: str, lr: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.sites, self.d_ff, self.d_model, self.rank, self.base = list(sites), d_ff, d_model, rank, base
        width, weights = d_ff + d_model, len(self.sites)
        generator = torch.Generator().manual_seed(seed)
        self.u = nn.Parameter(torch.zeros(2, width, rank))
        self.v = nn.Parameter(torch.randn(2, rank, width, generator=generator) / width**0.5)
        self.b = nn.Parameter(torch.zeros(2, width))
        self.scale = nn.Parameter(torch.ones(weights, 2, width))
        self.offset = nn.Parameter(torch.zeros(weights, 2, width))
        self.log_lr = nn.Parameter(torch.full((weights,), lr).log())
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(weights, width))
        self.register_buffer("std", torch.ones(weights, width))

    @classmethod
    def for_model(cls, lm: LanguageModel, layers: Sequence[int], **options: Any) -> "Mend":
        """An untrained network for the down-projections of `layers`. Raises ModelError for a layer lm lacks or
        cannot edit."""
        sites = [down_of(lm, lm.check_layer(layer)) for layer in layers]
        require_all_editable(lm.model, sites)
        shapes = {site: _shape(lm, site) for site in sites}
        if len({*shapes.values()}) > 1:
            raise ModelError(
                "MEND's network is for weights of one shape, and these blocks have "
                f"{', '.join(f'{site} {list(shape)}' for site, shape in shapes.items())}. Give blocks of one shape."
            )
        d_model, d_ff = shapes[sites[0]]
        return cls(sites, d_ff, d_model, base=lm.digest, **options)

    def normalise_by(self, pairs: Sequence[Pairs]) -> None:
        """Take μ and σ of each weight from the tokens of `pairs`."""
        for number, site in enumerate(self.sites):
            z = torch.cat([torch.cat(pair[site], 1) for pair in pairs])  # [tokens, d_ff + d_model]
            self.mean[number] = z.mean(0)
            self.std[number] = z.std(0).clamp_min(1e-12)  # a unit that is always off

    def forward(self, site: str, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of ΔW = left @ right for one weight: left [d_model, tokens], right [tokens, d_ff]."""
        i = self.sites.index(site)
        raw = torch.cat((k, g), 1)
        std = self.std[i].to(raw.dtype)
        z = h = (raw - self.mean[i]) / std
        for layer in range(2):
            change = (h @ self.v[layer].T) @ self.u[layer].T + self.b[layer]
            change = change * self.scale[i, layer] + self.offset[i, layer]
            # clamp and not relu: at 0, where every unit starts, relu has no gradient
            h = h + (change.clamp(min=0) if layer == 0 else change)
        k_new, g_new = (raw + std * (h - z)).split((self.d_ff, self.d_model), 1)
        return -self.log_lr[i].exp() * g_new.T, k_new

    def save(self, path: str | Path) -> Path:
        """Write weights, configuration and base to a safetensors file, completely or not at all."""
        config = {"sites": self.sites, "d_ff": self.d_ff, "d_model": self.d_model, "rank": self.rank, "base": self.base}
        tensors = {name: tensor.detach().float() for name, tensor in self.state_dict().items()}
        return write_tensors(path, HYPERNETWORK_FILE, config, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Mend":
        """Read a hypernetwork. Raises EditFileError, saying how to train one, for a file that cannot be used."""
        config, tensors = read_tensors(path, HYPERNETWORK_FILE)
        with explained(path, HYPERNETWORK_FILE):
            if tensors["v"].shape != (2, config["rank"], config["d_ff"] + config["d_model"]):
                raise ValueError("its tensors do not have the shape that its header says")
            network = cls(**config)
            network.load_state_dict(tensors)
        return network

    def check_base(self, lm: LanguageModel, found: str | None = None) -> None:
        """Raise EditkitError unless the network was trained for `lm`. `found`: its digest; None: as it is now."""
        found = found or lm.digest
        if self.base != found:
            raise EditkitError(
                f"This hypernetwork of MEND was trained for a model with digest {self.base[:12]}; '{lm.name}' is "
                f"{found[:12]}. {HOW_TO_TRAIN}"
            )


def _shape(lm: LanguageModel, site: str) -> tuple[int, int]:
    """(d_model, d_ff) of the weight in the module `site`."""
    module = get_module(lm.model, site)
    return matrix_shape(shape_of(lm.model, weight_name(site, experts_in(module))), orientation(module, site))


def rank_one_gradients(lm: LanguageModel, sites: Sequence[str], facts: Sequence[Fact]) -> tuple[Pairs, Tensor]:
    """k and g of every token that has a gradient, at each site, and each fact's loss (mean NLL of its target).

    g is the gradient of the *sum* of the facts' losses, so that each fact counts in a batch as it does alone.
    In the model's dtype through the model, then float32 (float64 for a float64 model); on the model's device.
    """
    scored = targets_after_prompts(lm, facts)
    with requires_grad(lm.model, only=[]), Trace(lm.model, sites, inputs=True, grads=True, leaf=True) as trace:
        losses = nll_of_rows(lm.model(**scored.rows.inputs(), use_cache=False).logits, scored)
        losses.sum().backward()
    pairs = {}
    for site in sites:
        k, g = trace[site].input.detach().flatten(0, -2), trace[site].grad.flatten(0, -2)
        dtype = wide(k.dtype)
        k = keys_of(lm, site, k).to(g.device)
        used = (g != 0).any(-1)  # not padding, nor what comes after the last token that predicts
        pairs[site] = k[used].to(dtype), g[used].to(dtype)
    return pairs, losses.detach()


BASE = json_form(str, str)  # of the digest of the model before the first edit


@in_eval_mode
def mend(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: MendSettings | None = None,
    *,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """The MEND edit for one fact, or for several at once (their transformed gradients summed).

    - `settings.hypernetwork`: the file of a trained network; None takes the bundled one of this model.
    - `earlier`: edits that `lm` already holds. The network is that of the model before them.
    - `carried`: what a session has computed from them.

    The model is left bit for bit as it was; its weights are never written. Raises EditFileError for a missing or
    foreign file, EditkitError for a network of another base or an update that is not finite, FactError for
    a target without tokens.
    """
    settings = settings or MendSettings()
    path = Path(settings.hypernetwork) if settings.hypernetwork else BUNDLED / f"{lm.name}_mend.safetensors"
    network = Mend.load(path)

    def began() -> str:
        return earlier[0].base.digest if earlier else lm.digest

    network.check_base(lm, (carried or Carried()).state("base", earlier, began, lambda base, _: base, BASE))
    require_all_editable(lm.model, network.sites)
    found = checked_facts(lm, facts)
    pairs, losses = rank_one_gradients(lm, network.sites, found)
    deltas = []
    with torch.no_grad():
        for site, (k, g) in pairs.items():
            left, right = network.to(k.device, k.dtype)(site, k, g)
            deltas.append(low_rank_delta(lm, site, left, right))
    how = provenance(
        "mend",
        settings,
        found,
        hypernetwork={"sites": network.sites, "rank": network.rank, "lr": network.log_lr.exp().tolist()},
        reports=[{"steps": [{"loss": loss}]} for loss in losses.tolist()],
    )
    return Edit(tuple(deltas), base_of(lm), how)


register("mend", mend, MendSettings)
