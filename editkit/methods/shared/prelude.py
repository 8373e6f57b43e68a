"""What every method begins and ends with: its facts checked, its second moments found, its provenance written."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from editkit.errors import EditkitError, FactError
from editkit.facts import Fact
from editkit.methods.shared.contexts import context_templates
from editkit.models.load import LanguageModel
from editkit.moments import Factored, Identity, SecondMoment, second_moments
from editkit.settings import MethodSettings, MomentSettings, ValueSettings

# How to collect C, or C itself for each layer.
Moments = MomentSettings | Mapping[int, SecondMoment] | None


class Collected(dict[int, SecondMoment]):
    """C of each layer as `settings` had it collected: what many edits of one base share."""

    def __init__(self, found: Mapping[int, SecondMoment], settings: MomentSettings) -> None:
        super().__init__(found)
        self.settings = settings


def shared_inputs(
    lm: LanguageModel, settings: MethodSettings, moments: Moments, seed: int, progress: bool
) -> dict[str, Any]:
    """The keyword arguments `moments` and `contexts` of a method, found once for many edits of `lm` as it is now.

    Each edit is the one the method computes without them, byte for byte. Empty for methods that take neither.
    """
    if not isinstance(settings, ValueSettings):
        return {}
    settings = settings.resolved(lm.name, lm.layers)
    asked = asdict(settings)
    layers = [lm.check_layer(layer) for layer in asked.get("layers") or [asked["layer"]]]
    moments = moments or MomentSettings()
    if isinstance(moments, MomentSettings) and moments.enabled:
        moments = Collected(second_moments(lm, layers, moments, seed=seed, progress=progress), moments)
    return {"moments": moments, "contexts": context_templates(lm, settings.contexts, seed)}


def checked_facts(lm: LanguageModel, facts: Fact | Sequence[Fact]) -> list[Fact]:
    """The facts as a list, duplicates dropped with a warning.

    Raises EditkitError when there is none, FactError for a target the tokenizer cannot write and for two facts
    that ask for different answers to one prompt.
    """
    listed = [facts] if isinstance(facts, Fact) else list(facts)
    if not listed:
        raise EditkitError("No fact was given: there is nothing to edit.")
    kept: dict[str, Fact] = {}
    for fact in listed:
        fact.check_targets(lm)
        other = kept.setdefault(fact.text, fact)
        if other.target_new.strip() != fact.target_new.strip():
            raise FactError(
                f"Two facts contradict each other: {fact.text!r} shall be {other.target_new!r} and "
                f"{fact.target_new!r}. Keep one of them."
            )
    if len(kept) < len(listed):
        warnings.warn(f"{len(listed) - len(kept)} of {len(listed)} facts were given twice and count once", stacklevel=3)
    return list(kept.values())


def find_moments(
    lm: LanguageModel, layers: Sequence[int], moments: Moments, seed: int, progress: bool
) -> tuple[dict[int, SecondMoment | None], dict[str, Any]]:
    """C at the down-projections of `layers` (None: the identity), and what the record says of it."""
    settings = _settings_of(moments)
    if settings is not None and not settings.enabled:
        return dict.fromkeys(layers), asdict(settings)
    if not isinstance(moments, Mapping):
        moments = second_moments(lm, layers, settings, seed=seed, progress=progress)
    elif absent := [layer for layer in layers if layer not in moments]:
        raise EditkitError(f"No second moment was given for layers {absent}; there are {sorted(moments)}.")
    found = {layer: moments[layer] for layer in layers}
    if settings is None:
        return dict(found), {"given": True}
    first = found[layers[0]]
    said = {"keys": first.count, "keys_per_dimension": first.vectors_per_dimension}
    return dict(found), asdict(settings) | said


def factor_moments(
    lm: LanguageModel, layers: Sequence[int], moments: Moments, seed: int, progress: bool
) -> tuple[dict[int, Factored], dict[str, Any]]:
    """The Cholesky factors of `find_moments`, with the ridge of the settings (its default for given moments)."""
    found, described = find_moments(lm, layers, moments, seed, progress)
    ridge = (_settings_of(moments) or MomentSettings()).ridge
    factored = {layer: Identity() if c is None else c.factor(ridge) for layer, c in found.items()}
    if "keys" in described:
        described |= {"condition": max(f.condition for f in factored.values())}
    return factored, described


def _settings_of(moments: Moments) -> MomentSettings | None:
    """How C is or was collected; None where it was given without."""
    if isinstance(moments, Collected):
        return moments.settings
    return None if isinstance(moments, Mapping) else moments or MomentSettings()


def provenance(method: str, settings: MethodSettings, facts: Sequence[Fact], seed: int, **more: Any) -> dict[str, Any]:
    """How an edit was computed, as JSON."""
    return {
        "method": method,
        "settings": asdict(settings),
        "seed": seed,
        "facts": [asdict(fact) for fact in facts],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **more,
    }
