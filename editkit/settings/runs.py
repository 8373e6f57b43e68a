"""The settings of a run: its task, model, data and fact."""

from dataclasses import dataclass, field
from typing import Any

from editkit.settings.checks import require, require_one_of
from editkit.settings.methods import ENGINES, MomentSettings

MATMUL = ("highest", "high", "medium")  # torch.set_float32_matmul_precision
TRACE_KINDS = ("state", "mlp", "attention", "severed_mlp", "severed_attention")
CORRUPTIONS = ("noise", "swap")
FORMS = ("bare", "qa", "chat")
# Null controls of a benchmark, and how tables and pages call them; see editkit/methods/shared/controls.py.
RANDOM, IDENTITY, WRONG_BLOCK, PROMPT_ONLY = "random", "identity", "wrong_block", "prompt_only"
CONTROLS = {RANDOM: "random δ", IDENTITY: "C = I", WRONG_BLOCK: "wrong block", PROMPT_ONLY: "prompt only"}
QUICK, PAPERS = "quick", "papers"  # presets of general ability; see editkit/metrics/ability.py
CONTINUE, STOP, ROLLBACK = ON_COLLAPSE = ("continue", "stop", "rollback")


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
class MeasureSettings:
    """What is asked of the model for each case, before and after; see `editkit.metrics.measure`."""

    generate: int = (
        2  # tokens of free greedy continuations beyond the longest answer of the case; 0: nothing is said freely
    )
    natural: int = 32  # tokens, at most, of free answers that go on to their natural stop; 0: not asked
    form: str = (
        "bare"  # of the prompts of those answers: bare; qa: "Question: … Answer:"; chat: the tokenizer's template
    )
    fluency: int = 100  # tokens of the text sampled from each generation prompt, prompt included, top-k 5; 0: none
    distracted: bool = True  # ask neighborhood prompts again with the new fact in front (CounterFact+)
    # Probes by template, asked too: alias, distracting_context, fact_check, negation, repeat_old, reversed,
    # second_language; see `editkit.data.templates`.
    probes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.generate >= 0, "measure.generate", self.generate, "0 or more")
        require(self.natural >= 0, "measure.natural", self.natural, "0 or more")
        require_one_of(self.form, "measure.form", FORMS)
        object.__setattr__(self, "probes", tuple(dict.fromkeys(self.probes)))
        require(self.fluency >= 0, "measure.fluency", self.fluency, "0 or more")


def require_answers(judge: str | None, measure: MeasureSettings) -> None:
    """Raise ConfigError for a judge without free answers to judge."""
    asked = measure.generate > 0 and measure.natural > 0
    require(judge is None or asked, "task.judge", judge, "null where measure.generate or measure.natural is 0")


@dataclass(frozen=True)
class EditTaskSettings:
    """task=edit: one fact, measured before and after, as a benchmark of one case."""

    name: str = "edit"
    continuation: int = 20  # tokens of the continuation shown before and after
    top: int = 5  # most likely next tokens shown
    audit: bool = False  # ask every fact of the atlas before and after; for models that know it
    judge: str | None = None  # of free answers: exact, model:NAME_OR_FOLDER, http:URL@MODEL; see `editkit.judges`
    # General ability before and after, by lm-evaluation-harness: quick, papers, or its tasks joined by "+"; null: not.
    ability: str | None = None
    ability_limit: int | None = None  # examples of each of its tasks; null: the preset's
    measure: MeasureSettings = field(default_factory=lambda: MeasureSettings(fluency=0))

    def __post_init__(self) -> None:
        require_answers(self.judge, self.measure)
        _check_ability(self.ability, self.ability_limit)


@dataclass(frozen=True)
class BenchmarkSettings:
    """task=benchmark: each case edited alone, or `size` of them together, measured and restored."""

    name: str = "benchmark"
    size: int | None = 1  # cases in one edit; null: all
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    keep_edits: bool = False  # write each edit into RUN/edits; those of several cases are always kept
    audit: bool = False  # ask every fact of the atlas after each edit; for models that know it
    judge: str | None = None  # of free answers: exact, model:NAME_OR_FOLDER, http:URL@MODEL; see `editkit.judges`
    controls: bool = False  # null controls on the same cases: random δ, C = I, a wrong block, prompt only
    # General ability before and after, by lm-evaluation-harness, where all cases are in one edit (task=batch): quick,
    # papers, or its tasks joined by "+"; null: not.
    ability: str | None = None
    ability_limit: int | None = None  # examples of each of its tasks; null: the preset's

    def __post_init__(self) -> None:
        require_answers(self.judge, self.measure)
        require(self.size is None or self.size > 0, "task.size", self.size, "positive")
        _check_ability(self.ability, self.ability_limit)
        together = self.ability is None or self.size is None
        require(together, "task.ability", self.ability, "null where each case has its own edit; task=batch has one")


@dataclass(frozen=True)
class BatchSettings(BenchmarkSettings):
    """task=batch: all cases in one edit."""

    name: str = "batch"
    size: int | None = None


@dataclass(frozen=True)
class AlarmSettings:
    """When a session is said to break its model; see `editkit.alarm`. A limit that is null is not watched."""

    every: int = 50  # steps between two looks
    growth: float | None = 5.0  # ‖ΔW‖/‖W‖ of all edits together
    per_fact: float | None = 20.0  # ‖ΔW‖/√n of one weight, n the facts edited (BetaEdit, IJCAI 2026)
    perplexity: float | None = 10.0  # in multiples of the unedited model's
    untouched: float | None = 0.5  # the least share of untouched facts that must still be answered rightly
    tokens: int = 1024  # of the text for perplexity
    facts: int = 20  # untouched facts that are asked

    def __post_init__(self) -> None:
        require(self.every > 0, "alarm.every", self.every, "positive")
        for name in ("growth", "per_fact"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"alarm.{name}", limit, "positive")
        require(self.perplexity is None or self.perplexity > 1, "alarm.perplexity", self.perplexity, "larger than 1")
        require(self.untouched is None or 0 < self.untouched <= 1, "alarm.untouched", self.untouched, "in (0, 1]")
        require(self.tokens > 0, "alarm.tokens", self.tokens, "positive")
        require(self.facts >= 0, "alarm.facts", self.facts, "0 or more")


@dataclass(frozen=True)
class LifelongSettings:
    """task=lifelong: cases edited one after the other on one model, measured on the way."""

    name: str = "lifelong"
    step: int = 1  # cases in one edit
    every: int | None = 50  # cases between two measurements; null: none but those of `at`; the end is measured too
    at: tuple[int, ...] = ()  # numbers of edited cases at which it is measured too
    retention: int = 100  # cases edited so far that are asked again, spread over all of them
    untouched: int = 50  # cases after those edited, never edited, that are asked too
    keep: int | None = None  # latest steps that stay edits of their own, the others are folded into one sum; null: all
    save: int = 1  # steps between two saves of the session; the end is saved too
    alarm: AlarmSettings = field(default_factory=AlarmSettings)
    on_collapse: str = CONTINUE  # at a limit of the alarm: continue, stop, or rollback to the last good step and stop
    text: str = "prose"  # running text for KL and perplexity: the bundled prose, me_ppl:FILE, or as moments.source
    judge: str | None = None  # of free answers: exact, model:NAME_OR_FOLDER, http:URL@MODEL; see `editkit.judges`
    # General ability before the first edit and after the last, by lm-evaluation-harness: quick, papers, or its tasks
    # joined by "+"; null: not.
    ability: str | None = None
    ability_limit: int | None = None  # examples of each of its tasks; null: the preset's
    measure: MeasureSettings = field(default_factory=lambda: MeasureSettings(fluency=0))

    def __post_init__(self) -> None:
        require(self.step > 0, "task.step", self.step, "positive")
        object.__setattr__(self, "at", tuple(sorted(set(self.at))))
        for name, edits in (("every", self.every), *(("at", edits) for edits in self.at)):
            good = edits is None or (edits > 0 and edits % self.step == 0)
            require(good, f"task.{name}", edits, "a multiple of task.step")
        require(self.retention > 0, "task.retention", self.retention, "positive")
        require(self.untouched >= 0, "task.untouched", self.untouched, "0 or more")
        require(self.keep is None or self.keep > 0, "task.keep", self.keep, "positive")
        require(self.save > 0, "task.save", self.save, "positive")
        require_one_of(self.on_collapse, "task.on_collapse", ON_COLLAPSE)
        require_answers(self.judge, self.measure)
        _check_ability(self.ability, self.ability_limit)

    def points(self, edits: int) -> set[int]:
        """The numbers of edits after which a run of so many `edits` is measured, the begin and the end among them."""
        regular = range(0, edits, self.every) if self.every is not None else ()
        return {0, *regular, *(place for place in self.at if place < edits), edits}


def _check_ability(ability: str | None, limit: int | None) -> None:
    good = ability is None or all(name.strip() for name in ability.split("+"))
    require(good, "task.ability", repr(ability), f"{QUICK}, {PAPERS}, names of tasks joined by '+', or null")
    require(limit is None or limit > 0, "task.ability_limit", limit, "positive")


@dataclass(frozen=True)
class ModelSettings:
    """Which model; see `editkit.load`."""

    name: str = "atlas"  # bundled name, local folder, or Hub name
    dtype: str = "float32"  # float32, float16, bfloat16, or auto for the checkpoint's own
    revision: str | None = None  # commit, tag or branch on the Hub
    trust_remote_code: bool = False  # run code from the model's repository
    allow_pickle: bool = False  # read pickled weights
    # Over several devices, the CPU's memory and files: auto, balanced, balanced_low_0, sequential, or {module: device};
    # None: all of it on `device`. The other two go with it.
    device_map: Any = None
    max_memory: Any = None  # what a plan may take of each device: {0: 20GiB, cpu: 60GiB}
    offload_folder: str | None = None  # for what goes to disk
    # Quantise it at load: bnb-8bit, bnb-nf4, bnb-fp4, torchao-int8, torchao-int4. None: as the checkpoint is.
    quantization: str | None = None
    edited: str = "adapter"  # how a quantised weight is edited: adapter, ΔW beside it; wide, dequantised meanwhile


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

    name: str = "atlas"  # the format: a file of editkit/data/formats/, or registered from outside
    path: str | None = None  # a file, a folder, or hub:NAME[:CONFIG[:SPLIT]]; null: the bundled atlas
    revision: str | None = None  # commit or tag of a Hub data set
    limit: int | None = None  # how many cases, from the first; null: all
    # This many cases of the same facts, edited again and again with other objects (data=atlas, task=lifelong);
    # null: each fact once.
    stream: int | None = None
    shard: str = "0/1"  # i/n: every n-th case from the i-th, after the limit
    on_bad_record: str = "skip"  # a record that cannot be used: skip (named and counted) or fail

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "data.limit", self.limit, "positive")
        require(self.stream is None or self.stream > 0, "data.stream", self.stream, "positive")
        require_one_of(self.on_bad_record, "data.on_bad_record", ("skip", "fail"))
        number, _, count = self.shard.partition("/")
        valid = number.isdecimal() and count.isdecimal() and int(number) < int(count)
        require(valid, "data.shard", repr(self.shard), "i/n with 0 ≤ i < n")


@dataclass(frozen=True)
class Reproduction:
    """The published table that a run is made after (conf/reproduce/)."""

    name: str
    differs: tuple[str, ...] = ()  # settings that the run has otherwise, as "data.limit: 20, there 7500"


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
    plan: bool = False  # show what the run would take, and do not start it
    reproduces: Reproduction | None = None

    def __post_init__(self) -> None:
        require_one_of(self.matmul, "matmul", MATMUL)
