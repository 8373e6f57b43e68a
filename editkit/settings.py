"""Settings as plain dataclasses: the schema of conf/. No torch here, so a configuration error answers at once.

Defaults follow the authors' public code where paper and code differ (the published numbers were made with
the code). None in a method's settings means: the constant of this method and model (constants.py).
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from editkit.constants import constants_of
from editkit.errors import ConfigError

LOOKUP_TOKENS = ("subject_last", "subject_first", "subject_first_after_last", "last")
TRANSFORMS = ("rect", "prune")
ENGINES = ("replay", "full")
MATMUL = ("highest", "high", "medium")  # torch.set_float32_matmul_precision
TRACE_KINDS = ("state", "mlp", "attention", "severed_mlp", "severed_attention")
CORRUPTIONS = ("noise", "swap")
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

    token: str = "subject_last"  # lookup token: subject_last, subject_first, subject_first_after_last, last
    steps: int | None = None  # optimisation steps of the value
    lr: float | None = None  # Adam's learning rate
    weight_decay: float | None = None  # factor of ‖δ‖/‖v0‖²
    kl_factor: float = 0.0625  # factor of KL(before ‖ after) at the subject in "{subject} is a"
    clamp: float | None = None  # ‖δ‖ is held under clamp · ‖v0‖
    stop_loss: float = 0.05  # stop when the loss falls under this
    contexts: ContextSettings = field(default_factory=ContextSettings)
    engine: str = "replay"  # replay: only the work that δ changes; full: every row, token and block, as the reference
    cache: bool = False  # keep values on disk, and read them where all that they depend on is the same

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.engine, "method.engine", ENGINES)
        require_one_of(self.token, "method.token", LOOKUP_TOKENS)
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
        if self.token == "last":  # the reference refuses it likewise
            raise ConfigError(
                "method.token=last reads a key that is not the subject's; use one of the subject_ tokens."
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", sorted(set(self.layers)))
            require(len(self.layers or ()) > 0, "method.layers", self.layers, "one block or more")


@dataclass(frozen=True)
class MemitSettings(SpreadSettings):
    """MEMIT (arXiv 2210.07229)."""

    constants: ClassVar[str] = "memit"

    moment_weight: float | None = None  # λ: how many keys of running text C counts as

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.moment_weight is None or self.moment_weight > 0, "method.moment_weight", self.moment_weight, "positive"
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
    said_weight: float = 0.1  # of the NLL once the target is the likeliest

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.stop_kl >= 0, "method.stop_kl", self.stop_kl, "0 or more")
        require(0 <= self.said_weight <= 1, "method.said_weight", self.said_weight, "from 0 to 1")


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


@dataclass(frozen=True)
class TraceSettings:
    """Causal tracing (arXiv 2202.05262, section 2 and code `causal_trace.py`)."""

    corruption: str = "noise"  # of the subject's embeddings: noise on them, or swap: another subject's in their place
    noise: float = 3.0  # in standard deviations of embeddings
    # One standard deviation; None: of the embeddings of the vocabulary (a trace) or of the subjects (an average).
    sigma: float | None = None
    samples: int = 10  # of noise, or other subjects at most; probabilities are means over them
    window: int | None = None  # blocks whose MLP or attention is put back together; None: the paper's 10 of 48, scaled
    kinds: tuple[str, ...] = TRACE_KINDS[:3]  # what is put back: state, mlp, attention, severed_mlp, severed_attention
    engine: str = "replay"  # replay: only what a place can reach; full: the whole model for every place

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(self.kinds)))
        require_one_of(self.corruption, "trace.corruption", CORRUPTIONS)
        require(self.noise > 0, "trace.noise", self.noise, "positive")
        require(self.sigma is None or self.sigma > 0, "trace.sigma", self.sigma, "positive")
        require(self.samples > 0, "trace.samples", self.samples, "positive")
        require(self.window is None or self.window > 0, "trace.window", self.window, "positive")
        require(len(self.kinds) > 0, "trace.kinds", self.kinds, "one or more of " + ", ".join(TRACE_KINDS))
        for kind in self.kinds:
            require_one_of(kind, "trace.kinds", TRACE_KINDS)
        require_one_of(self.engine, "trace.engine", ENGINES)

    def window_of(self, layers: int) -> int:
        """The blocks put back together in a model of `layers` blocks."""
        return self.window or max(1, round(10 * layers / 48))


@dataclass(frozen=True)
class TraceTaskSettings:
    """task=trace: where a fact is recalled, or where the cases of data=… are on average."""

    name: str = "trace"
    average: bool = False  # over the cases of data=…, in place of edit=…; naming a data set on the command line sets it
    layers: int = 1  # consecutive blocks that an average proposes to edit
    trace: TraceSettings = field(default_factory=TraceSettings)

    def __post_init__(self) -> None:
        require(self.layers > 0, "task.layers", self.layers, "positive")


@dataclass(frozen=True)
class EditTaskSettings:
    """task=edit: one fact, looked at before and after."""

    name: str = "edit"
    continuation: int = 20  # tokens of the continuation shown before and after
    top: int = 5  # most likely next tokens shown
    audit: bool = False  # ask every fact of the atlas before and after; for models that know it


@dataclass(frozen=True)
class MeasureSettings:
    """What is asked of the model for each case, before and after; see `editkit.metrics.measure`."""

    generate: int = 2  # tokens of free greedy continuations beyond the longest answer of the case; 0: none at all
    fluency: int = 100  # tokens of the text sampled from each generation prompt, prompt included, top-k 5; 0: none
    distracted: bool = True  # ask neighborhood prompts again with the new fact in front (CounterFact+)

    def __post_init__(self) -> None:
        require(self.generate >= 0, "measure.generate", self.generate, "0 or more")
        require(self.fluency >= 0, "measure.fluency", self.fluency, "0 or more")


@dataclass(frozen=True)
class BenchmarkSettings:
    """task=benchmark: each case edited alone, or `size` of them together, measured and restored."""

    name: str = "benchmark"
    size: int | None = 1  # cases in one edit; null: all
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    keep_edits: bool = False  # write each edit into RUN/edits; those of several cases are always kept
    audit: bool = False  # ask every fact of the atlas after each edit; for models that know it

    def __post_init__(self) -> None:
        require(self.size is None or self.size > 0, "task.size", self.size, "positive")


@dataclass(frozen=True)
class BatchSettings(BenchmarkSettings):
    """task=batch: all cases in one edit."""

    name: str = "batch"
    size: int | None = None


@dataclass(frozen=True)
class LifelongSettings:
    """task=lifelong: cases edited one after the other on one model, measured on the way."""

    name: str = "lifelong"
    step: int = 1  # cases in one edit
    every: int = 50  # cases between two measurements; the end is measured too
    retention: int = 100  # cases edited so far that are asked again, spread over all of them
    untouched: int = 50  # cases after those edited, never edited, that are asked too
    collapse: float = 10.0  # perplexity, in multiples of the unedited model's, that counts as collapse
    stop_at_collapse: bool = False  # end the run there
    text: str = "prose"  # running text for KL and perplexity: the bundled prose, or as moments.source
    measure: MeasureSettings = field(default_factory=lambda: MeasureSettings(fluency=0))

    def __post_init__(self) -> None:
        require(self.step > 0, "task.step", self.step, "positive")
        require(self.every > 0 and self.every % self.step == 0, "task.every", self.every, "a multiple of task.step")
        require(self.retention > 0, "task.retention", self.retention, "positive")
        require(self.untouched >= 0, "task.untouched", self.untouched, "0 or more")
        require(self.collapse > 1, "task.collapse", self.collapse, "larger than 1")


@dataclass(frozen=True)
class ModelSettings:
    """Which model; see `editkit.load`."""

    name: str = "atlas"  # bundled name, local folder, or Hub name
    dtype: str = "float32"  # float32, float16, bfloat16, or auto for the checkpoint's own
    revision: str | None = None  # commit, tag or branch on the Hub
    trust_remote_code: bool = False  # run code from the model's repository
    allow_pickle: bool = False  # read pickled weights


@dataclass(frozen=True)
class PortabilitySettings:
    """A prompt whose answer follows from the new fact, by one hop more."""

    prompt: str = ""  # with {} for the subject
    target_new: str = ""  # what follows
    target_true: str = ""  # what was true


@dataclass(frozen=True)
class EditSettings:
    """The fact to write and the prompts that measure it. `{}` stands for the subject."""

    prompt: str = ""
    subject: str = ""
    target_new: str = ""
    target_true: str = ""  # may stay empty: then only the new target is compared
    paraphrases: list[str] = field(default_factory=list)
    neighborhood: list[str] = field(default_factory=list)  # other subjects with the same true object
    portability: list[PortabilitySettings] = field(default_factory=list)  # what follows from the new fact


@dataclass(frozen=True)
class DataSettings:
    """Which cases a benchmark edits; see `editkit.data`."""

    name: str = "atlas"  # the format: atlas, counterfact, counterfact_flat, zsre, knowedit, mquake, known
    path: str | None = None  # a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]; null: the bundled atlas
    revision: str | None = None  # commit or tag of a Hub data set
    limit: int | None = None  # how many cases, from the first; null: all
    shard: str = "0/1"  # i/n: every n-th case from the i-th, after the limit
    bad: str = "skip"  # a record that cannot be used: skip (named and counted) or fail

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "data.limit", self.limit, "positive")
        require_one_of(self.bad, "data.bad", ("skip", "fail"))
        number, _, count = self.shard.partition("/")
        valid = number.isdecimal() and count.isdecimal() and int(number) < int(count)
        require(valid, "data.shard", repr(self.shard), "i/n with 0 ≤ i < n")


@dataclass(frozen=True)
class Config:
    """One run of `editkit.run`."""

    task: Any  # the settings dataclass of the named task
    model: ModelSettings
    edit: EditSettings
    data: DataSettings
    method_name: str
    method: Any  # the settings dataclass of the named method
    moments: MomentSettings
    seed: int = 0  # of contexts and running text; two runs with one seed give byte-identical edits
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda, cuda:N
    matmul: str = "highest"  # float32 products on CUDA: highest, high (TF32) or medium (bfloat16); process-wide
    resume: bool = False  # go on with the run that hydra.run.dir holds

    def __post_init__(self) -> None:
        require_one_of(self.matmul, "matmul", MATMUL)


def require(condition: bool, name: str, found: object, wanted: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} must be {wanted}; found {found}.")


def require_one_of(found: str, name: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless `found` is one of `known`."""
    require(found in known, name, repr(found), "one of " + ", ".join(known))
