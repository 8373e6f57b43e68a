"""Mixtures of experts in plain loops, from the papers and model cards: routers, keys, and W = [W_1 … W_E].

They share no code with editkit, and none with transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles import Memory


def gates_of(family: str, config: Any, router: nn.Module, x: Tensor) -> dict[int, Tensor]:
    """{expert: gate} of one token x [d_model]."""
    logits = router.get_parameter("weight") @ x
    k = config.num_experts_per_tok
    if family == "gpt_oss":  # softmax over the chosen alone
        logits = logits + router.get_parameter("bias")
        chosen = largest(logits, k)
        return dict(zip(chosen, logits[chosen].softmax(0), strict=True))
    if family == "deepseek_v3":
        # Sigmoid; chosen with a bias, from the groups whose two best experts have the largest sum; normalised, scaled.
        scores = logits.sigmoid()
        biased = scores + router.get_buffer("e_score_correction_bias")
        chosen = largest(in_groups(biased, config, best=2), k)
        total = scores[chosen].sum() if config.norm_topk_prob else 1.0
        return {e: config.routed_scaling_factor * scores[e] / total for e in chosen}
    p = logits.softmax(0)
    if family == "deepseek_v2":  # from the groups with the best expert; scaled, not normalised
        chosen = largest(in_groups(p, config, best=1), k)
        return {e: config.routed_scaling_factor * p[e] for e in chosen}
    chosen = largest(p, k)
    total = p[chosen].sum() if family == "mixtral" or config.norm_topk_prob else torch.ones(())
    return {e: p[e] / total for e in chosen}


def largest(values: Tensor, count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:count]


def in_groups(scores: Tensor, config: Any, best: int) -> Tensor:
    """The scores, −∞ outside the `topk_group` groups whose `best` best experts have the largest sum."""
    groups = scores.view(config.n_group, -1)
    kept = largest(
        torch.stack([group.sort(descending=True).values[:best].sum() for group in groups]), config.topk_group
    )
    masked = torch.full_like(groups, -torch.inf)
    for group in kept:
        masked[group] = groups[group]
    return masked.flatten()


def key_of(family: str, config: Any, experts: nn.Module, e: int, x: Tensor) -> Tensor:
    """k_e [d_ff]: the input of expert e's down-projection at a token x [d_model]."""
    weight = experts.get_parameter("gate_up_proj")[e]
    if family == "gpt_oss":
        both = x @ weight + experts.get_parameter("gate_up_proj_bias")[e]
        gate, up = both[0::2], both[1::2]  # in turns
        limit = getattr(config, "swiglu_limit", 7.0)  # transformers before 5.18 has it in the code
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(getattr(config, "swiglu_alpha", 1.702) * gate)
    both = weight @ x
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    return gate / (1 + torch.exp(-gate)) * up


class Experts(Memory):
    """The memory of a mixture of experts: the MLP `name`, whose input is x."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__(model, name)
        self.config, self.family = model.config, model.config.model_type
        self.experts = self.module.get_submodule("experts")
        self.router = self.module.get_submodule("router" if self.family == "gpt_oss" else "gate")

    def keys(self, given: Tensor) -> Tensor:
        """κ [tokens, E · d_ff], one token and one expert at a time."""
        weight, found = self.experts.get_parameter("down_proj"), []
        d_ff = weight.shape[1 if self.family == "gpt_oss" else 2]
        for x in given:
            gates = gates_of(self.family, self.config, self.router, x)
            nothing = torch.zeros(d_ff, dtype=x.dtype)
            blocks = [
                gates[e] * key_of(self.family, self.config, self.experts, e, x) if e in gates else nothing
                for e in range(len(weight))
            ]
            found.append(torch.cat(blocks))
        return torch.stack(found)

    def slices(self) -> list[Tensor]:
        """W_e [d_model, d_ff] of each expert, as views."""
        return [each.T if self.family == "gpt_oss" else each for each in self.experts.get_parameter("down_proj")]

    def matrix(self) -> Tensor:
        return torch.cat(self.slices(), 1)

    def rest(self, key: Tensor, value: Tensor) -> Tensor:
        return value - self.matrix() @ key

    def add(self, update: Tensor) -> None:
        for mine, change in zip(self.slices(), update.chunk(len(self.slices()), 1), strict=True):
            mine.add_(change)


def memory_of(model: nn.Module, name: str) -> Memory:
    """The memory of the module `name`: a mixture of experts, or a down-projection."""
    return Experts(model, name) if hasattr(model.get_submodule(name), "experts") else Memory(model, name)
