"""What an edit changes inside a model.

    logit_lens             the next-token distribution after each block, by the final norm and the head
    attention_to_subject   the last token's attention to the subject's tokens, by block and head
    side_effects           how much an edit will change its weights' outputs for other prompts, before it is applied
    stream_change          how far an edit moves the residual stream, at each block and token

None of these changes the model. Where an edit is applied to measure it, it is removed again, and that is verified,
before the function returns.
"""

from editkit.lenses.attention import Attention, attention_to_subject
from editkit.lenses.change import StreamChange, before_and_after, stream_change
from editkit.lenses.depth import Lens, logit_lens
from editkit.lenses.prediction import SideEffects, side_effects

__all__ = [
    "Attention",
    "Lens",
    "SideEffects",
    "StreamChange",
    "attention_to_subject",
    "before_and_after",
    "logit_lens",
    "side_effects",
    "stream_change",
]
