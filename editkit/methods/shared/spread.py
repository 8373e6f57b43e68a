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
from typing import Any

import torch
from torch import Tensor

from editkit.edits.edit import Base, Delta, Edit, low_rank_delta
from editkit.errors import ModelError
from editkit.facts import Fact
from editkit.methods.shared.engine import rows_of
from editkit.methods.shared.value import at_lookup, compute_deltas, named
from editkit.models.load import LanguageModel
from editkit.settings import SpreadSettings

Solve = Callable[[int, Tensor], Tensor]  # (layer, K [d_ff, n]) -> A [n, d_ff]


def layers_of(lm: LanguageModel, settings: SpreadSettings) -> list[int]:
    """The blocks to write, ascending. Raises ModelError for one the model does not have, or a range it cannot take."""
    layers = sorted(settings.layers or ())
    for layer in layers:
        lm.check_layer(layer)
    if len(layers) > 1 and lm.architecture.mlp_norm is not None:
        raise ModelError(
            f"Layers {layers} were asked for; '{lm.architecture.family}' has a norm between the MLP and the residual "
            "stream, so a residual cannot be shared out over several blocks. Give one, as in method.layers=[3]."
        )
    return layers


def compute_z(
    lm: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    sites: Sequence[str],
    target_site: str,
    settings: SpreadSettings,
    templates: Sequence[str],
    progress: bool,
    **options: Any,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Z [n, d_model] at `target_site`: its output for the bare prompt, plus δ of the last of `sites` (of `layer`)."""
    start, *own = (
        at_lookup(lm, site, facts, templates[:1], settings.fact_token).output[:, 0]
        for site in (target_site, *sites[:-1])
    )  # each [n, d_model]
    norms = torch.stack([values.norm(dim=-1) for values in (*own, start)], 1)  # [n, sites]
    jobs = [rows_of(lm, fact, settings.fact_token, templates) for fact in facts]
    found = compute_deltas(lm, layer, sites, jobs, norms, settings, name=named(facts), progress=progress, **options)
    reports = [
        {
            "steps": each.steps,
            "clamp_hit": each.clamp_hit,
            "delta_norm": each.delta[-1].norm().item(),
            "v0_norm": norm.item(),
        }
        for each, norm in zip(found, norms[:, -1], strict=True)
    ]
    return start + torch.stack([each.delta[-1] for each in found]), reports


def spread(
    lm: LanguageModel,
    facts: Sequence[Fact],
    base: Base,
    layers: Sequence[int],
    target_site: str,
    z: Tensor,
    templates: Sequence[str],
    token: str,
    solve: Solve,
    *,
    share: Callable[[int], float] = float,
) -> tuple[tuple[Delta, ...], dict[int, Tensor], list[dict[str, Any]]]:
    """The deltas of `layers`, the keys K of each, and a report of each. The model is left as it was."""
    weights = torch.tensor([0.5] + [0.5 / (len(templates) - 1)] * (len(templates) - 1) if templates[1:] else [1.0])
    deltas, all_keys, reports = [], {}, []
    with ExitStack() as undo:  # lower blocks stay written while the higher ones are computed
        for number, layer in enumerate(layers):
            site = lm.architecture.down(layer)
            keys = at_lookup(lm, site, facts, templates, token).input  # [n, templates, d_ff]
            keys = (keys * weights[:, None].double()).sum(1).T
            missing = (z - at_lookup(lm, target_site, facts, templates[:1], token).output[:, 0]).T  # [d_model, n]
            left, right = missing / share(len(layers) - number), solve(layer, keys)
            delta = low_rank_delta(lm, site, left, right)
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
            if number + 1 < len(layers):
                undo.enter_context(Edit((delta,), base).applied(lm, check=False))
    return tuple(deltas), all_keys, reports
