"""How many keys a second moment needs: ten a dimension of d_ff, where moments.tokens does not say.

C = E[k kᵀ] has d_ff dimensions, so fewer than d_ff keys leave it singular. Ten a dimension is the upper end of what
arXiv 2506.04226 finds enough: 143,360 for d_ff 14,336, as in Llama-3-8B. Small models get 40,000 all the same.

One number holds for all blocks of a model, so that a layer's second moment does not depend on which others are asked
for with it. Of a mixture of experts, an expert that gets an average share of the tokens has ten keys a dimension.
"""

from dataclasses import replace

from editkit.models.architecture import experts_in, orientation
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.nethook import get_module, get_parameter
from editkit.settings import FEWEST_KEYS, KEYS_PER_DIMENSION, MomentSettings


def keys_wanted(lm: LanguageModel) -> int:
    """Keys to collect on this model: max(10 · d_ff · experts / experts a token, 40,000), over all its blocks.

    Weights are not read: they may be on the meta device.
    """
    chosen = getattr(lm.model.config.get_text_config(), "num_experts_per_tok", None) or 1
    needed = [FEWEST_KEYS]
    for module in (down_of(lm, layer) for layer in range(lm.layers)):
        experts, d_ff = key_shape(lm, module)
        per_token = experts / chosen if experts else 1.0
        needed.append(round(KEYS_PER_DIMENSION * d_ff * per_token))
    return max(needed)


def resolved(lm: LanguageModel, settings: MomentSettings) -> MomentSettings:
    """These settings with the number of keys for this model where they say None."""
    return settings if settings.tokens is not None else replace(settings, tokens=keys_wanted(lm))


def key_shape(lm: LanguageModel, module: str) -> tuple[int | None, int]:
    """Experts (None for a single down-projection) and d_ff of the `module` that holds W."""
    holder = get_module(lm.model, module)
    experts = experts_in(holder)
    if experts is not None:
        shape = get_parameter(lm.model, f"{module}.down_proj", allow_meta=True).shape
        return experts, shape[1 if orientation(holder, module) == "in_out" else 2]
    stated = getattr(holder, "in_features", None)  # a quantised weight is packed: its shape says something else
    if isinstance(stated, int):
        return None, stated
    weight = get_parameter(lm.model, f"{module}.weight", allow_meta=True)
    return None, weight.shape[0 if orientation(holder, module) == "in_out" else 1]
