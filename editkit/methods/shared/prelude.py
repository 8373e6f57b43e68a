"""What an edit is computed from: checked facts, resolved settings, second moments, context templates; its provenance.

`prepare` is how ROME, MEMIT and their descendants begin.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Generic, TypeVar

import torch

from editkit.edits.base import Base, base_of
from editkit.errors import EditkitError, FactError, ModelError
from editkit.facts import Fact
from editkit.methods.shared.contexts import context_templates
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.models.wrapped import require_all_editable
from editkit.moments import Factored, Identity, SecondMoment, resolved, second_moments
from editkit.settings import AttributionSettings, MethodSettings, MomentSettings, SpreadSettings, ValueSettings

# How to collect C, or C itself for each layer.
Moments = MomentSettings | Mapping[int, SecondMoment] | None
S = TypeVar("S", bound=ValueSettings)
S_co = TypeVar("S_co", bound=ValueSettings, covariant=True)


@dataclass(frozen=True)
class Given(Generic[S_co]):
    """What an edit is computed from."""

    facts: list[Fact]
    settings: S_co  # resolved for the model
    seed: int
    layers: list[int]  # blocks to write, ascending
    base: Base
    moments: dict[int, SecondMoment | None]  # C at each layer's down-projection; None: the identity
    ridge: float  # added to C's diagonal, as a fraction of its mean
    described: dict[str, Any]  # the moments, for the record
    templates: list[str]  # contexts with one `{}` for the prompt, the bare "{}" first

    @cached_property
    def factored(self) -> "Factors":
        """The Cholesky factor of C + ridge, by layer."""
        return Factors(self.moments, self.ridge)

    def provenance(self, method: str, *, facts: Sequence[Fact] | None = None, **more: Any) -> dict[str, Any]:
        """How an edit of `facts` (None: all) was computed, as JSON; with C's condition where C was factored."""
        moments = dict(self.described)
        if "factored" in self.__dict__ and "keys" in moments:
            moments["condition"] = self.factored.condition
        how = {"seed": self.seed, "moments": moments, "contexts": self.templates}
        return provenance(method, self.settings, self.facts if facts is None else facts, **how, **more)


class Factors:
    """The Cholesky factor of C + ridge of each layer, made at once, so that a C which cannot be factored fails before
    the values are computed. Large ones are made when they are asked for, and one of them is held at a time."""

    def __init__(self, moments: Mapping[int, SecondMoment | None], ridge: float) -> None:
        """`moments`: C by layer, None for the identity. `ridge`: added to its diagonal, as a fraction of its mean."""
        self._moments, self._ridge = moments, ridge
        self._large: tuple[int | None, Factored] = None, Identity()
        self._conditions: dict[int, float] = {}  # of large ones
        for moment in moments.values():
            if moment is not None and moment.keeps:
                moment.factor(ridge)

    def __getitem__(self, layer: int) -> Factored:
        moment = self._moments[layer]
        if moment is None:
            return Identity()
        if moment.keeps:
            return moment.factor(self._ridge)
        if self._large[0] != layer:
            self._large = None, Identity()  # frees the former
            self._large = layer, moment.factor(self._ridge)
            self._conditions[layer] = self._large[1].condition
        return self._large[1]

    @property
    def condition(self) -> float:
        """The largest condition number of those that there are."""
        kept = [self[layer].condition for layer, moment in self._moments.items() if moment is None or moment.keeps]
        return max([*kept, *self._conditions.values()])


def prepare(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: S,
    *,
    seed: int,
    moments: Moments,
    contexts: Sequence[str] | None,
    progress: bool,
    contradictions: bool = False,
) -> Given[S]:
    """What an edit of `facts` is computed from.

    - `settings`: None in a field takes the model's constant.
    - `seed`: of drawn contexts and running text.
    - `moments`: how to collect C, or {layer: SecondMoment}.
    - `contexts`: templates with one `{}`, the bare "{}" first; None draws them.
    - `progress`: whether to show the collection's progress bar.
    - `contradictions`: whether facts may ask for different answers to one prompt, as edits apart from each other do.

    Raises EditkitError, FactError (`checked_facts`) and ModelError (`checked_layers`).
    """
    listed = _with_targets(lm, facts) if contradictions else checked_facts(lm, facts)
    settings = settings.resolved(lm.name, lm.layers)
    layers = checked_layers(lm, settings)
    base = base_of(lm)
    found, described = find_moments(lm, layers, moments, seed, progress)
    ridge = (_settings_of(moments) or MomentSettings()).ridge  # its default where C was given
    templates = context_templates(lm, settings.contexts, seed) if contexts is None else list(contexts)
    return Given(listed, settings, seed, layers, base, found, ridge, described, templates)


def checked_facts(lm: LanguageModel, facts: Fact | Sequence[Fact]) -> list[Fact]:
    """The facts as a list, duplicates dropped with a warning.

    Raises EditkitError when there is none, FactError for a target the tokenizer cannot write and for two facts
    that ask for different answers to one prompt.
    """
    listed = _with_targets(lm, facts)
    if not listed:
        raise EditkitError("No fact was given: there is nothing to edit.")
    kept: dict[str, Fact] = {}
    for fact in listed:
        other = kept.setdefault(fact.text, fact)
        if other.target_new.strip() != fact.target_new.strip():
            raise FactError(
                f"Two facts contradict each other: {fact.text!r} shall be {other.target_new!r} and "
                f"{fact.target_new!r}. Keep one of them."
            )
    if len(kept) < len(listed):
        warnings.warn(f"{len(listed) - len(kept)} of {len(listed)} facts were given twice and count once", stacklevel=4)
    return list(kept.values())


def _with_targets(lm: LanguageModel, facts: Fact | Sequence[Fact]) -> list[Fact]:
    """The facts as a list. Raises FactError for a target the tokenizer cannot write."""
    listed = [facts] if isinstance(facts, Fact) else list(facts)
    for fact in listed:
        fact.check_targets(lm)
    return listed


def checked_layers(lm: LanguageModel, settings: MethodSettings) -> list[int]:
    """The blocks that `settings` (resolved) name, ascending.

    Raises ModelError for a block the model does not have, for a weight that cannot be edited as the model is wrapped
    (models/wrapped.py), and for several blocks of SpreadSettings in a family with a norm between the MLP and the
    residual stream.
    """
    layers = [lm.check_layer(layer) for layer in settings.blocks]
    if len(layers) > 1 and isinstance(settings, SpreadSettings) and lm.architecture.mlp_norm is not None:
        raise ModelError(
            f"Layers {layers} were asked for; '{lm.architecture.family}' has a norm between the MLP and the residual "
            "stream, so a residual cannot be shared out over several blocks. Give one, as in method.layers=[3]."
        )
    require_all_editable(lm.model, [down_of(lm, layer) for layer in layers])
    return layers


def provenance(method: str, settings: MethodSettings, facts: Sequence[Fact], **more: Any) -> dict[str, Any]:
    """How an edit was computed, as JSON."""
    return {
        "method": method,
        "settings": asdict(settings),
        "facts": [asdict(fact) for fact in facts],
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
        **more,
    }


# --- second moments -----------------------------------------------------------------------------------------------


class Collected(dict[int, SecondMoment]):
    """C of each layer as `settings` had it collected: what many edits of one base share."""

    def __init__(self, found: Mapping[int, SecondMoment], settings: MomentSettings) -> None:
        super().__init__(found)
        self.settings = settings


@in_eval_mode
def shared_inputs(
    lm: LanguageModel, settings: MethodSettings, moments: Moments, seed: int, progress: bool
) -> dict[str, Any]:
    """The options `moments` and `contexts` of a method, computed once for many edits of `lm` as it is now.

    Each edit is the one the method computes without them, byte for byte. Empty for settings with neither a value to
    optimise nor contexts.
    """
    if isinstance(settings, AttributionSettings):
        return {"contexts": context_templates(lm, settings.contexts, seed)}
    if not isinstance(settings, ValueSettings):
        return {}
    settings = settings.resolved(lm.name, lm.layers)
    layers = checked_layers(lm, settings)
    moments = moments or MomentSettings()
    if isinstance(moments, MomentSettings) and moments.enabled:
        moments = resolved(lm, moments)
        moments = Collected(second_moments(lm, layers, moments, seed=seed, progress=progress), moments)
    return {"moments": moments, "contexts": context_templates(lm, settings.contexts, seed)}


def find_moments(
    lm: LanguageModel, layers: Sequence[int], moments: Moments, seed: int, progress: bool
) -> tuple[dict[int, SecondMoment | None], dict[str, Any]]:
    """C at the down-projections of `layers` (None: the identity), and what the record says of it.

    Raises EditkitError when `moments` has no C for one of the layers.
    """
    settings = _settings_of(moments)
    if settings is not None and not settings.enabled:
        return dict.fromkeys(layers), asdict(settings)
    if settings is not None:
        settings = resolved(lm, settings)
    if not isinstance(moments, Mapping):
        moments = second_moments(lm, layers, settings, seed=seed, progress=progress)
    elif absent := [layer for layer in layers if layer not in moments]:
        raise EditkitError(f"No second moment was given for layers {absent}; there are {sorted(moments)}.")
    found = {layer: moments[layer] for layer in layers}
    if settings is None:
        return dict(found), {"given": True}
    fewest = min(found.values(), key=lambda moment: moment.vectors_per_dimension)
    size = {"keys": fewest.count, "keys_per_dimension": fewest.vectors_per_dimension}
    return dict(found), asdict(settings) | size


def _settings_of(moments: Moments) -> MomentSettings | None:
    """How C is or was collected; None where it was given without."""
    if isinstance(moments, Collected):
        return moments.settings
    return None if isinstance(moments, Mapping) else moments or MomentSettings()
