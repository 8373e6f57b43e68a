"""Random trees of modules that note what happens in them, and changes for traces to make."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from editkit.nethook import hidden

WIDTH = 4
# Equal on every machine, whatever its speed.
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]
STABLE = settings(deadline=None, derandomize=True, suppress_health_check=SLOW)

Spec = tuple[str, Any]  # the kind of a module; then its leaf, its parts or an earlier module's number


EDITS: dict[str, Callable[..., Any]] = {
    "doubles": lambda h: 2 * h,
    "tells its site": lambda h, site: h + len(site),
    "in place": lambda h: h.mul_(0.5),
    "same": lambda h: h,
    "forgets": lambda h: None,
    "cuts": lambda h: h[..., :-1],
}

GOOD = ["doubles", "tells its site", "in place", "same"]


class Audit:
    """What really happened, noted by the modules themselves and therefore independent of any hook."""

    def __init__(self) -> None:
        self.ran: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # in forward: the input and the output
        self.came_out: dict[nn.Module, list[Tensor]] = {}  # what the caller was given, and gives to the next

    def note_run(self, module: nn.Module, given: Tensor, result: Any) -> None:
        self.ran.setdefault(module, []).append((given, hidden(result).detach().clone()))

    def note_output(self, module: nn.Module, output: Any) -> None:
        self.came_out.setdefault(module, []).append(hidden(output).detach().clone())


class Noted(nn.Module):
    """Notes the input and the output of its own `run`; `armed` makes it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.audit: Audit | None = None
        self.armed: BaseException | None = None

    def forward(self, hidden_states: Any) -> Any:
        if self.armed:
            raise self.armed
        if self.audit is None:
            return self.run(hidden_states)
        given = hidden(hidden_states).detach().clone()  # before anything is changed in place
        result = self.run(hidden_states)
        self.audit.note_run(self, given, result)
        return result

    def run(self, h: Any) -> Any:
        raise NotImplementedError


class Leaf(Noted):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def run(self, h: Any) -> Any:
        return self.inner(h)


class Tupled(Leaf):
    """Gives (None, hidden) as attention modules may."""

    def run(self, h: Any) -> Any:
        return None, self.inner(h)


class Chain(Noted):
    """Runs its parts one after the other, every other one by keyword, and takes tuples apart in between."""

    def __init__(self, parts: list[nn.Module], idle: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part_{i}": part for i, part in enumerate(parts)})
        self.idle = nn.ModuleList(idle)  # registered and never called

    def run(self, h: Any) -> Any:
        for i, part in enumerate(self.parts.values()):
            h = hidden(h)
            h = part(hidden_states=h) if i % 2 and isinstance(part, Noted) else part(h)
            if self.audit is not None:
                self.audit.note_output(part, h)
        return h


class First(Noted):
    """After each part of a Sequential: gives on the hidden tensor alone, and notes what it received."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.received_from = (part,)  # in a tuple, so that it is not a sub-module

    def run(self, h: Any) -> Any:
        if self.audit is not None:
            self.audit.note_output(self.received_from[0], h)
        return hidden(h)


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "relu": nn.ReLU,
    "in-place relu": lambda: nn.ReLU(inplace=True),
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.3),
}

plain = st.sampled_from(sorted(LEAVES))
leaves = st.tuples(st.sampled_from(["plain", "noted", "tupled"]), plain) | st.tuples(
    st.just("again"), st.integers(0, 20)
)
trees = st.recursive(
    leaves,
    lambda child: st.tuples(st.sampled_from(["sequential", "chain", "idle"]), st.lists(child, min_size=1, max_size=4)),
    max_leaves=8,
)


def grow(spec: Spec, made: list[nn.Module]) -> nn.Module:
    """The module of `spec`; "again" is one of those already made, so that a module may have several places."""
    kind, what = spec
    if kind == "again":
        return made[what % len(made)] if made else nn.Identity()
    if kind in ("sequential", "chain", "idle"):
        parts = [grow(each, made) for each in what]
        if kind == "sequential":
            module: nn.Module = nn.Sequential(*(p for part in parts for p in (part, First(part))))
        else:
            idle = parts[len(parts) // 2 :] if kind == "idle" and len(parts) > 1 else []
            module = Chain(parts[: len(parts) - len(idle)], idle)
    else:
        inner = LEAVES[what]()
        module = {"noted": Leaf, "tupled": Tupled}[kind](inner) if kind != "plain" else inner
    made.append(module)
    return module


def grown(spec: list[Spec], audit: Audit | None = None, training: bool = False) -> Chain:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: list[nn.Module] = []
        model = Chain([grow(each, made) for each in spec], [nn.Linear(WIDTH, WIDTH)])
        for module in model.modules():
            if isinstance(module, Noted):
                module.audit = audit
    return model.train(training)


def given_input() -> Tensor:
    """[batch, tokens, width]; new each time, since a module may change it in place."""
    return torch.linspace(-1, 2, 2 * 3 * WIDTH).sin().view(2, 3, WIDTH)


def run(model: nn.Module) -> Any:
    torch.manual_seed(1)  # dropout in training
    return model(given_input())


def quiet_run(model: nn.Module) -> Tensor:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return hidden(run(model)).clone()


def hooks_of(model: nn.Module) -> dict[Any, Any]:
    """Every table of hooks, in order, on modules, parameters and torch itself; and all that hangs on a module."""
    found: dict[Any, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name, "attributes"] = sorted(vars(module))
        for table, value in vars(module).items():
            if "hook" in table:
                items = list(value.items()) if isinstance(value, dict) else value
                found[name, table] = items
    for name, parameter in model.named_parameters():
        tables = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        found[name, "tensor hooks"] = [list(table.items()) if table else [] for table in tables]
        found[name, "flag"] = parameter.requires_grad
    for table, value in vars(torch_module).items():
        if table.startswith("_global_") and "hook" in table:
            found["torch", table] = list(value.items()) if isinstance(value, dict) else value
    return found
