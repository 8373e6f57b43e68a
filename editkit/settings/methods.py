"""The settings of the methods, and of what they share: contexts, second moments, the optimisation of a value."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from editkit.errors import ConfigError
from editkit.settings.checks import require, require_one_of
from editkit.settings.constants import constants_of

LOOKUP_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
TRANSFORMS = ("rect", "prune")
ENGINES = ("replay", "full")
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
    """How the second moment C = E[k kᵀ] is collected (ROME section 3.1, code `layer_stats.py`)."""

    source: str = "atlas"  # running text: see `corpora.running_text`; or imported:NAME, from the reference's .npz
    tokens: int = 40_000  # key vectors to collect; 2 to 10 per dimension of d_ff suffice (arXiv 2506.04226)
    block: int = 128  # tokens a packed block
    ridge: float = 1e-4  # added to C's diagonal, as a fraction of its mean; explicit, 0 turns it off
    enabled: bool = True  # False uses the identity in place of C

    def __post_init__(self) -> None:
        require(self.tokens > 0, "moments.tokens", self.tokens, "positive")
        require(self.block > 1, "moments.block", self.block, "2 or more")
        require(self.ridge >= 0, "moments.ridge", self.ridge, "0 or more")


@dataclass(frozen=True)
class MethodSettings:
    """What every method has."""

    constants: ClassVar[str]  # whose entry in constants.py fills what is None

    transform: str | None = field(default=None, kw_only=True)  # of the finished edit: rect, prune

    def __post_init__(self) -> None:
        if self.transform is not None:
            require_one_of(self.transform, "method.transform", TRANSFORMS)

    def resolved(self, model_name: str, layers: int) -> Self:
        """These settings with the constants of the model where they say None."""
        found = constants_of(self.constants, model_name, layers)
        return replace(self, **{k: v for k, v in found.items() if getattr(self, k) is None})


@dataclass(frozen=True)
class ValueSettings(MethodSettings):
    """The optimisation of a value: δ by Adam over rows = contexts × prompt (ROME section 3.1)."""

    fact_token: str = "subject_last"  # lookup token: subject_last, subject_first, subject_first_after_last, last
    steps: int | None = None  # optimisation steps of the value
    lr: float | None = None  # Adam's learning rate
    weight_decay: float | None = None  # factor of ‖δ‖/‖v0‖²
    kl_factor: float = 0.0625  # factor of KL(edited ‖ clean) at the subject in "{subject} is a"
    clamp: float | None = None  # ‖δ‖ is held under clamp · ‖v0‖
    stop_loss: float = 0.05  # stop when the loss falls under this
    contexts: ContextSettings = field(default_factory=ContextSettings)
    engine: str = "replay"  # replay: only the work that δ changes; full: every row, token and block, as the reference
    cache: bool = False  # keep values on disk, and read them where all that they depend on is the same

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.engine, "method.engine", ENGINES)
        require_one_of(self.fact_token, "method.fact_token", LOOKUP_TOKENS)
        require(self.steps is None or self.steps > 0, "method.steps", self.steps, "positive")
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")
        require(self.clamp is None or self.clamp > 0, "method.clamp", self.clamp, "positive")
        require(self.kl_factor >= 0, "method.kl_factor", self.kl_factor, "0 or more")
        require(
            self.weight_decay is None or self.weight_decay >= 0, "method.weight_decay", self.weight_decay, "0 or more"
        )


@dataclass(frozen=True)
class RomeSettings(ValueSettings):
    """ROME (arXiv 2202.05262) and R-ROME (arXiv 2403.07175); constants of the authors' code."""

    constants: ClassVar[str] = "rome"

    keys: str = "mixed"  # mixed: the paper's code (mean key in u, bare key in k·u); mean: one key on both sides
    layer: int | None = None  # block whose down-projection is edited

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.keys, "method.keys", ("mixed", "mean"))


@dataclass(frozen=True)
class RRomeSettings(RomeSettings):
    """ROME with the context-mean key on both sides (arXiv 2403.07175): the recommended default."""

    keys: str = "mean"


@dataclass(frozen=True)
class SpreadSettings(ValueSettings):
    """Methods that write values into a range of blocks by one linear solve each."""

    layers: list[int] | None = None  # blocks whose down-projections are edited, in any order
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(MEMIT_STARTS, (10,), (1,)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fact_token == "last":  # the reference refuses it likewise
            raise ConfigError(
                "method.fact_token=last reads a key that is not the subject's; use one of the subject_ tokens."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted(set(self.layers)))
            require(len(self.layers or ()) > 0, "method.layers", self.layers, "one block or more")


@dataclass(frozen=True)
class MemitSettings(SpreadSettings):
    """MEMIT (arXiv 2210.07229)."""

    constants: ClassVar[str] = "memit"

    mom2_update_weight: float | None = None  # λ: how many keys of running text C counts as

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.mom2_update_weight is None or self.mom2_update_weight > 0,
            "method.mom2_update_weight",
            self.mom2_update_weight,
            "positive",
        )


@dataclass(frozen=True)
class EmmetSettings(MemitSettings):
    """EMMET (arXiv 2403.14236): one block."""

    constants: ClassVar[str] = "emmet"

    epsilon: float = 0.1  # ε added to KᵀC⁻¹K; none for one fact

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon >= 0, "method.epsilon", self.epsilon, "0 or more")


@dataclass(frozen=True)
class PmetSettings(MemitSettings):
    """PMET (arXiv 2308.08742)."""

    constants: ClassVar[str] = "pmet"

    kl_factor: float = 1.0
    stop_kl: float = 0.01  # stop when the target is the likeliest and the KL is under this
    nll_weight: float = 0.1  # of the NLL once the target is the likeliest

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stop_kl >= 0, "method.stop_kl", self.stop_kl, "0 or more")
        require(0 <= self.nll_weight <= 1, "method.nll_weight", self.nll_weight, "from 0 to 1")


@dataclass(frozen=True)
class AlphaEditSettings(SpreadSettings):
    """AlphaEdit (arXiv 2410.02355)."""

    constants: ClassVar[str] = "alphaedit"

    threshold: float = 0.02  # eigenvalues of C under this span the null space (it depends on the scale of the keys)
    fraction: float | None = None  # instead: the share of C's directions, those of least energy, to call the null space
    l2: float | None = None  # factor of I in the solve
    keep_earlier: bool = True  # hold the keys of facts edited before where they are (the paper's K_p)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.threshold > 0, "method.threshold", self.threshold, "positive")
        require(self.fraction is None or 0 < self.fraction <= 1, "method.fraction", self.fraction, "in (0, 1]")
        require(self.l2 is None or self.l2 > 0, "method.l2", self.l2, "positive")


@dataclass(frozen=True)
class FtSettings(MethodSettings):
    """Fine-tuning of one weight (the FT of ROME, arXiv 2202.05262, appendix E, code `ft_main.py`)."""

    constants: ClassVar[str] = "ft"

    layer: int | None = None  # block whose down-projection is trained; None: the block that ROME edits
    steps: int = 25  # passes over the facts
    lr: float | None = None  # Adam's learning rate; there is no weight decay
    batch: int = 64  # facts a step
    stop_loss: float = 1e-2  # mean NLL per target token; a batch under it takes no step, a pass under it is the last

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps > 0, "method.steps", self.steps, "positive")
        require(self.lr is None or self.lr > 0, "method.lr", self.lr, "positive")
        require(self.batch > 0, "method.batch", self.batch, "positive")


@dataclass(frozen=True)
class FtLSettings(FtSettings):
    """FT with every entry of ΔW held within ±epsilon (arXiv 2012.00363, as in ROME's FT+L)."""

    constants: ClassVar[str] = "ft_l"

    epsilon: float | None = None  # None: the constant of this model, in units of the weight

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon is None or self.epsilon > 0, "method.epsilon", self.epsilon, "positive")


@dataclass(frozen=True)
class LoraSettings(MethodSettings):
    """Fine-tuning of a low-rank change ΔW = alpha/rank · B A through peft (Hu et al. 2021, arXiv 2106.09685)."""

    constants: ClassVar[str] = "lora"

    layers: tuple[int, ...] | None = None  # blocks whose down-projection gets an adapter; None: the block ROME edits
    rank: int = 8
    alpha: float = 16.0
    steps: int = 50  # passes over the facts
    lr: float = 5e-3  # Adam's learning rate
    batch: int = 64  # facts a step
    stop_loss: float = 1e-2  # as for FT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
            require(len(self.layers) > 0, "method.layers", self.layers, "one block or more, or null")
        require(self.rank > 0, "method.rank", self.rank, "positive")
        require(self.alpha > 0, "method.alpha", self.alpha, "positive")
        require(self.steps > 0, "method.steps", self.steps, "positive")
        require(self.lr > 0, "method.lr", self.lr, "positive")
        require(self.batch > 0, "method.batch", self.batch, "positive")


@dataclass(frozen=True)
class MendSettings(MethodSettings):
    """MEND (arXiv 2110.11309): everything else is in the file of the trained hypernetwork."""

    constants: ClassVar[str] = "mend"

    hypernetwork: str | None = None  # the file; None: the bundled one of this model
