"""How much the last token attends to the subject."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.nethook import get_module


@dataclass(frozen=True, eq=False)
class Attention:
    """The last token's attention. `weights`: [blocks, heads, tokens], each row over the tokens sums to 1."""

    axes: ClassVar[tuple[str, str, str]] = ("block", "head", "token")

    weights: Tensor
    tokens: tuple[str, ...]
    subject: tuple[int, int]

    @property
    def to_subject(self) -> Tensor:
        """[blocks, heads]: the share that goes to the subject's tokens."""
        first, last = self.subject
        return self.weights[..., first : last + 1].sum(-1)


@torch.no_grad()
def attention_to_subject(lm: LanguageModel, fact: Fact) -> Attention:
    """How the last token of the fact's prompt attends, by block and head.

    Weights exist under transformers' "eager" attention alone: the model is run with it once and set back. Raises
    EditkitError for a model that does not give its weights.
    """
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    names = [lm.architecture.attention.format(i) for i in range(lm.layers)]
    kept: list[Tensor] = []  # [heads, tokens] of each block, in the order in which they run

    def keep(module: Any, args: Any, output: Any) -> None:
        """By hand: the hook layer keeps what goes on to the next module, and the weights do not."""
        found = [each for each in output if isinstance(each, Tensor) and each.ndim == 4]
        kept.extend(weights[0, :, -1].float().cpu() for weights in found[-1:])

    # Not by output_attentions=True, which leaves transformers' own hooks on the model for good.
    with _eager(lm), ExitStack() as hooks:
        for name in names:
            hooks.callback(get_module(lm.model, name).register_forward_hook(keep).remove)
        lm.model(**rows.inputs(), use_cache=False)
    if len(kept) != lm.layers:
        raise EditkitError(
            f"The family '{lm.architecture.family}' gives attention weights in {len(kept)} of {lm.layers} blocks under "
            "eager attention. Attention cannot be shown for this model."
        )
    tokens = tuple(fact.text[begin:end] for begin, end in rows.offsets[0])
    return Attention(torch.stack(kept), tokens, (first, last))


@contextmanager
def _eager(lm: LanguageModel) -> Iterator[None]:
    """Eager attention inside, the model's own after.

    Set where the modules read it at each call: `set_attn_implementation` does nothing for older families (Falcon).
    """
    configs = {id(module.config): module.config for module in lm.model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
