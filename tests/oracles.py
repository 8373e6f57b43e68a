"""Slow, plain versions written from the papers, in float64. They share no code with editkit."""

import copy

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D


def dense(module) -> torch.Tensor:
    """W as [d_model, d_ff] whatever the module stores."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def run_hooked(model, module, ids, change=None):
    """Logits, and the input and (changed) output of `module`, for one row of ids."""
    seen = {}

    def hook(_, args, output):
        seen["k"] = args[0][0]
        seen["m"] = output[0] if change is None else change(output)[0]
        return None if change is None else change(output)

    handle = module.register_forward_hook(hook)
    try:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    finally:
        handle.remove()
    return logits, seen["k"], seen["m"]


def second_moment(model, module, blocks) -> torch.Tensor:
    """E[k kᵀ], one key at a time."""
    keys = []
    handle = module.register_forward_pre_hook(lambda _, args: keys.extend(args[0].reshape(-1, args[0].shape[-1])))
    model = model.double()
    try:
        with torch.no_grad():
            for block in blocks:
                model(input_ids=torch.tensor([block]))
    finally:
        handle.remove()
    return moment_of(keys)


def moment_of(keys) -> torch.Tensor:
    """The mean of k kᵀ in float64, one key at a time."""
    total = 0.0
    for k in keys:
        total = total + torch.outer(k.double(), k.double())
    return total / len(keys)


def rome_update(
    model, module_name, rows, kl_row, C, *, mixed, steps, lr, weight_decay, kl_factor, clamp, stop_loss
) -> tuple[torch.Tensor, list[float]]:
    """ΔW [d_model, d_ff] and the loss before each step, one row at a time at full depth.

    `rows`: (ids of context + prompt + target, lookup position, number of target tokens), the bare prompt
    first. `kl_row`: (ids of "subject is a", lookup position).
    """
    model = copy.deepcopy(model).double()
    for p in model.parameters():
        p.requires_grad_(False)
    module = model.get_submodule(module_name)
    W = dense(module)

    keys, values = [], []
    for ids, at, _ in rows:
        _, k, m = run_hooked(model, module, ids)
        keys.append(k[at])
        values.append(m[at])
    v0 = values[0]

    delta = torch.zeros_like(v0, requires_grad=True)
    first_moment, second = torch.zeros_like(v0), torch.zeros_like(v0)
    before, losses = None, []
    for step in range(steps):

        def at_position(at, delta=delta):
            def change(output):
                added = torch.zeros_like(output)
                added[0, at] = 1.0
                return output + added * delta

            return change

        nll = 0.0
        for ids, at, targets in rows:
            logits, _, _ = run_hooked(model, module, ids, at_position(at))
            log_p = F.log_softmax(logits, -1)
            picked = [log_p[len(ids) - targets - 1 + j, ids[len(ids) - targets + j]] for j in range(targets)]
            nll = nll - torch.stack(picked).mean() / len(rows)
        ids, at = kl_row
        logits, _, _ = run_hooked(model, module, ids, at_position(at))
        after = F.log_softmax(logits[at], -1)
        before = after.detach() if before is None else before
        kl = (before.exp() * (before - after)).sum()
        # The norm's gradient at 0 is taken as 0.
        size = delta.norm() if delta.detach().abs().sum() > 0 else (delta * 0).sum()
        loss = nll + kl_factor * kl + weight_decay * size / v0.norm() ** 2
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

    delta = delta.detach()
    k_mean = torch.stack(keys).mean(0)
    u = torch.linalg.inv(C) @ k_mean
    bias = 0 if getattr(module, "bias", None) is None else module.bias
    if mixed:  # the authors' code
        k, v_star = keys[0], v0 + delta
        now = W @ k + bias
    else:  # one key on both sides
        k, v_star = k_mean, v0 + delta
        now = torch.stack([W @ key + bias for key in keys]).mean(0)
    return torch.outer(v_star - now, u) / (k @ u), losses
