"""The model that an edit was computed for."""

from dataclasses import dataclass

from editkit.models.load import LanguageModel

QUANTIZED_BASE = "/"  # in the dtype of a quantised base, between its scheme and the dtype of its activations


@dataclass(frozen=True)
class Base:
    """The model that an edit was computed for."""

    name: str
    digest: str
    dtype: str


def base_of(lm: LanguageModel) -> Base:
    """The identity of `lm` as it is now. The dtype of a quantised model is its scheme and the dtype of its activations,
    as in "bnb-nf4/float32"."""
    dtype, scheme = str(lm.dtype).removeprefix("torch."), lm.quantization
    return Base(lm.name, lm.digest, dtype if scheme is None else f"{scheme}{QUANTIZED_BASE}{dtype}")
