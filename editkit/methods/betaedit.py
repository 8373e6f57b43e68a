"""BetaEdit: AlphaEdit that weighs running text in its solve, and whose null space follows the edits (IJCAI 2026).

With P the projector on the null space of running text (alphaedit.py), K [d_ff, n] the keys of these facts, R
[d_model, n] the residuals to write, C = E[k kᵀ], and S = Σ K Kᵀ over the facts edited before:

    (P (K Kᵀ + S + λ₁ C) + λ₂ I) Δᵀ = P K Rᵀ

It is solved in P's range: with B [d_ff, rank] a basis of it, P = B Bᵀ,

    ΔW = R K_Bᵀ (A + K_B K_Bᵀ)⁻¹ Bᵀ,      K_B = BᵀK,  A = Bᵀ(λ₁ C + S) B + λ₂ I

where A⁻¹ is carried from step to step as in shared/held.py. After every 1,000 facts P is taken anew, as the null space
of (S / facts + λ₁ C) / (λ₁ + 1); not for a mixture of experts, whose S over all experts would be far too large.
A step with ‖ΔW‖/√n over 20 at any block is refused: the authors' code ends the run there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from editkit.edits.edit import Edit
from editkit.errors import EditkitError
from editkit.facts import Fact
from editkit.methods import register
from editkit.methods.alphaedit import CONSTANTS as ALPHAEDIT
from editkit.methods.alphaedit import AlphaEditSettings, constrained, in_basis, null_space, rank_of
from editkit.methods.shared.carried import Carried, Form, Tensors
from editkit.methods.shared.held import Diagonal, Earlier, Held
from editkit.methods.shared.prelude import Given, Moments, prepare
from editkit.methods.shared.spread import write_values
from editkit.models.evalmode import in_eval_mode
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.moments import Factored, SecondMoment
from editkit.settings import Constants, require

# λ₁ and λ₂ of the authors' files; the atlas model's are AlphaEdit's, with MEMIT's weight of C.
CONSTANTS = Constants(
    default={**ALPHAEDIT.default, "mom2_update_weight": 3000.0},
    published={
        **{name: {**found, "l2": 10.0} for name, found in ALPHAEDIT.published.items()},
        "atlas": {**ALPHAEDIT.published["atlas"], "mom2_update_weight": 10.0},
        "gpt2-xl": {**ALPHAEDIT.published["gpt2-xl"], "steps": 20, "lr": 0.5},
    },
    blocks=ALPHAEDIT.blocks,
    like=ALPHAEDIT.like,
)


@dataclass(frozen=True)
class BetaEditSettings(AlphaEditSettings):
    """BetaEdit (IJCAI 2026). `l2` is λ₂."""

    constants: ClassVar[Constants] = CONSTANTS

    mom2_update_weight: float | None = None  # λ₁: how many keys of running text C counts as
    rebuild_every: int = 1000  # facts after which P is taken anew
    largest: float = 20.0  # ‖ΔW‖/√n over which a step is refused

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.mom2_update_weight
        require(weight is None or weight > 0, "method.mom2_update_weight", weight, "positive")
        require(self.rebuild_every > 0, "method.rebuild_every", self.rebuild_every, "positive")
        require(self.largest > 0, "method.largest", self.largest, "positive")


@dataclass(frozen=True, eq=False)
class Space:
    """What a session carries for one block."""

    basis: Tensor  # B, as null_space gives it
    held: Held  # A
    sums: Tensor | None  # S [d_ff, d_ff]; None for a mixture of experts
    facts: int = 0  # edited before
    rebuilt: int = 0  # and when P was taken


@in_eval_mode
def betaedit(
    lm: LanguageModel,
    facts: Fact | Sequence[Fact],
    settings: BetaEditSettings | None = None,
    *,
    seed: int = 0,
    moments: Moments = None,
    contexts: Sequence[str] | None = None,
    progress: bool = True,
    earlier: Sequence[Edit] = (),
    carried: Carried | None = None,
) -> Edit:
    """One edit for all of `facts` at once. Arguments and errors as for `memit`.

    Raises EditkitError also for an empty null space, and for a step that is too large (`settings.largest`).
    """
    given = prepare(
        lm, facts, settings or BetaEditSettings(), seed=seed, moments=moments, contexts=contexts, progress=progress
    )
    kept = earlier if given.settings.keep_earlier else ()
    states = carried or Carried()
    spaces = {layer: space_of(lm, given, layer, kept, states) for layer in given.layers}

    def solve(layer: int, keys: Tensor) -> Tensor:
        return constrained(spaces[layer].basis, spaces[layer].held, keys)

    spread = write_values(lm, given, solve, progress=progress)
    for report, delta in zip(spread.layers, spread.deltas, strict=True):
        report["null_space"] = rank_of(spaces[report["layer"]].basis)
        size = delta.norm() / len(given.facts) ** 0.5
        if size > given.settings.largest:
            raise EditkitError(
                f"‖ΔW‖/√n is {size:.3g} at {delta.module}, over method.largest={given.settings.largest:g}: the edits "
                "have begun to break the model. Stop here, undo steps, or raise method.mom2_update_weight."
            )
    return spread.edit(given, "betaedit", spread.memory(lm))


def space_of(
    lm: LanguageModel, given: Given[BetaEditSettings], layer: int, earlier: Sequence[Edit], carried: Carried
) -> Space:
    """The state of block `layer` after `earlier`."""
    asked, moment, name = given.settings, given.moments[layer], down_of(lm, layer)

    def start() -> Space:
        basis = null_space(moment, layer, asked.threshold, asked.fraction)
        assert moment is not None  # else it has none
        return Space(basis, held_in(basis, moment, None, asked), None if moment.routed else 0 * moment.matrix)

    def add(space: Space, edit: Edit) -> Space:
        if name not in edit.memory:
            return space
        assert moment is not None
        keys = edit.memory[name].double()
        more = replace(space, facts=space.facts + keys.shape[1])
        if space.sums is None:
            return replace(more, held=space.held.also(in_basis(space.basis, keys)))
        sums = space.sums + keys @ keys.T
        if more.facts - space.rebuilt < asked.rebuild_every:
            return replace(more, held=space.held.also(in_basis(space.basis, keys)), sums=sums)
        weight = asked.mom2_update_weight
        assert weight is not None  # resolved
        both = replace(moment, matrix=(sums / more.facts + weight * moment.matrix) / (weight + 1))
        basis = null_space(both, layer, asked.threshold, asked.fraction)
        return replace(more, basis=basis, held=held_in(basis, moment, sums, asked), sums=sums, rebuilt=more.facts)

    return carried.state(f"space {name}", earlier, start, add, Form(written, read))


def written(space: Space) -> dict[str, Tensor]:
    """What `read` makes the space of again."""
    text = space.held.text
    factor = {"diagonal": text.values} if isinstance(text, Diagonal) else {"lower": text.lower}
    counts = {"counts": torch.tensor([space.facts, space.rebuilt])}
    sums = {} if space.sums is None else {"sums": space.sums}
    return {"basis": space.basis, **factor, **counts, **sums, **space.held.earlier.tensors()}


def read(tensors: Tensors) -> Space:
    """The space that was `written`."""
    text = Diagonal(tensors["diagonal"]) if "diagonal" in tensors else Factored(tensors["lower"])
    facts, rebuilt = tensors["counts"].tolist()
    return Space(tensors["basis"], Held(text, earlier=Earlier.of(tensors)), tensors.get("sums"), facts, rebuilt)


def held_in(basis: Tensor, moment: SecondMoment, sums: Tensor | None, settings: BetaEditSettings) -> Held:
    """A = Bᵀ(λ₁ C + S) B + λ₂ I in the range of P. Of experts it is diagonal: B are eigenvectors of C."""
    weight, l2 = settings.mom2_update_weight, settings.l2
    assert weight is not None and l2 is not None  # resolved
    if moment.routed:
        energy = (basis * torch.bmm(moment.matrix, basis)).sum(1).flatten()
        return Held(Diagonal(weight * energy + l2))
    whole = weight * moment.matrix if sums is None else weight * moment.matrix + sums
    inside = basis.T @ whole @ basis + l2 * torch.eye(basis.shape[1], dtype=basis.dtype)
    return Held(Factored(torch.linalg.cholesky((inside + inside.T) / 2)))


register("betaedit", betaedit, BetaEditSettings)
