"""Slow, plain versions written from the papers, in float64. They share no code with editkit."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Change = Callable[[Tensor], Tensor]
Row = tuple[list[int], int, int]  # ids of context + prompt + target, lookup position, number of target tokens
KlRow = tuple[list[int], int]  # ids of "subject is a", lookup position
FactRows = tuple[list[Row], KlRow]  # of one fact, the bare prompt's row first


def dense(module: nn.Module) -> Tensor:
    """W as [d_model, d_ff] whatever the module stores."""
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight


class Memory:
    """One block's down-projection: the module `name`, whose input is the key and whose output the value."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.module = model.get_submodule(name)

    def keys(self, given: Tensor) -> Tensor:
        """The keys [tokens, d_ff], from the module's input [tokens, d]."""
        return given

    def matrix(self) -> Tensor:
        """W [d_model, d_ff]."""
        return dense(self.module)

    def rest(self, key: Tensor, value: Tensor) -> Tensor | int:
        """What is added to W k in `value`."""
        return 0 if getattr(self.module, "bias", None) is None else self.module.get_parameter("bias")

    def add(self, update: Tensor) -> None:
        """Write ΔW [d_model, d_ff]."""
        dense(self.module).add_(update)


Memories = Callable[[nn.Module, str], Memory]


def logits_of(model: nn.Module, ids: Sequence[int], **options: Any) -> Tensor:
    """[tokens, vocabulary] of one row of ids."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), **options).logits[0]
    return logits


def run_hooked(
    model: nn.Module, module: nn.Module, ids: Sequence[int], change: Change | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the input and (changed) output of `module`, for one row of ids."""
    seen: dict[str, Tensor] = {}

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        whole = whole if change is None else change(whole)
        seen["k"], seen["m"] = args[0][0], whole[0]
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handle = module.register_forward_hook(hook)
    try:
        logits = logits_of(model, ids)
    finally:
        handle.remove()
    return logits, seen["k"], seen["m"]


def second_moment(model: nn.Module, module: nn.Module, blocks: Iterable[Sequence[int]]) -> Tensor:
    """E[k kᵀ], one key at a time."""
    keys: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: keys.extend(args[0].reshape(-1, args[0].shape[-1])))
    model = model.double()
    try:
        with torch.no_grad():
            for block in blocks:
                model(input_ids=torch.tensor([block]))
    finally:
        handle.remove()
    return moment_of(keys)


def moment_of(keys: Sequence[Tensor]) -> Tensor:
    """The mean of k kᵀ in float64, one key at a time."""
    total = torch.zeros(len(keys[0]), len(keys[0]), dtype=torch.float64)
    for k in keys:
        total = total + torch.outer(k.double(), k.double())
    return total / len(keys)


def adam(
    loss_of: Callable[[Tensor], Tensor],
    v0: Tensor,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp: float,
    stop_loss: float,
) -> tuple[Tensor, list[float]]:
    """δ by Adam on loss_of(δ) + weight decay, as the authors' code takes its steps; the loss of each evaluation."""
    delta = torch.zeros_like(v0, requires_grad=True)
    first_moment, second = torch.zeros_like(v0), torch.zeros_like(v0)
    losses: list[float] = []
    for step in range(steps):
        # The norm's gradient at 0 is taken as 0.
        size = delta.norm() if delta.detach().abs().sum() > 0 else (delta * 0).sum()
        loss = loss_of(delta) + weight_decay * size / v0.norm() ** 2
        losses.append(loss.item())
        if loss.item() < stop_loss or step == steps - 1:
            break
        (gradient,) = torch.autograd.grad(loss, delta)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        corrected = first_moment / (1 - 0.9 ** (step + 1))
        scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        moved = delta.detach() - lr * corrected / scale
        bound = clamp * v0.norm()
        if moved.norm() > bound:
            moved = moved * bound / moved.norm()
        delta = moved.requires_grad_(True)
    return delta.detach(), losses


def descent(
    loss_of: Callable[[list[Tensor]], Tensor],
    norms: Sequence[Tensor],
    width: int,
    steps: int,
    clamp: float,
    stop_loss: float,
) -> tuple[list[Tensor], list[float]]:
    """δ of each site by Polyak's step under a trust radius, in plain numbers for one fact; the loss of each evaluation.

    `norms`: ‖v0‖ of each site.
    """
    sites = range(len(norms))
    best = [torch.zeros(width, dtype=norms[0].dtype) for _ in sites]
    best_loss, slopes, radius = math.inf, list(best), 1.0
    tried, losses = best, list[float]()
    for step in range(steps):
        here = [each.clone().requires_grad_(True) for each in tried]
        loss = loss_of(here)
        losses.append(loss.item())
        if loss.item() < stop_loss or radius < 1e-3:
            break
        if step == steps - 1:
            break
        gradients = torch.autograd.grad(loss, here)
        moved = [a - b for a, b in zip(tried, best, strict=True)]
        length = max((m.norm() / n).item() for m, n in zip(moved, norms, strict=True))
        if loss.item() < best_loss:
            promised = -sum((g * m).sum().item() for g, m in zip(slopes, moved, strict=True))
            if best_loss - loss.item() > 0.3 * promised:
                radius = max(radius, 2 * length)
            best, best_loss, slopes = tried, loss.item(), list(gradients)
        else:
            radius = 0.4 * length
        steep = sum(g.square().sum().item() for g in slopes)
        wanted = [-(best_loss - stop_loss / 2) / steep * g for g in slopes]
        longest = max((w.norm() / n).item() for w, n in zip(wanted, norms, strict=True))
        goal = [b + min(1.0, radius / longest) * w for b, w in zip(best, wanted, strict=True)]
        tried = [g * min(1.0, clamp * n.item() / g.norm().item()) for g, n in zip(goal, norms, strict=True)]
    return (tried if losses[-1] < best_loss else best), losses


def rome_update(
    model: nn.Module,
    module_name: str,
    rows: list[Row],
    kl_row: KlRow,
    C: Tensor,
    *,
    mixed: bool,
    steps: int,
    lr: float = 0.0,
    weight_decay: float = 0.0,
    kl_factor: float,
    clamp: float,
    stop_loss: float,
    solver: str = "adam",
    memories: Memories = Memory,
    anchor: float | None = None,
) -> tuple[Tensor, list[float]]:
    """ΔW [d_model, d_ff] and the loss of each evaluation, one row at a time at full depth.

    `rows`: the bare prompt's first. `memories`: makes the memory of the module.
    """
    model = copy.deepcopy(model).double()
    for p in model.parameters():
        p.requires_grad_(False)
    module, memory = model.get_submodule(module_name), memories(model, module_name)
    W = memory.matrix()

    keys, values = [], []
    for ids, at, _ in rows:
        _, k, m = run_hooked(model, module, ids)
        keys.append(memory.keys(k)[at])
        values.append(m[at])
    v0 = values[0]

    before: Tensor | None = None

    def loss_of(delta: Tensor) -> Tensor:
        """NLL + KL, one row at a time."""
        nonlocal before

        def at_position(at: int) -> Change:
            def change(output: Tensor) -> Tensor:
                added = torch.zeros_like(output)
                added[0, at] = 1.0
                return output + added * delta

            return change

        nll = torch.zeros((), dtype=v0.dtype)
        for ids, at, targets in rows:
            logits, _, _ = run_hooked(model, module, ids, at_position(at))
            log_p = F.log_softmax(logits, -1)
            picked = [log_p[len(ids) - targets - 1 + j, ids[len(ids) - targets + j]] for j in range(targets)]
            nll = nll - torch.stack(picked).mean() / len(rows)
        ids, at = kl_row
        logits, _, _ = run_hooked(model, module, ids, at_position(at))
        after = F.log_softmax(logits[at], -1)
        before = after.detach() if before is None else before
        kl = (after.exp() * (after - before)).sum()  # KL(edited ‖ clean): equation 4 and the authors' code
        return nll + kl_factor * kl

    if solver == "descent":
        (delta,), losses = descent(lambda deltas: loss_of(deltas[0]), [v0.norm()], len(v0), steps, clamp, stop_loss)
    else:
        delta, losses = adam(loss_of, v0, steps, lr, weight_decay, clamp, stop_loss)
    delta = anchored(v0, delta, anchor)
    k_mean = torch.stack(keys).mean(0)
    u = torch.linalg.inv(C) @ k_mean
    gives = [W @ key + memory.rest(key, value) for key, value in zip(keys, values, strict=True)]
    if mixed:  # the authors' code
        k, v_star, now = keys[0], v0 + delta, gives[0]
    else:  # one key on both sides
        k, v_star, now = k_mean, v0 + delta, torch.stack(gives).mean(0)
    return torch.outer(v_star - now, u) / (k @ u), losses


class _Probe:
    """Runs a model on one row of ids; reads modules, and adds vectors to their outputs at one position."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, ids: Sequence[int], at: int, read: Iterable[str] = (), add: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """Logits [tokens, vocabulary], and {(module, "in" or "out"): what passed at position `at`}."""
        add = add or {}
        seen: dict[tuple[str, str], Tensor] = {}
        handles = []

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], Any]:
            def act(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
                whole = output[0] if isinstance(output, tuple) else output
                flat = whole.reshape(-1, whole.shape[-1])  # OPT gives [tokens, d], the others [1, tokens, d]
                if name in add:
                    mark = torch.zeros(len(flat), 1, dtype=flat.dtype)
                    mark[at] = 1.0
                    flat = flat + mark * add[name]
                    whole = flat.reshape(whole.shape)
                if args:
                    seen[name, "in"] = args[0].reshape(-1, args[0].shape[-1])[at]
                seen[name, "out"] = flat[at].clone()  # Falcon adds to it in place
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            return act

        for name in {*read, *add}:
            handles.append(self.model.get_submodule(name).register_forward_hook(hook(name)))
        try:
            logits = logits_of(self.model, ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen


def _values(
    model: nn.Module,
    method: str,
    target_site: str,
    attention: str,
    name: str,
    layer: int,
    inputs: FactRows,
    settings: Any,
) -> Tensor:
    """The target z [d_model] of one fact at `target_site`, row by row."""
    rows, (kl_ids, kl_at) = inputs
    run = _Probe(model)
    bare = rows[0][0][: len(rows[0][0]) - rows[0][2]]
    with torch.no_grad():
        _, seen = run(bare, rows[0][1], [target_site, name, attention.format(layer)])
    start = seen[target_site, "out"]
    sites = {name: start} | (
        {attention.format(layer): seen[attention.format(layer), "out"]} if method == "pmet" else {}
    )
    before: Tensor | None = None
    said_at_last = False

    def loss_of(found: Sequence[Tensor]) -> Tensor:
        """The method's NLL + KL, one row at a time. `found`: δ of each site."""
        nonlocal before, said_at_last
        deltas = dict(zip(sites, found, strict=True))
        nll, said = torch.zeros((), dtype=start.dtype), True
        for ids, at, targets in rows:
            logits, _ = run(ids, at, add=deltas)
            log_p = F.log_softmax(logits, -1)
            places = range(len(ids) - targets, len(ids))
            said = said and all(log_p[i - 1].argmax().item() == ids[i] for i in places)
            nll = nll - torch.stack([log_p[i - 1, ids[i]] for i in places]).mean() / len(rows)
        said_at_last = said
        logits, _ = run(kl_ids, kl_at, add=deltas)
        after = F.log_softmax(logits[kl_at], -1)
        before = after.detach() if before is None else before
        kl = (after.exp() * (after - before)).sum()  # KL(edited ‖ clean): equation 4 and the authors' code
        loss: Tensor = (0.1 if method == "pmet" and said else 1.0) * nll + settings.kl_factor * kl
        return loss

    norms = [value.norm() for value in sites.values()]
    if settings.solver == "descent":
        found, _ = descent(loss_of, norms, len(start), settings.steps, settings.clamp, settings.stop_loss)
        return start + anchored(seen[name, "out"], found[list(sites).index(name)], settings.anchor)
    deltas = [torch.zeros_like(start, requires_grad=True) for _ in sites]
    times = 0  # at how many steps the target was the likeliest
    state = [(torch.zeros_like(start), torch.zeros_like(start)) for _ in sites]
    for step in range(settings.steps):
        loss = loss_of(deltas)
        for delta, norm in zip(deltas, norms, strict=True):
            if delta.detach().abs().sum() > 0:
                loss = loss + settings.weight_decay * delta.norm() / norm**2
        times += said_at_last
        if step == settings.steps - 1 or (method == "encore" and times >= settings.stop_likeliest):
            break
        for i, gradient in enumerate(torch.autograd.grad(loss, deltas)):
            m, v = state[i]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            state[i] = m, v
            scale = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            moved = deltas[i].detach() - settings.lr * m / (1 - 0.9 ** (step + 1)) / scale
            bound = settings.clamp * norms[i]
            deltas[i] = (moved * min(1.0, bound / moved.norm())).requires_grad_(True)
    return start + anchored(seen[name, "out"], deltas[list(sites).index(name)].detach(), settings.anchor)


def anchored(v0: Tensor, delta: Tensor, anchor: float | None) -> Tensor:
    """δ [d_model] by NAS: v0 + δ is brought to the norm of the anchor, or left at v0."""
    if anchor is None:
        return delta
    if (v0 + delta).norm() > 2 * anchor:
        return torch.zeros_like(delta)
    scaled: Tensor = anchor * (v0 + delta) / (v0 + delta).norm() - v0
    return scaled


def spread_updates(
    model: nn.Module,
    method: str,
    block: str,
    attention: str,
    names: Sequence[str],
    layers: Sequence[int],
    facts: Sequence[FactRows],
    moments: Sequence[Tensor],
    settings: Any,
    memories: Memories = Memory,
    *,
    earlier: Sequence[Tensor] = (),
    own_target: bool = False,
    protected: Sequence[Tensor] = (),
) -> list[Tensor]:
    """ΔW [d_model, d_ff] of each layer by MEMIT, EMMET, PMET or AlphaEdit as the papers write them, by direct solves.

    `settings`: the method's own. `memories`: makes the memory of a module. `earlier`: S [d_ff, d_ff] of each layer, of
    the facts edited before. `own_target`: the target is the down-projection's output, not the block's. `protected`:
    whose null space BetaEdit takes, C's where there is none. The weights are written into a copy, layer after layer.
    """
    model = copy.deepcopy(model).double()
    for p in model.parameters():
        p.requires_grad_(False)
    run = _Probe(model)
    target_site = names[-1] if method == "pmet" or own_target else block.format(layers[-1])
    where = method, target_site, attention, names[-1], layers[-1]
    z = [_values(model, *where, inputs, settings) for inputs in facts]
    updates = []
    for number, (name, C) in enumerate(zip(names, moments, strict=True)):
        memory = memories(model, name)
        residuals = []
        for (rows, _), target in zip(facts, z, strict=True):
            ids, at, targets = rows[0]
            residuals.append(target - run(ids[: len(ids) - targets], at, [target_site])[1][target_site, "out"])
        K, R = keys_now(model, name, facts, memories), torch.stack(residuals, 1)
        S = earlier[number] if earlier else torch.zeros(len(K), len(K), dtype=K.dtype)
        left = len(names) - number
        R = R / (left**0.5 if method == "pmet" else left)
        eye, few = torch.eye(len(K), dtype=K.dtype), torch.eye(K.shape[1], dtype=K.dtype)
        if method == "encore":
            C = C + settings.gamma / settings.mom2_update_weight * eye
        if method in ("memit", "memit_seq", "pmet", "encore"):
            update = R @ K.T @ torch.linalg.inv(settings.mom2_update_weight * C + S + K @ K.T)
        elif method == "emmet":
            inverse = torch.linalg.inv(settings.mom2_update_weight * C + S)
            epsilon = settings.epsilon if K.shape[1] > 1 else 0.0
            update = R @ torch.linalg.inv(K.T @ inverse @ K + epsilon * few) @ K.T @ inverse
        elif method == "betaedit":
            _, vectors = torch.linalg.eigh(protected[number] if protected else C)
            low = vectors[:, : round(settings.fraction * len(C))]
            P = low @ low.T
            old = S + settings.mom2_update_weight * C
            update = torch.linalg.solve(P @ (K @ K.T + old) + settings.l2 * eye, P @ K @ R.T).T
        else:
            _, vectors = torch.linalg.eigh(C)
            low = vectors[:, : round(settings.fraction * len(C))]
            P = low @ low.T
            update = torch.linalg.solve(P @ (K @ K.T + S) + settings.l2 * eye, P @ K @ R.T).T
        updates.append(update)
        memory.add(update)
    return updates


@torch.no_grad()
def keys_now(model: nn.Module, name: str, facts: Sequence[FactRows], memories: Memories = Memory) -> Tensor:
    """K [d_ff, n] of the module `name` as the model is now: half the bare prompt's key, half the mean of the others."""
    memory, run, keys = memories(model, name), _Probe(model), []
    for rows, _ in facts:
        given = [run(ids[: len(ids) - t], at, [name])[1][name, "in"] for ids, at, t in rows]
        of_row = [memory.keys(x[None])[0] for x in given]
        keys.append((of_row[0] + torch.stack(of_row[1:]).mean(0)) / 2)
    return torch.stack(keys, 1)


def session_updates(
    model: nn.Module,
    method: str,
    block: str,
    attention: str,
    names: Sequence[str],
    layers: Sequence[int],
    batches: Sequence[Sequence[FactRows]],
    moments: Sequence[Tensor],
    settings: Any,
    memories: Memories = Memory,
    *,
    own_target: bool = False,
    rebuild: Sequence[bool] = (),
) -> list[list[Tensor]]:
    """ΔW of each layer for each batch, written one after the other; S grows by the keys that the edited model has.

    Arguments as for spread_updates. `rebuild`: whether BetaEdit's null space is taken anew after each batch, by layer.
    """
    model = copy.deepcopy(model).double()
    S = [torch.zeros_like(C) for C in moments]
    found, count, protected = [], 0, list[Tensor]()
    for facts in batches:
        given = model, method, block, attention, names, layers, facts, moments, settings, memories
        updates = spread_updates(*given, earlier=S, own_target=own_target, protected=protected)
        with torch.no_grad():
            for name, update in zip(names, updates, strict=True):
                memories(model, name).add(update)
        again = [keys_now(model, name, facts, memories) for name in names]
        S = [s + K @ K.T for s, K in zip(S, again, strict=True)]
        count += len(facts)
        if rebuild:
            weight = settings.mom2_update_weight
            both = [(s / count + weight * C) / (weight + 1) for s, C in zip(S, moments, strict=True)]
            protected = [b if anew else C for b, C, anew in zip(both, moments, rebuild, strict=True)]
        found.append(updates)
    return found
