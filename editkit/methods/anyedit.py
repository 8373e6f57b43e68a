"""AnyEdit: long answers, written window by window (Jiang et al. 2025, arXiv 2502.05628).

A single value has to make the model say the whole answer, and fails where the answer is long. Here the answer is cut
into windows Y_1, Y_2, … of `method.window` tokens, and each has a value of its own, at the place that predicts its
first token: the last token of the prompt, and inside the answer the last token of the window before. With L the last
block of the range and δ_1 … δ_{w−1} in their places,

    δ_w = argmin  −mean log p(Y_w | prompt, Y_1 … Y_{w−1}; δ_w added at block L)  +  weight_decay · ‖δ‖/‖v0‖²

in 25 steps of Adam, under the clamp, until the loss is under .01; without contexts and without a KL term. All windows
of all facts are then written together, over the blocks of the range as in MEMIT (shared/spread.py). K are their keys,
R what is missing at their places, and K_o the keys of all other tokens of the prompts and answers, which are to stay:

    solve=memit        ΔW = R Kᵀ (λ C + K_o K_oᵀ + K Kᵀ)⁻¹
    solve=alphaedit    ΔW = R Kᵀ P (P (K Kᵀ + K_o K_oᵀ) P + l2 · I)⁻¹        P as in alphaedit.py

A short answer has one window. In a session `method.keep_earlier` holds the keys of the values written before, as in
MEMIT-Seq and AlphaEdit.

`method.fact_token` moves the first window's place to the subject, as in MEMIT; the source has the prompt's last token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from editkit.edits import Edit, routing_report
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.alphaedit import constrained, held_in, in_basis, null_space
from editkit.methods.memit import CONSTANTS as MEMIT
from editkit.methods.memit import MemitSettings, weighed
from editkit.methods.shared.anchor import Anchored, anchored
from editkit.methods.shared.carried import Carried
from editkit.methods.shared.held import held_by, least_squares
from editkit.methods.shared.passages import Passages
from editkit.methods.shared.prelude import Given, Moments, prepare
from editkit.methods.shared.spread import Solve, Spread, spread, value_reports
from editkit.methods.shared.value import compute_deltas
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.settings import EASYEDIT, Constants, ContextSettings, require, require_one_of

# The authors' steps, rate, decay and clamp are those that EasyEdit has for other methods. The atlas model's were
# measured on facts that no study uses, cases 1500 to 1511 of atlas_benchmark(seed=0) with answers of 16 to 24 tokens: a
# value of it says two tokens. The last tokens of its prompts are much alike for all subjects, so neighbors stay with
# fact_token=subject_last alone.
CONSTANTS = Constants(
    default={**EASYEDIT, "mom2_update_weight": 15_000.0, "l2": 10.0, "window": 40},
    published={
        "atlas": {
            "layers": (3, 4),
            "steps": 60,
            "clamp": 8.0,
            "mom2_update_weight": 10.0,
            "l2": 1.0,
            "fraction": 0.75,
            "window": 2,
        },
        "Llama-3-8B": {"layers": (4, 5, 6, 7, 8)},
        "Qwen2.5-7B": {"layers": (4, 5, 6, 7, 8), "window": 50},
    },
    blocks="range",
    like=MEMIT,
)
SOLVES = ("memit", "alphaedit")


@dataclass(frozen=True)
class AnyEditSettings(MemitSettings):
    """AnyEdit (arXiv 2502.05628)."""

    constants: ClassVar[Constants] = CONSTANTS
    at_subject: ClassVar[bool] = False

    window: int | None = None  # tokens of the answer that one value says
    solve: str = "memit"  # memit or alphaedit: the form in which all values are written
    threshold: float = 0.02  # solve=alphaedit: eigenvalues of C under this span the null space
    fraction: float | None = None  # instead: the share of C's directions, those of least energy, to call the null space
    l2: float | None = None  # solve=alphaedit: factor of I
    keep_earlier: bool = True  # in a session: hold the keys of values written before where they are
    fact_token: str = "last"  # where the first window's value is: last, of the prompt; or one of the subject_ tokens
    kl_factor: float = 0.0
    stop_loss: float = 0.01
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings((), (), ()))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.solve, "method.solve", SOLVES)
        require(self.window is None or self.window > 0, "method.window", self.window, "positive")
        require(self.threshold > 0, "method.threshold", self.threshold, "positive")
        require(self.fraction is None or 0 < self.fraction <= 1, "method.fraction", self.fraction, "in (0, 1]")
        require(self.l2 is None or self.l2 > 0, "method.l2", self.l2, "positive")
        require(self.kl_factor == 0, "method.kl_factor", self.kl_factor, "0, since AnyEdit has no KL term")

    @property
    def takes_identity(self) -> bool:
        return self.solve != "alphaedit"  # whose null space C = I has not


@in_eval_mode
def anyedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: AnyEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once; `target_new` may be long. Arguments and errors as for `rome`.

    - `earlier`: this method's edits that `lm` already holds. With `keep_earlier` their keys are kept where they are.
    - `carried`: what a session has computed from them.

    In the record each fact has the report of its window with the largest loss, and all under "windows".
    """
    given = prepare(
        lm, facts, settings or AnyEditSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    asked, last = given.settings, given.layers[-1]
    assert asked.window is not None  # resolved
    # 1) The solve, first, so that a C which cannot be factored fails at once.
    solver = _by_least_squares if asked.solve == "memit" else _in_null_space
    make = solver(lm, given, earlier, carried)
    # 2) Places, and the values there, one window after the other.
    target_site = lm.architecture.target_site(last)
    passages = Passages(lm, given.facts, given.templates, asked.window, asked.fact_token, given.layers, target_site)
    z, reports = values(lm, given, passages, progress=progress)
    # 3) All of them written.
    deltas, keys, written = spread(lm, given, passages, z, make(passages))
    routing = routing_report(lm, Edit(deltas, given.base), [fact.text for fact in given.facts])
    found = Spread(deltas, keys, written, reports, routing)
    return found.edit(given, "anyedit", found.memory(lm) if asked.keep_earlier else None)


def values(
    lm: LanguageModel, given: Given[AnyEditSettings], passages: Passages, *, progress: bool
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Z [n, d_model], the target of each value, and a report of each fact. The same windows of all facts together."""
    settings, last = given.settings, given.layers[-1]
    place = {value: i for i, value in enumerate(passages.values_of)}
    deltas: list[list[Tensor]] = [[] for _ in given.facts]  # of each window, [d_model]
    windows: list[list[dict[str, Any]]] = [[] for _ in given.facts]
    for window in range(max(passages.windows)):
        which = [fact for fact, count in enumerate(passages.windows) if count > window]
        at = [place[fact, window] for fact in which]
        norms = passages.start[at].norm(dim=-1)  # ‖v0‖
        jobs = [passages.rows(fact, window, deltas[fact]) for fact in which]
        name = f"{len(which)} facts" if len(which) > 1 else given.facts[which[0]].subject
        name = f"{name}, window {window + 1} of {max(passages.windows)}" if max(passages.windows) > 1 else name
        found = compute_deltas(
            lm, last, [site_of(lm, last)], jobs, norms[:, None], settings, name=name, progress=progress
        )
        scaled: Anchored = anchored(
            passages.outputs[at], torch.stack([each.delta[-1] for each in found]), settings.anchor
        )
        for fact, delta, report in zip(which, scaled.delta, value_reports(found, norms, scaled), strict=True):
            deltas[fact].append(delta)
            windows[fact].append(report)
    z = passages.start + torch.cat([torch.stack(each) for each in deltas])
    worst = [max(each, key=lambda report: float(report["steps"][-1]["loss"])) for each in windows]
    reports = [one | {"windows": each} if len(each) > 1 else one for one, each in zip(worst, windows, strict=True)]
    return z, reports


def _by_least_squares(
    lm: LanguageModel, given: Given[AnyEditSettings], earlier: Sequence[Edit], carried: Carried | None
) -> Callable[[Passages], Solve]:
    """MEMIT's solve, with K_o."""
    held = held_by(lm, given, weighed(given), earlier, carried)
    return lambda passages: lambda layer, keys: least_squares(held(layer).also(passages.others(layer)), keys)


def _in_null_space(
    lm: LanguageModel, given: Given[AnyEditSettings], earlier: Sequence[Edit], carried: Carried | None
) -> Callable[[Passages], Solve]:
    """AlphaEdit's solve, with K_o."""
    asked = given.settings
    states = carried or Carried()
    bases = {layer: null_space(c, layer, asked.threshold, asked.fraction) for layer, c in given.moments.items()}

    def solve(layer: int, keys: Tensor, others: Tensor) -> Tensor:
        basis = bases[layer]
        assert asked.l2 is not None  # resolved
        held = held_in(basis, down_of(lm, layer), asked.l2, earlier if asked.keep_earlier else (), states)
        return constrained(basis, held.also(in_basis(basis, others)), keys)

    return lambda passages: lambda layer, keys: solve(layer, keys, passages.others(layer))


register("anyedit", anyedit, AnyEditSettings)
