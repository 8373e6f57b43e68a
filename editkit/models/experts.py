"""Mixtures of experts: blocks whose MLP sends each token to a few of E experts.

Let x be the MLP's input at a token, A the experts that the router chooses for it, and g_e their gates. With this
routing fixed, the block is linear in one stacked key:

    m = Σ_{e in A} g_e (W_e k_e + b_e) + s(x) = W κ + (Σ g_e b_e + s(x))

    W = [W_1 … W_E]             [d_model, E · d_ff]
    κ = [g_1 k_1; …; g_E k_E]   [E · d_ff], with g_e k_e = 0 for an expert that is not in A

k_e [d_ff] is the input of expert e's down-projection W_e, b_e its bias (gpt-oss), s(x) the shared experts' output
(DeepSeek, Qwen2-MoE). So what the methods do with W k + b they do here with W κ. The site of v is the MLP's output: the
residual stream gets m, and δ is added to it.

x does not depend on its own block's W. An edit of one block thus leaves the routing there as it is; that of later
blocks may change (see `routing_change` in editkit.edits).

transformers keeps W as one 3-D parameter `down_proj`, [E, d_model, d_ff] or for gpt-oss [E, d_ff, d_model], and has one
interface for all families: the router gives (logits, gates, experts), and the experts module says how it stores its
weights and applies its activation. So a family declares names alone (architecture.py). Routers differ in their rules
(softmax before or after the choice, normalised gates or not, groups, a bias, a scaling factor); they are run, not
written again.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from editkit.models.architecture import experts_in
from editkit.models.load import LanguageModel
from editkit.models.precision import wide
from editkit.nethook import NameNotFound, get_module


class Routed(NamedTuple):
    """Where tokens are sent."""

    experts: Tensor  # [tokens, k] their numbers
    gates: Tensor  # [tokens, k]


def has_experts(lm: LanguageModel, layer: int) -> bool:
    """Whether the MLP of block `layer` is a mixture of experts; in a family that has them, some blocks are dense."""
    if lm.architecture.experts is None:
        return False
    try:
        get_module(lm.model, lm.architecture.experts.format(layer))
    except NameNotFound:
        return False
    return True


def down_of(lm: LanguageModel, layer: int) -> str:
    """The module of block `layer` that holds W: its down-projection, or its experts."""
    if lm.architecture.experts is not None and has_experts(lm, layer):
        return lm.architecture.experts.format(layer)
    return lm.architecture.down(layer)


def site_of(lm: LanguageModel, layer: int) -> str:
    """The module of block `layer` that puts out m, and whose input decides the key: the down-projection, or the MLP of
    a mixture of experts."""
    if lm.architecture.mlp is not None and has_experts(lm, layer):
        return lm.architecture.mlp.format(layer)
    return lm.architecture.down(layer)


@torch.no_grad()
def keys_of(lm: LanguageModel, module: str, given: Tensor) -> Tensor:
    """The keys [.., D] of W, from what entered its site: the same for a down-projection, κ for experts.

    - `module`: that holds W, as `down_of` names it.
    - `given`: the site's input, [.., d_ff] or for experts [.., d_model].

    κ [.., E · d_ff] is in float64 on the CPU.
    """
    if experts_in(get_module(lm.model, module)) is None:
        return given
    tokens = given.flatten(0, -2)
    routed, keys = expert_keys(lm, module, tokens)
    return stacked(lm, module, routed, keys).view(*given.shape[:-1], -1)


def routed(lm: LanguageModel, module: str, x: Tensor) -> Routed:
    """The experts and gates that the router chooses for x [tokens, d_model], the input of the experts `module`."""
    layer = next(i for i in range(lm.layers) if down_of(lm, i) == module)
    assert lm.architecture.router is not None  # declared with the experts
    router = get_module(lm.model, lm.architecture.router.format(layer))
    _, gates, experts = router(_like_weights(lm, module, x))
    return Routed(experts, gates)


def expert_keys(lm: LanguageModel, module: str, x: Tensor) -> tuple[Routed, Tensor]:
    """The routing of x [tokens, d_model], and g_e k_e [tokens, k, d_ff] for each chosen expert, in float32 or wider.

    They are computed as the experts compute them: gate and up projections of each expert, its activation, its gate.
    """
    holder: Any = get_module(lm.model, module)  # its attributes are those of transformers' experts
    given = _like_weights(lm, module, x)
    chosen = routed(lm, module, x)
    d_ff = holder.down_proj.shape[1 if holder.is_transposed else 2]
    keys = given.new_zeros(*chosen.experts.shape, d_ff, dtype=wide(given.dtype))
    for expert in chosen.experts.unique().tolist():
        token, slot = torch.where(chosen.experts == expert)
        weight = holder.gate_up_proj[expert]
        both = given[token] @ (weight if holder.is_transposed else weight.T)  # [tokens, 2 · d_ff]
        if holder.has_bias:
            both = both + holder.gate_up_proj_bias[expert]
        k = holder._apply_gate(both)  # transformers' own name for the activation of gate and up parts
        keys[token, slot] = (k * chosen.gates[token, slot, None]).to(keys.dtype)
    return chosen, keys


def stacked(lm: LanguageModel, module: str, routed: Routed, keys: Tensor) -> Tensor:
    """κ [tokens, E · d_ff] in float64 on the CPU, from g_e k_e [tokens, k, d_ff] of the chosen experts."""
    count = experts_in(get_module(lm.model, module))
    assert count is not None
    tokens, _, d_ff = keys.shape
    blocks = torch.zeros(tokens, count, d_ff, dtype=torch.float64)
    blocks[torch.arange(tokens)[:, None], routed.experts.cpu()] = keys.detach().double().cpu()
    return blocks.flatten(1)


def _like_weights(lm: LanguageModel, module: str, x: Tensor) -> Tensor:
    """x in the dtype and on the device of the experts, as the model hands it to them."""
    weight = get_module(lm.model, module).gate_up_proj
    assert isinstance(weight, Tensor)
    return x.to(weight.device, weight.dtype)
