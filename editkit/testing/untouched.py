"""Everything a method must leave as it was, compared on bits and object identities."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from editkit.models.architecture import experts_in, weight_name
from editkit.models.load import LanguageModel
from editkit.models.snapshot import bits, tensors_of

TARGETS = ("Rome", "Berlin Madrid", "Oslo")


def tokens_of(lm: LanguageModel, text: str, target: str) -> tuple[list[int], int]:
    """ids of text + " " + target, and how many of them are the target's: by tokenising twice."""
    prompt, full = (lm.tokenizer(t)["input_ids"] for t in (text, f"{text} {target}"))
    assert full[: len(prompt)] == prompt and len(full) > len(prompt)
    return full, len(full) - len(prompt)


def plain_nll(model: Callable[..., Any], rows: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean over rows of the mean NLL per target token, one row and one token at a time."""
    losses = []
    for ids, count in rows:
        p = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        losses.append(torch.stack([-p[i - 1, ids[i]].log() for i in range(len(ids) - count, len(ids))]).mean())
    return torch.stack(losses).mean()


def count_hooks(model: torch.nn.Module) -> int:
    """Forward and backward hooks of all modules, those before and those after."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def everything(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the bits of every parameter and buffer, as integers."""
    return {name: bits(tensor).clone() for name, tensor in tensors_of(model).items()}


def _state(lm: LanguageModel) -> dict[str, Any]:
    model = lm.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "flags": {n: p.requires_grad for n, p in parameters.items()},
        "grads": {n: id(p.grad) if p.grad is not None else None for n, p in parameters.items()},
        "parameters": {n: id(p) for n, p in parameters.items()},
        "modules": {n: id(m) for n, m in modules.items()},
        "training": {n: m.training for n, m in modules.items()},
        "attributes": {n: sorted(m.__dict__) for n, m in modules.items()},
        "hooks": count_hooks(model),
        "accumulate hooks": [n for n, p in parameters.items() if getattr(p, "_post_accumulate_grad_hooks", None)],
        "random": torch.random.get_rng_state().tolist(),
    }


@contextmanager
def untouched(lm: LanguageModel, site: str) -> Iterator[None]:
    """The body leaves bits, objects, flags, .grad, modes, hooks, attributes and the random state as they were.

    Before the body a flag, a mode and a gradient are set to what a careless method would overwrite.
    """
    weight = lm.model.get_parameter(weight_name(site, experts_in(lm.model.get_submodule(site))))
    head = lm.model.get_output_embeddings()
    assert head is not None
    frozen = lm.model.get_input_embeddings().get_parameter("weight")
    weight.grad, kept = torch.ones_like(weight), torch.ones_like(weight)
    frozen.requires_grad_(False)
    head.train()
    before, bits = _state(lm), everything(lm.model)
    try:
        yield
        after, bits_after = _state(lm), everything(lm.model)
    finally:
        grad, weight.grad = weight.grad, None
        frozen.requires_grad_(True)
        head.eval()
    for what, value in before.items():
        assert after[what] == value, what
    assert torch.equal(grad, kept)
    assert bits.keys() == bits_after.keys() and all(torch.equal(b, bits_after[n]) for n, b in bits.items())
