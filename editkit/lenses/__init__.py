"""Looking at an edit from inside: answers over depth, attention to the subject, and where an edit is felt.

    logit_lens             what the residual stream behind each block would say, read by the final norm and the head
    attention_to_subject   how much the last token attends to the subject's, by block and head
    side_effects           how much an edit will change what its weight puts out for other prompts, before it is applied
    stream_change          how far one edit moves the residual stream, at each block and token

All of it only looks. An edit that is applied to look is taken back, and that verified, before anything is returned.
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
