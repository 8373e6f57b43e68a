"""GRACE: a codebook at one block instead of a change of weights (Hartvigsen et al. 2023, arXiv 2211.11031).

With x the input of the block's site at the last token of a fact's prompt, and m its output there:

    K = x
    V = argmin over v of  −(1/T) Σ log p(target | prompt, m ← v)       Adam, v drawn from [0, 1) at first
    an entry (K, V, ε, target) is added to the codebook of the site    (models/codebook.py: how it grows and splits)

The Edit holds the entry, and no weight changes. While it is in force, the site's output is V at every token whose own
input is within ε of K. The paper looks the last token of the prompt up and replaces the output there, or in the
authors' code at other tokens of the prompt too, and is told where the prompt ends. Here each token is looked up by
itself. For the last token that is the paper's rule. Nothing has to be told, and a text that goes on with the answer, or
is generated with a cache, gives the same.

The site is the down-projection (of a mixture of experts the whole MLP): its input is the key and its output the value
of every other method here, it stands alone in all families, and what it puts out goes into the residual stream as it
is. The authors take the first matrix of GPT-2 XL's MLP, and other public code the down-projection, as here.

ε: the paper's 1 fits the models it was tried on. Keys of other models have other lengths, so where nothing was
published ε is `radius` times ‖K‖.

V is found as ROME's δ is: only the blocks from the edited one on and the tokens from the prompt's last one on are run
(methods/shared/engine.py), and the V of many facts side by side.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from editkit.edits import Edit, base_of
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.engine import Batch, Engine, FullDepth, Replayed, rows_of
from editkit.methods.shared.prelude import checked_facts, provenance
from editkit.methods.shared.sites import at_lookup
from editkit.models.codebook import Codebook
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import site_of
from editkit.models.installed import float32, installed_on
from editkit.models.load import LanguageModel
from editkit.models.passes import CannotReplay
from editkit.models.precision import wide, widened
from editkit.models.snapshot import installed_meanwhile
from editkit.nethook import requires_grad
from editkit.progress import Bar
from editkit.settings import Constants, WeightlessSettings, require, require_one_of

TOGETHER = 16  # facts whose values are found side by side
AUTHORS: dict[str, Any] = {"steps": 100, "lr": 1.0, "start": "cold"}  # their files
CONSTANTS = Constants(
    default=AUTHORS | {"radius": 0.3},
    published={
        # Measured on facts that no study uses: at block 6, 0.65 ‖K‖ from the prompt's key are 70 % of the paraphrases'
        # keys and 5 % of the neighborhood prompts'. At blocks 0 to 4 both are about as near.
        "atlas": AUTHORS | {"layer": 6, "radius": 0.65},
        "gpt2-xl": AUTHORS | {"layer": 35, "epsilon": 1.0},
        "Llama-2-7B": AUTHORS | {"layer": 27, "epsilon": 1.0, "steps": 50},  # EasyEdit's
    },
    blocks="layer",
    depth=0.73,  # GPT-2 XL's 35 of 48
)


@dataclass(frozen=True)
class GraceSettings(WeightlessSettings):
    """GRACE (arXiv 2211.11031)."""

    constants: ClassVar[Constants] = CONSTANTS

    layer: int | None = None  # block of the codebook; None: the model's, else the one at 0.73 of the depth
    epsilon: float | None = None  # ε of a new entry; None: the model's, else `radius` times the key's norm
    radius: float | None = None  # ε as a share of ‖K‖, where there is no epsilon; None: the model's, else 0.3
    steps: int | None = None  # of Adam, for each value
    lr: float | None = None  # Adam's learning rate
    start: str | None = None  # cold: values begin at random numbers in [0, 1); warm: at the module's own output

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon is None or self.epsilon > 0, "method.epsilon", self.epsilon, "positive")
        require(self.radius is None or self.radius > 0, "method.radius", self.radius, "positive")
        require(self.steps is None or self.steps > 0, "method.steps", self.steps, "positive")
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")
        if self.start is not None:
            require_one_of(self.start, "method.start", ("cold", "warm"))

    def resolved(self, model_name: str, layers: int) -> Self:
        """These settings with the constants of the model where they say None; ε may stay None."""
        found = self.constants.of(model_name, layers)
        if self.radius is not None:  # it was asked for, so it is not the published ε that counts
            found = {name: value for name, value in found.items() if name != "epsilon"}
        return self.filled(found)


@in_eval_mode
def grace(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: GraceSettings | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Edit:
    """One entry of a codebook for each of `facts`, as one Edit.

    - `settings`: see GraceSettings; None for a field takes the model's constant.
    - `seed`: of the values that Adam begins with.
    - `progress`: show a bar of the steps.

    Entries that are in force already, of a session, stay in force while values are found, but not where one would
    hide the new value. The model is left bit for bit as it was; its weights are never written. Raises ModelError for a
    layer that it does not have, FactError for a target without tokens, EditkitError for a key or loss that is not
    finite.
    """
    found = checked_facts(lm, facts)
    settings = (settings or GraceSettings()).resolved(lm.name, lm.layers)
    assert settings.layer is not None
    layer, base = lm.check_layer(settings.layer), base_of(lm)
    site = site_of(lm, layer)
    # 1) Keys and their radii.
    keys = at_lookup(lm, site, found, ["{}"], "last").input[:, 0]  # [facts, d]
    if not keys.isfinite().all():
        raise EditkitError(f"A key at {site} is not finite; nothing was changed. Load the model in float32.")
    if settings.epsilon is not None:
        radii = torch.full((len(found),), settings.epsilon).double()
    else:
        assert settings.radius is not None
        radii = settings.radius * keys.norm(dim=1)
    labels = tuple(fact.target_new.strip() for fact in found)
    # 2) Values, found while what is in force leaves the outputs for these keys alone.
    width = lm.model.config.get_text_config().hidden_size
    blank = Codebook(
        site,
        float32(keys),
        torch.full((len(found), width), torch.nan),
        float32(radii),
        tuple(f"{number} of the new" for number in range(len(found))),
    )
    before = installed_on(lm.model)
    with installed_meanwhile(lm.model, [*before, blank] if before else []):
        values, losses = _values(lm, layer, found, settings, seed, progress)
    # 3) The entries.
    entries = Codebook(site, float32(keys), float32(values), float32(radii), labels)
    reports = [
        {"steps": [{"loss": loss} for loss in each], "epsilon": radius, "key_norm": norm}
        for each, radius, norm in zip(losses, radii.tolist(), keys.norm(dim=1).tolist(), strict=True)
    ]
    how = provenance("grace", settings, found, seed=seed, site=site, reports=reports)
    return Edit((), base, how, installed=(entries,))


def _values(
    lm: LanguageModel, layer: int, facts: Sequence[Fact], settings: GraceSettings, seed: int, progress: bool
) -> tuple[Tensor, list[list[float]]]:
    """V [facts, d_model] in float64 on the CPU, and the loss of each fact before each step and at the end."""
    assert settings.steps is not None
    width = lm.model.config.get_text_config().hidden_size
    # Of like length side by side, so that little is padding.
    order = sorted(range(len(facts)), key=lambda i: len(facts[i].text) + len(facts[i].target_new))
    values: dict[int, Tensor] = {}
    losses: dict[int, list[float]] = {}
    name = facts[0].subject if len(facts) == 1 else f"{len(facts)} facts"
    total = settings.steps * len(facts)
    bar = Bar(total=total, desc=f"value for {name}", disable=not progress, leave=False, delay=1)
    with bar, widened(lm), requires_grad(lm.model, only=[]):
        for begin in range(0, len(order), TOGETHER):
            part = order[begin : begin + TOGETHER]
            jobs = [rows_of(lm, facts[i], "last", ["{}"]) for i in part]
            drawn = torch.stack([_drawn(seed, facts[i], width) for i in part])
            found, told = _descended(lm, _engine(lm, layer, Batch(jobs)), drawn, settings, bar)
            values |= dict(zip(part, found, strict=True))
            losses |= dict(zip(part, told, strict=True))
    return torch.stack([values[i] for i in range(len(facts))]), [losses[i] for i in range(len(facts))]


def _engine(lm: LanguageModel, layer: int, batch: Batch) -> Engine:
    """What runs the rows with a change at the site of block `layer`: the quick way where the model can be replayed."""
    sites = [site_of(lm, layer)]
    try:
        with torch.no_grad():
            return Replayed(lm, layer, sites, batch)
    except CannotReplay:
        return FullDepth(lm, layer, sites, batch)


def _drawn(seed: int, fact: Fact, width: int) -> Tensor:
    """Numbers in [0, 1) [d_model] in float64: of this fact, whatever else is edited with it."""
    digest = hashlib.sha256(f"{seed}|{fact.text}|{fact.target_new.strip()}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(width, generator=draw, dtype=torch.float64)


def _descended(
    lm: LanguageModel, engine: Engine, drawn: Tensor, settings: GraceSettings, bar: Any
) -> tuple[Tensor, list[list[float]]]:
    """V [facts, d_model] of the facts of `engine` in float64 on the CPU, and the losses of each.

    - `drawn`: [facts, d_model], where a cold start begins.
    - `bar`: told of each step.

    Raises EditkitError for a loss that is not finite.
    """
    assert settings.steps is not None and settings.lr is not None
    dtype, device = wide(lm.dtype), lm.device
    with torch.no_grad():
        own = torch.stack([at.output[0] for at in engine.clean()])  # [facts, d_model], m
    value = (own if settings.start == "warm" else drawn).to(device, dtype, copy=True)
    own = own.to(device, dtype)
    optimizer = torch.optim.Adam([value], lr=settings.lr)
    losses: list[Tensor] = []
    for _ in range(settings.steps):
        nll = _nll(engine.logits((value - own)[None]).to(dtype), engine.batch)
        losses.append(nll.detach())
        value.grad = engine.gradient(nll.sum())[0].to(dtype)
        optimizer.step()
        bar.update(len(own))
    losses.append(_nll(engine.logits((value - own)[None]).to(dtype), engine.batch).detach())
    told = torch.stack(losses, 1).double().cpu()  # [facts, steps + 1]
    if not (told.isfinite().all() and value.isfinite().all()):
        raise EditkitError("A value of GRACE is not finite; nothing was changed. Lower method.lr, or load in float32.")
    return value.double().cpu(), told.tolist()


def _nll(logits: Tensor, batch: Batch) -> Tensor:
    """The mean NLL per target token of each fact [facts], from the logits that `batch` lists."""
    log_p = log_softmax(logits[: len(batch.token)], -1).gather(1, batch.token[:, None])[:, 0]
    return -logits.new_zeros(len(batch.facts)).index_add(0, batch.fact, log_p * batch.share.to(logits.dtype))


register("grace", grace, GraceSettings)
