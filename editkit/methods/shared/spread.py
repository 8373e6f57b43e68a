"""What MEMIT and its descendants share: values of many facts, written over a range of blocks.

With L the last block of the range, z_i the target for fact i at block L, and for each block l of the range, ascending:

    R = (Z − what block L gives now) / share(number of blocks left)     [d_model, n]
    K = keys of block l now, averaged over context types                [d_ff, n]
    ΔW_l = R · A(K),     A [n, d_ff] is the method's own

The target site is the residual stream after block L: the down-projection's output plus what the block adds to it
(MEMIT section 4; the authors' `memit_main.py`). In a family with a norm behind the MLP that sum is not linear in the
down-projection's output: there the target site is the down-projection's output itself, and only one block
can be written.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from editkit.edits import Delta, Edit, low_rank_delta, routing_report
from editkit.methods.shared.anchor import Anchored, anchored
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.prelude import Given
from editkit.methods.shared.sites import Lookups
from editkit.methods.shared.value import Optimised, compute_deltas, named
from editkit.models.experts import down_of, keys_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.precision import widened
from editkit.settings import SpreadSettings

Solve = Callable[[int, Tensor], Tensor]  # (layer, K [d_ff, n]) -> A [n, d_ff]


class Reader(Protocol):
    """Reads keys, and what is at the target site, for the n values that are written; as the model is now."""

    def keys(self, layer: int) -> Tensor:
        """What enters the site of block `layer`, [n, templates, d] in float64 on the CPU, the bare prompt first."""
        ...

    def values(self) -> Tensor:
        """The target site's output [n, d_model], in float64 on the CPU; after `keys`, with nothing written since."""
        ...


@dataclass(frozen=True)
class Spread:
    """What was written over the blocks, ascending."""

    deltas: tuple[Delta, ...]
    keys: dict[int, Tensor]  # K [d_ff, n] of each layer, in float64
    layers: list[dict[str, Any]]  # a report of each layer
    facts: list[dict[str, Any]]  # a report of each fact's value
    routing: dict[str, Any]  # of a mixture of experts: see routing_report

    def memory(self, lm: LanguageModel) -> dict[str, Tensor]:
        """The keys of these facts, for the method's later edits: K [d_ff, n] in float32 by the module that holds W."""
        return {down_of(lm, layer): keys.float() for layer, keys in self.keys.items()}

    def edit(self, given: Given[Any], method: str, memory: dict[str, Tensor] | None = None) -> Edit:
        """The Edit. `memory`: what the method keeps for its later edits (see Edit)."""
        how = given.provenance(method, reports=self.facts, layers=self.layers, **self.routing)
        return Edit(self.deltas, given.base, how, memory=memory or {})


def write_values(
    lm: LanguageModel,
    given: Given[SpreadSettings],
    solve: Solve,
    *,
    progress: bool,
    with_attention: bool = False,
    share: Callable[[int], float] = float,
    **options: Any,
) -> Spread:
    """Compute the value of each fact at the last of the layers, and spread it over all of them.

    - `given`: facts, settings, layers and templates.
    - `solve`: the method's own solve.
    - `progress`: whether to show the value's progress bar.
    - `with_attention`: optimise a second δ at the attention's output, which is not written (PMET); the target site is
      the down-projection then.
    - `share`: of the number of blocks left, what the residual is divided by.
    - `options`: of compute_deltas: nll_weight, stop_kl, stop_likeliest.
    """
    last = given.layers[-1]
    site = site_of(lm, last)
    sites = [lm.architecture.attention.format(last), site] if with_attention else [site]
    target_site = site if with_attention else lm.architecture.target_site(last)
    lookups = lookups_of(lm, given, sites, target_site)
    z, reports = compute_z(lm, given, sites, target_site, lookups, progress=progress, **options)
    deltas, keys, written = spread(lm, given, lookups, z, solve, share=share)
    routing = routing_report(lm, Edit(deltas, given.base), [fact.text for fact in given.facts])
    return Spread(deltas, keys, written, reports, routing)


def lookups_of(lm: LanguageModel, given: Given[SpreadSettings], sites: Sequence[str], target_site: str) -> Lookups:
    """What the facts' keys and values are read from. At full depth each reading is a pass of its own."""
    settings, last = given.settings, [site for site in sites if site != target_site]
    facts, templates, keep = given.facts, given.templates, settings.engine != "full"
    return Lookups(lm, facts, templates, settings.fact_token, given.layers, target_site, last, keep=keep)


def compute_z(
    lm: LanguageModel,
    given: Given[SpreadSettings],
    sites: Sequence[str],
    target_site: str,
    lookups: Lookups,
    *,
    progress: bool,
    **options: Any,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Z [n, d_model], the target of each fact, and a report of each.

    - `sites`: modules of the last layer to whose outputs a δ is added; the last one's is written.
    - `target_site`: the module whose output for the bare prompt, plus that δ, is the target.
    - `lookups`: of the same facts and sites (`lookups_of`).
    - `options`: of compute_deltas: nll_weight, stop_kl, stop_likeliest.
    """
    facts, settings, templates = given.facts, given.settings, given.templates
    # 1) ‖v0‖ of each fact at each site, from the bare prompt.
    start, *own = (lookups.start(site) for site in (target_site, *sites[:-1]))  # each [n, d_model]
    values = lookups.start(sites[-1])  # [n, d_model], of the module that is written
    norms = torch.stack([values.norm(dim=-1) for values in (*own, start)], 1)  # [n, sites]
    # 2) δ of all facts side by side.
    jobs = [rows_of(lm, fact, settings.fact_token, templates) for fact in facts]
    found = compute_deltas(
        lm, given.layers[-1], sites, jobs, norms, settings, name=named(facts), progress=progress, **options
    )
    # 3) Targets and reports.
    scaled = anchored(values, torch.stack([each.delta[-1] for each in found]), settings.anchor)
    return start + scaled.delta, value_reports(found, norms[:, -1], scaled)


def value_reports(found: Sequence[Optimised], norms: Tensor, scaled: Anchored) -> list[dict[str, Any]]:
    """A report of each of n values. `norms` [n]: ‖v0‖ as the clamp takes it. `scaled`: what is written of `found`."""
    return [
        {
            "steps": each.steps,
            "clamp_hit": each.clamp_hit,
            "delta_norm": delta.norm().item(),
            "v0_norm": norm.item(),
            "value_norm": value.item(),
            "skipped": bool(skipped),
        }
        for each, norm, delta, value, skipped in zip(found, norms, *scaled, strict=True)
    ]


def spread(
    lm: LanguageModel,
    given: Given[SpreadSettings],
    lookups: Reader,
    z: Tensor,
    solve: Solve,
    *,
    share: Callable[[int], float] = float,
) -> tuple[tuple[Delta, ...], dict[int, Tensor], list[dict[str, Any]]]:
    """The delta of each layer, its keys K [d_ff, n], and a report of it. The model is left as it was.

    - `lookups`: reads keys, and what is at the target site now. `z` [n, d_model]: the target of each fact there.
    - `solve`: A(K) for a layer.
    - `share`: of the number of blocks left, what the residual is divided by.
    """
    deltas, all_keys, reports = [], {}, []
    with ExitStack() as undo:  # lower blocks stay written while the higher ones are computed
        for number, layer in enumerate(given.layers):
            keys = mean_keys(lm, layer, lookups.keys(layer))
            missing = (z - lookups.values()).T  # [d_model, n]
            left, right = missing / share(len(given.layers) - number), solve(layer, keys)
            delta = low_rank_delta(lm, down_of(lm, layer), left, right)
            deltas.append(delta)
            all_keys[layer] = keys
            reports.append(
                {
                    "layer": layer,
                    "missing": missing.norm(dim=0).mean().item(),  # mean distance to the target before this write
                    "written": (right @ keys).diagonal().mean().item(),  # mean share of a fact's residual it writes
                    "norm": delta.norm(),
                }
            )
            if number + 1 < len(given.layers):
                undo.enter_context(Edit((delta,), given.base).applied(lm, check=False))
    return tuple(deltas), all_keys, reports


def mean_keys(lm: LanguageModel, layer: int, given: Tensor) -> Tensor:
    """K [d_ff, n], the key of each fact at block `layer`, in float64 on the CPU.

    The bare prompt's key counts one half and the mean over all other templates the other half, as in the authors' code.
    `given`: what enters the block's site now, [n, templates, d].
    """
    others = given.shape[1] - 1
    weights = torch.tensor([0.5] + [0.5 / others] * others if others else [1.0]).double()
    with widened(lm):  # a fact at a time, since the key of a mixture of experts is much longer than d
        each = [weights @ keys_of(lm, down_of(lm, layer), of_fact) for of_fact in given]
    return torch.stack(each, 1)
