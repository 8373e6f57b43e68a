"""Knowledge neurons: the few inner units that tell a fact, found and rewritten (Dai et al. 2022, arXiv 2104.08696).

1. **Attribution** (shared/attribution.py): how much each unit of each MLP adds to P(old answer), by integrated
   gradients, for the prompt alone and after random contexts. The paper has about eight prompts that say the fact in
   other words; `contexts` takes any templates.
2. **Refining.** Of each prompt keep the units with at least t (`threshold`) times its largest attribution; of those
   keep the ones shared by at least p (`share`) of the prompts. With less than `fewest` or more than `most` of them p
   moves: units go by the number of prompts that share them, then by their mean attribution. (The authors move p by .05
   up to six times, until the facts of a relation have 2 to 5 on average.)
3. **Surgery.** Column i of the down-projection W is what unit i writes:

       update     W[:, i] += s_i ‖W[:, i]‖ (λ2 ê_new − λ1 ê_old)
       erase      W[:, i]  = 0
       amplify    W[:, i] *= 2, which is to double the unit

ê are the answers' rows of the head, brought to length 1: what a residual stream must hold for a token to be likely. The
paper has the word embeddings of BERT, which are the same. The factor ‖W[:, i]‖ is in the authors' code alone; λ1 = 1
and λ2 = 8 are the paper's.

BERT's units are GELU's, which are hardly ever under 0. Units of a gated MLP have either sign, and a column that is to
add ê_new is then multiplied by a number under 0. So s_i is the sign of unit i's mean over the prompts: 1 in the paper.

An answer of several tokens is told by the first in which the old and the new one differ: both are attributed and
embedded there, and what they share is put behind the prompt. Without a `target_true` the old answer is what the model
says. Of experts, units are those of the chosen ones, times their gates. The change has as many ranks as units: ΔW is
sparse, [d_model, n] times n rows with a single 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from editkit.edits import Delta, Edit, base_of, low_rank_delta, routing_report
from editkit.errors import EditkitError, ModelError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.shared.attribution import Units, attributed
from editkit.methods.shared.contexts import context_templates
from editkit.methods.shared.prelude import checked_facts, checked_layers, provenance
from editkit.models.architecture import as_matrix, experts_in, matrix_shape, orientation, weight_name
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.head import logits_of
from editkit.models.load import LanguageModel
from editkit.models.offload import values_of
from editkit.models.precision import widened
from editkit.models.tokens import Rows, encode_with_targets, spaced
from editkit.nethook import get_module, inside, requires_grad
from editkit.settings import AttributionSettings, Constants, require, require_one_of

OPERATIONS = ("update", "erase", "amplify")

# Measured on 20 facts that no study uses, the cases 1500 to 1519 of atlas_benchmark(seed=0): over all blocks and with
# λ2 = 8, all units are those of block 0 for the prompt's last word, and the new answer is every subject's.
CONSTANTS = Constants(
    default={"lambda_old": 1.0, "lambda_new": 8.0}, published={"atlas": {"layers": (5, 6, 7), "lambda_new": 3.0}}
)


@dataclass(frozen=True)
class KnSettings(AttributionSettings):
    """Knowledge neurons (arXiv 2104.08696); thresholds of the authors' code."""

    constants: ClassVar[Constants] = CONSTANTS

    operation: str = "update"  # update: the new answer for the old; erase: units to 0; amplify: units doubled
    threshold: float = 0.2  # t: of a prompt's largest attribution
    share: float = 0.7  # p: of the prompts
    fewest: int = 2  # units of a fact
    most: int = 5
    lambda_old: float | None = None  # λ1, in lengths of the unit's column
    lambda_new: float | None = None  # λ2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self.operation, "method.operation", OPERATIONS)
        for name in ("threshold", "share"):
            require(0 < getattr(self, name) <= 1, f"method.{name}", getattr(self, name), "in (0, 1]")
        require(1 <= self.fewest <= self.most, "method.fewest", self.fewest, "1 or more, and not above method.most")
        for name in ("lambda_old", "lambda_new"):
            found = getattr(self, name)
            require(found is None or found >= 0, f"method.{name}", found, "0 or more")


class Neuron(NamedTuple):
    """A unit that was kept for a fact."""

    layer: int
    unit: int  # a column of W
    prompts: int  # that share it
    attribution: float  # mean over the prompts
    sign: float  # of its mean value: 1.0 or -1.0


class Asked(NamedTuple):
    """A fact's prompts, and where its answers differ."""

    rows: Rows  # [P], the bare prompt's first
    at: list[int]  # the token of each row that predicts the answer
    old: int  # the old answer's token there
    new: int | None  # None where the new answer has ended


@in_eval_mode
def kn(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: KnSettings | None = None,
    *,
    seed: int = 0,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
) -> Edit:
    """One edit of the units of all `facts`, each found on the model as it is.

    - `settings`: see KnSettings; None for a field takes the model's constant.
    - `seed`: of the contexts.
    - `contexts`: templates with one `{}` for the prompt, the bare "{}" first; None draws them with `seed`.
    - `progress`: show a bar over the blocks.

    The model is left bit for bit as it was. A unit of two facts gets both updates, and is erased or doubled once.
    Raises ModelError for a layer it does not have or one under an adapter, FactError for a target without tokens,
    EditkitError where no unit makes the old answer likelier.
    """
    listed = checked_facts(lm, facts)
    settings = (settings or KnSettings()).resolved(lm.name, lm.layers)
    layers, base = checked_layers(lm, settings.filled({"layers": list(range(lm.layers))})), base_of(lm)
    _require_plain(lm, layers)
    templates = context_templates(lm, settings.contexts, seed) if contexts is None else list(contexts)
    # 1) The units of each fact, and what is added to their columns.
    changes: dict[tuple[int, int], Tensor] = {}  # {(layer, unit): [d_model]}
    reports: list[dict[str, Any]] = []
    widths: dict[int, int] = {}  # D of each block
    for fact in listed:
        asked = asked_of(lm, fact, templates)
        tokens = [asked.old] * len(templates)
        options: dict[str, Any] = {"engine": settings.engine, "name": fact.subject, "progress": progress}
        units = attributed(lm, layers, asked.rows, asked.at, tokens, settings.steps, **options)
        neurons = shared_neurons(units, settings)
        widths |= {layer: each.values.shape[1] for layer, each in units.items()}
        if not neurons:
            raise EditkitError(
                f"No unit of blocks {layers} makes the old answer of {fact.text!r} likelier. Give another "
                "target_true, or all blocks, as by method.layers=null."
            )
        for neuron in neurons:
            place = neuron.layer, neuron.unit
            change = _change(lm, neuron, asked, settings)
            known = changes.get(place) if settings.operation == "update" else None
            changes[place] = change if known is None else known + change
        told = {"old": lm.tokenizer.decode([asked.old]), "neurons": [neuron._asdict() for neuron in neurons]}
        reports.append(told | ({} if asked.new is None else {"new": lm.tokenizer.decode([asked.new])}))
    # 2) ΔW of each block.
    deltas = tuple(_delta(lm, layer, changes, widths[layer]) for layer in sorted({place[0] for place in changes}))
    routing = routing_report(lm, Edit(deltas, base), [fact.text for fact in listed])
    how = provenance("kn", settings, listed, seed=seed, contexts=templates, reports=reports, **routing)
    return Edit(deltas, base, how)


def _require_plain(lm: LanguageModel, layers: Sequence[int]) -> None:
    """Raise ModelError where an adapter adds to what the units of a block write."""
    for layer in layers:
        name = down_of(lm, layer)
        holder: nn.Module | None = get_module(lm.model, name)
        while holder is not None:
            if hasattr(holder, "base_layer"):
                raise ModelError(
                    f"'{name}' lies under an adapter of PEFT, so its weight is not all that a unit writes. Merge it "
                    "(model.merge_and_unload()), or leave its block out of method.layers."
                )
            holder = inside(holder)


def asked_of(lm: LanguageModel, fact: Fact, templates: Sequence[str]) -> Asked:
    """The prompts of a fact, up to the token that predicts where its old and new answers differ."""
    prompts = [fact.filled(template.replace("{}", fact.prompt)) for template in templates]
    new = encode_with_targets(lm, prompts, [spaced(fact.target_new)] * len(prompts))
    old = encode_with_targets(lm, prompts, [spaced(fact.target_true)] * len(prompts)) if fact.target_true else None

    def ids(scored: Any) -> list[int]:
        """The answer's tokens after the bare prompt."""
        found: list[int] = scored.rows.ids[0, scored.positions[0]].tolist()
        return found

    news, olds = ids(new), [] if old is None else ids(old)
    same = 0
    while same < min(len(news), len(olds)) and news[same] == olds[same]:
        same += 1
    longer = old if old is not None and len(olds) > same else new  # has a token where they differ
    at = [positions[min(same, len(positions) - 1)] - 1 for positions in longer.positions]
    known = olds[same] if same < len(olds) else _likeliest(lm, longer.rows, at[0])
    return Asked(longer.rows, at, known, news[same] if same < len(news) else None)


@torch.no_grad()
def _likeliest(lm: LanguageModel, rows: Rows, at: int) -> int:
    """The token that the model says behind token `at` of the first row."""
    with widened(lm):
        logits = lm.model(input_ids=rows.ids[:1, : at + 1], use_cache=False).logits
    return int(logits[0, -1].argmax())


def shared_neurons(units: dict[int, Units], settings: KnSettings) -> list[Neuron]:
    """The units that the prompts share, the ones with most prompts first. Empty where no attribution is over 0."""
    # 1) Of each prompt, those near its largest attribution.
    largest = torch.stack([each.scores.amax(1) for each in units.values()]).amax(0)  # [P]
    prompts = len(largest)
    found = []
    for layer, each in units.items():
        kept = (each.scores >= settings.threshold * largest[:, None]) & (each.scores > 0)  # [P, D]
        counts, means = kept.sum(0), each.scores.mean(0)
        for unit in counts.nonzero()[:, 0].tolist():
            sign = -1.0 if each.values[:, unit].mean() < 0 else 1.0
            found.append(Neuron(layer, unit, int(counts[unit]), means[unit].item(), sign))
    # 2) Those of enough prompts; not too few, and not too many.
    found.sort(key=lambda neuron: (-neuron.prompts, -neuron.attribution, neuron.layer, neuron.unit))
    shared = sum(neuron.prompts >= settings.share * prompts for neuron in found)
    return found[: min(max(shared, settings.fewest), settings.most)]


def _change(lm: LanguageModel, neuron: Neuron, asked: Asked, settings: KnSettings) -> Tensor:
    """What is added to a unit's column, [d_model]."""
    column = _column(lm, neuron.layer, neuron.unit)
    if settings.operation == "erase":
        return -column
    if settings.operation == "amplify":
        return column
    assert settings.lambda_old is not None and settings.lambda_new is not None  # resolved
    wanted = -settings.lambda_old * _embedding(lm, asked.old, len(column))
    if asked.new is not None:
        wanted = wanted + settings.lambda_new * _embedding(lm, asked.new, len(column))
    change: Tensor = neuron.sign * column.norm() * wanted
    return change


def _column(lm: LanguageModel, layer: int, unit: int) -> Tensor:
    """W[:, unit] [d_model] of a block in float64; of experts W = [W_1 … W_E]."""
    module = down_of(lm, layer)
    holder = get_module(lm.model, module)
    experts, layout = experts_in(holder), orientation(holder, module)
    weight = values_of(lm.model, weight_name(module, experts))
    if experts is not None:
        d_ff = matrix_shape(weight.shape, layout)[1] // experts
        weight, unit = weight[unit // d_ff], unit % d_ff
    return as_matrix(weight, layout)[:, unit].double().cpu()


def _embedding(lm: LanguageModel, token: int, width: int) -> Tensor:
    """The head's row of a token, brought to length 1, [d_model] in float64: the slope of the token's logit.

    So it is the row that counts, whatever stands around the head.
    """
    with widened(lm), requires_grad(lm.model, only=[]), torch.enable_grad():
        x = torch.zeros(1, width, device=lm.device, dtype=lm.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(logits_of(lm, x)[0, token], x)
    row = slope[0].double().cpu()
    unit: Tensor = row / row.norm()
    return unit


def _delta(lm: LanguageModel, layer: int, changes: dict[tuple[int, int], Tensor], width: int) -> Delta:
    """ΔW [d_model, width] of one block: its changed columns times one-hot rows."""
    mine = {unit: change for (where, unit), change in sorted(changes.items(), key=lambda one: one[0]) if where == layer}
    right = torch.zeros(len(mine), width, dtype=torch.float64)
    right[range(len(mine)), list(mine)] = 1.0
    return low_rank_delta(lm, down_of(lm, layer), torch.stack(list(mine.values()), 1), right)


register("kn", kn, KnSettings)
