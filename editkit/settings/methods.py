"""What the settings of methods share: contexts, second moments, the optimisation of a value, the blocks to write.

Each method's own settings are in its file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from editkit.errors import ConfigError
from editkit.settings.checks import require, require_one_of
from editkit.settings.constants import Constants

LOOKUP_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
TRANSFORMS = ("rect", "prune", "sphere")
ENGINES = ("replay", "full")
SOLVERS = ("adam", "descent")
ADAMS = ("lr", "weight_decay")  # settings of a value that Adam alone has
KEYS_PER_DIMENSION = 10  # of d_ff, behind a second moment (arXiv 2506.04226)
FEWEST_KEYS = 40_000  # behind the second moment of a small model: 53 a dimension of the atlas model
MEMIT_STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class ContextSettings:
    """Random texts put in front of the prompt, so that a key or value does not fit one context only.

    ROME section 3.1 and its code: the bare prompt, 10 samples of 4 tokens and 10 of 9, top-k 5; MEMIT's: one of
    10 tokens after each of five words. They are drawn with the run's seed and belong to one model, unlike the
    reference's unseeded global.
    """

    starts: tuple[str, ...] = ("",)  # what samples begin with; "" is the end-of-text token
    lengths: tuple[int, ...] = (4, 9)  # new tokens of each group of samples
    counts: tuple[int, ...] = (10, 10)  # samples in each group, for each start
    top_k: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "counts", tuple(self.counts))
        if len(self.lengths) != len(self.counts):
            raise ConfigError(
                f"contexts.lengths has {len(self.lengths)} entries and contexts.counts {len(self.counts)}: "
                "give one count for each length."
            )
        require(all(n > 0 for n in (*self.lengths, *self.counts)), "contexts.lengths and counts", self, "positive")
        require(self.top_k > 0, "contexts.top_k", self.top_k, "positive")


@dataclass(frozen=True)
class MomentSettings:
    """How the second moment C = E[k kᵀ] is collected (ROME section 3.1, code `layer_stats.py`).

    `tokens` None: ten keys a dimension of d_ff, and 40,000 at least (`editkit.moments.keys_wanted`).
    """

    source: str = "atlas"  # running text: see `corpora.running_text`; or imported:NAME, from the reference's .npz
    tokens: int | None = None  # key vectors to collect; None: as many as the model needs
    block: int = 128  # tokens a packed block
    ridge: float = 1e-4  # added to C's diagonal, as a fraction of its mean; explicit, 0 turns it off
    enabled: bool = True  # False uses the identity in place of C

    def __post_init__(self) -> None:
        require(self.tokens is None or self.tokens > 0, "moments.tokens", self.tokens, "positive")
        require(self.block > 1, "moments.block", self.block, "2 or more")
        require(self.ridge >= 0, "moments.ridge", self.ridge, "0 or more")


@dataclass(frozen=True)
class MethodSettings:
    """What every method has."""

    constants: ClassVar[Constants] = Constants()  # fill what is None, by model

    transform: str | None = field(default=None, kw_only=True)  # of the finished edit: rect, prune, sphere
    simie: float | None = field(default=None, kw_only=True)  # λ of SimIE for each step of a session; None: without

    def __post_init__(self) -> None:
        if self.transform is not None:
            require_one_of(self.transform, "method.transform", TRANSFORMS)
        require(self.simie is None or self.simie > 0, "method.simie", self.simie, "positive")

    def resolved(self, model_name: str, layers: int) -> Self:
        """These settings with the constants of the model where they say None."""
        return self.filled(self.constants.of(model_name, layers))

    def filled(self, constants: Mapping[str, Any]) -> Self:
        """These settings with `constants` where they say None."""
        return replace(self, **{name: value for name, value in constants.items() if getattr(self, name) is None})

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that `layer` or `layers` names, ascending; () before they are resolved, or without either."""
        one = getattr(self, "layer", None)
        return tuple(sorted(getattr(self, "layers", None) or ())) if one is None else (one,)


@dataclass(frozen=True)
class WeightlessSettings(MethodSettings):
    """Methods whose edits change no weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transform", "simie"):
            found = getattr(self, name)
            require(found is None, f"method.{name}", found, "null: this method changes no weight")


@dataclass(frozen=True)
class ValueSettings(MethodSettings):
    """The optimisation of a value: δ over rows = contexts × prompt (ROME section 3.1)."""

    fact_token: str = "subject_last"  # lookup token: subject_last, subject_first, subject_first_after_last, last
    solver: str | None = None  # adam: the authors'; descent: Polyak's step. None: the model's, adam where lr is set
    steps: int | None = None  # evaluations of the value's loss, at most
    lr: float | None = None  # Adam's learning rate
    weight_decay: float | None = None  # Adam's factor of ‖δ‖/‖v0‖²
    kl_factor: float = 0.0625  # factor of KL(edited ‖ clean) at the subject in "{subject} is a"
    clamp: float | None = None  # ‖δ‖ is held under clamp · ‖v0‖
    anchor: float | None = None  # the norm that every value v0 + δ is brought to (NAS, arXiv 2602.02543); None: its own
    stop_loss: float = 0.05  # stop when the loss falls under this
    contexts: ContextSettings = field(default_factory=ContextSettings)
    engine: str = "replay"  # replay: only the work that δ changes; full: every row, token and block, as the reference

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.engine, "method.engine", ENGINES)
        if self.solver is not None:
            require_one_of(self.solver, "method.solver", SOLVERS)
        require_one_of(self.fact_token, "method.fact_token", LOOKUP_TOKENS)
        require(self.steps is None or self.steps > 0, "method.steps", self.steps, "positive")
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")
        require(self.clamp is None or self.clamp > 0, "method.clamp", self.clamp, "positive")
        require(self.anchor is None or self.anchor > 0, "method.anchor", self.anchor, "positive")
        require(self.kl_factor >= 0, "method.kl_factor", self.kl_factor, "0 or more")
        require(
            self.weight_decay is None or self.weight_decay >= 0, "method.weight_decay", self.weight_decay, "0 or more"
        )
        given = [name for name in ADAMS if getattr(self, name) is not None]
        if self.solver == "descent" and given:
            raise ConfigError(
                f"method.{given[0]} belongs to Adam, and method.solver=descent has no use for it. Leave it out, or use "
                "method.solver=adam."
            )

    @property
    def takes_identity(self) -> bool:
        """Whether C = I may stand in for the second moment."""
        return True

    def resolved(self, model_name: str, layers: int) -> Self:
        """These settings with the constants of the model where they say None.

        A learning rate or a weight decay that is set asks for Adam; descent has neither.
        """
        found = self.constants.of(model_name, layers)
        set_for_adam = any(getattr(self, name) is not None for name in ADAMS)
        solver = self.solver or ("adam" if set_for_adam else found.get("solver", "adam"))
        kept = {k: v for k, v in found.items() if solver == "adam" or k not in ADAMS} | {"solver": solver}
        return self.filled(kept)


@dataclass(frozen=True)
class SpreadSettings(ValueSettings):
    """Methods that write values into a range of blocks by one linear solve each."""

    at_subject: ClassVar[bool] = True  # whether the lookup token must be one of the subject's, or the one behind it

    layers: list[int] | None = None  # blocks whose down-projections are edited, in any order
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(MEMIT_STARTS, (10,), (1,)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_subject and self.fact_token == "last":  # the reference refuses it likewise
            raise ConfigError(
                "method.fact_token=last reads a key that is not the subject's; use one of the subject_ tokens."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted(set(self.layers)))
            require(len(self.layers or ()) > 0, "method.layers", self.layers, "one block or more")


@dataclass(frozen=True)
class AttributionSettings(MethodSettings):
    """Attribution of an answer to the inner units of MLPs by integrated gradients (Dai et al. 2022, section 3)."""

    layers: list[int] | None = None  # blocks whose units are looked at; None: the model's constant, else all
    steps: int = 20  # m, points of the integral
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(counts=(5, 5)))
    engine: str = "replay"  # replay: only the last token, from each block on; full: whole prompts through all blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.engine, "method.engine", ENGINES)
        require(self.steps > 0, "method.steps", self.steps, "positive")
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted(set(self.layers)))
            require(len(self.layers or ()) > 0, "method.layers", self.layers, "one block or more, or null")


@dataclass(frozen=True)
class OnePassSettings(MethodSettings):
    """An update from inputs and gradients of tokens, of one backward pass over all facts."""

    whitens: ClassVar[bool] = False  # gradients are whitened, by the covariance of all tokens

    layers: tuple[int, ...] | None = None  # blocks whose down-projections are edited
    modules: tuple[str, ...] | None = None  # instead: names or patterns of modules, as model.layers.1[1-5].mlp.up_proj
    warm_up: int | None = None  # tokens of running text that statistics begin with; None: the model's, else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "modules"):
            found = getattr(self, name)
            if found is not None:
                object.__setattr__(self, name, tuple(found))
                require(len(found) > 0, f"method.{name}", found, "one or more, or null")
        require(self.warm_up is None or self.warm_up >= 0, "method.warm_up", self.warm_up, "0 or more")


@dataclass(frozen=True)
class TuningSettings(MethodSettings):
    """Passes of gradient descent over the facts themselves."""

    steps: int = 25  # passes over the facts
    batch: int = 64  # facts a step
    stop_loss: float = 1e-2  # mean NLL per target token; a batch under it takes no step, a pass under it is the last

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps > 0, "method.steps", self.steps, "positive")
        require(self.batch > 0, "method.batch", self.batch, "positive")


@dataclass(frozen=True)
class CurvatureSettings(TuningSettings):
    """Descent that keeps out of the directions in which the loss of running text is curved."""

    tokens: int = 40_000  # of running text
    energy: float = 0.99  # of the curvature, that is kept out of

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.tokens > 0, "method.tokens", self.tokens, "positive")
        require(0 < self.energy < 1, "method.energy", self.energy, "between 0 and 1")
