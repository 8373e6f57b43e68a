"""The last token's attention to the subject."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.models.evalmode import in_eval_mode
from editkit.models.load import LanguageModel
from editkit.models.lookup import lookup_position
from editkit.models.tokens import tokenise
from editkit.nethook import get_module
from editkit.shown import Rows, Shown


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Shown):
    """The last token's attention. `weights` is [blocks, heads, tokens] and sums to 1 over the tokens."""

    axes: ClassVar[tuple[str, str, str]] = ("block", "head", "token")

    weights: Tensor
    tokens: tuple[str, ...]
    subject: tuple[int, int]  # positions of its first and last token

    def shown(self) -> tuple[str, Rows]:
        """The prompt, and the head that looks most at the subject."""
        share = self.to_subject
        block, head = divmod(int(share.argmax()), share.shape[1])
        most = f"{share.max().item():.4f} at block {block}, head {head}; mean {share.mean().item():.4f}"
        return "Attention to the subject", [("prompt", "".join(self.tokens)), ("share", most)]

    @property
    def to_subject(self) -> Tensor:
        """[blocks, heads]: the share of attention on the subject's tokens."""
        first, last = self.subject
        return self.weights[..., first : last + 1].sum(-1)


@in_eval_mode
@torch.no_grad()
def attention_to_subject(lm: LanguageModel, fact: Fact) -> Attention:
    """The attention of the last token of the fact's prompt, by block and head.

    transformers gives weights only with its "eager" attention, so the model runs once with it and is then set back.
    Raises EditkitError for a model that gives no weights.
    """
    rows = tokenise(lm, [fact.text])
    first = lookup_position(rows, 0, fact.prompt, fact.subject, "subject_first")
    last = lookup_position(rows, 0, fact.prompt, fact.subject)
    names = [lm.architecture.attention.format(i) for i in range(lm.layers)]
    kept: list[Tensor] = []  # [heads, tokens] of each block, in the order of the forward pass

    def keep(module: Any, args: Any, output: Any) -> None:
        """A hook of our own: nethook keeps the first tensor of an output, and the weights come later in it."""
        weights = [each for each in output if isinstance(each, Tensor) and each.ndim == 4]
        kept.extend(each[0, :, -1].float().cpu() for each in weights[-1:])

    # Not with output_attentions=True, which leaves hooks of transformers on the model.
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
    """Eager attention in the body, the model's own afterwards.

    It is set where modules read it at each call, since `set_attn_implementation` has no effect on older families
    (Falcon).
    """
    configs: dict[int, Any] = {id(m.config): m.config for m in lm.model.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own
