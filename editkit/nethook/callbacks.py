"""`Callbacks`: call functions at forward, backward and parameter-gradient events, and at the end of a step."""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn

from .names import HookError, NameNotFound, get_parameter, select, select_all
from .trace import Record, Trace

Kind = Literal["forward", "backward", "parameter", "step"]
KINDS: tuple[Kind, ...] = ("forward", "backward", "parameter", "step")


@dataclass(frozen=True)
class Event:
    """The argument of a callback."""

    kind: Kind  # forward: a site has run; backward: its output's gradient, parameter: a parameter's, has arrived; step
    site: str  # name of the module or parameter; "" when a step has ended
    step: int  # counted by Callbacks.steps()
    call: int  # number of the event for this site in this step, from 0
    tensor: Tensor | None = None  # the output, the gradient at the output, or the parameter's gradient; detached
    input: Tensor | None = None  # of a forward event, where add(..., inputs=True) asked for it
    stop: Callable[[str], None] = field(default=lambda why: None, repr=False)  # leave the body, with the reason


class _Stopped(Exception):
    """Leaves the body; caught by the Callbacks that raised it (its argument) and by no other."""


class _Listener(Trace):
    """A Trace that reports each capture and keeps none."""

    _lenient = True
    tell: Callable[[Kind, Record], None]

    def _ran(self, record: Record) -> None:
        self.tell("forward", record)
        record._earlier.clear()
        record._kept.clear()

    def _graded(self, record: Record) -> None:
        self.tell("backward", record)
        record._kept.clear()


class Callbacks:
    """Call functions while a model trains or infers.

        with Callbacks(model) as callbacks:
            flow = callbacks.add(GradientFlow(), "transformer.h.*", parameters="**.weight")
            callbacks.add(lambda event: print(event.site, event.tensor.norm()), "transformer.h.*.mlp")
            callbacks.add(Stop(after=100))
            for batch in callbacks.steps(batches):
                model(**batch).loss.backward()
                ...
        print(flow.first_bad)

    A callback is a function of an `Event`, or an object with any of the methods forward, backward, parameter and step.
    At each event the callbacks are called in the order in which they were added. They must not change tensors; for
    that, use Trace. Tensors are the model's own, detached: copy what you keep. Backward events come when a backward
    pass brings a gradient; under no_grad there are none. `steps` counts the steps, and ends each with a step event.

    An exception in a callback leaves the body like any other. As in Trace, a site that never ran is a HookError when
    the body ends normally, and on every exit all hooks are removed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.step = 0
        self.stopped: str | None = None  # the reason, once stop() was called
        self._open: dict[str, _Open] = {}

    def add(
        self,
        callback: Any,
        sites: str | Iterable[str] = (),
        *,
        on: Kind | Iterable[Kind] | None = None,
        parameters: str | Iterable[str] = (),
        inputs: bool = False,
        name: str | None = None,
    ) -> Any:
        """Call `callback` from now on; returns it.

        - `callback`: a function of an Event, or an object with methods named after kinds of event.
        - `sites`: names or patterns of modules, for forward and backward events.
        - `parameters`: names or patterns of parameters, for parameter events; frozen ones are left out. The events come
          from backward(), not from `torch.autograd.grad`.
        - `on`: kinds of event; by default those that an object has methods for, and "forward" for a function.
        - `inputs`: forward events have the site's input as well.
        - `name`: by default that of the function or class.

        Raises HookError for a name that is taken, an unknown kind, no sites, or parameters that are all frozen.
        """
        # 1) which function for which kind of event
        name = str(name or getattr(callback, "__name__", type(callback).__name__))
        if name in self._open:
            raise HookError(f"There is a callback '{name}' already: give this one another name=.")
        methods: list[Kind] = [kind for kind in KINDS if callable(getattr(callback, kind, None))]
        asked: Iterable[Kind] = (on,) if isinstance(on, str) else on or methods or ("forward",)
        kinds = list(asked)
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise HookError(f"Callback '{name}' was asked on {unknown}: the kinds are {', '.join(KINDS)}.")
        functions: dict[Kind, Any] = {kind: getattr(callback, kind) if methods else callback for kind in kinds}
        if not any(callable(function) for function in functions.values()):
            raise HookError(f"Callback '{name}' is a {type(callback).__name__}, which cannot be called.")
        watched = {"forward", "backward"} & set(functions)
        if watched and not sites and not (parameters or "step" in functions):
            raise HookError(f"Callback '{name}' was given no sites: name modules, or a pattern such as '**.mlp'.")
        # 2) its hooks; on an error none remains
        opened = _Open(self, functions, inputs)
        with ExitStack() as undo:
            undo.callback(opened.close)
            if watched and sites:
                opened.listen(select_all(self.model, sites))
            if parameters and "parameter" in functions:
                opened.watch([parameters] if isinstance(parameters, str) else parameters)
            undo.pop_all()
        self._open[name] = opened
        return callback

    def remove(self, name: str) -> None:
        """Stop calling the callback of that name, and remove its hooks."""
        if name not in self._open:
            raise NameNotFound(f"There is no callback '{name}': there are {', '.join(self._open) or '(none)'}.")
        self._open.pop(name).close()

    @property
    def names(self) -> list[str]:
        """Names of the callbacks, in the order of their calls."""
        return list(self._open)

    def steps(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches one by one; what the body does with one of them is a step."""
        for batch in batches:
            yield batch
            self.end_step()

    def end_step(self) -> None:
        """End a step: send step events and increase the count. `steps` does this itself."""
        for opened in list(self._open.values()):
            opened.tell("step", "")
            opened.calls.clear()
        self.step += 1

    def stop(self, why: str) -> None:
        """Leave the body now, within the current step. Callbacks call this as event.stop."""
        self.stopped = why
        raise _Stopped(self)

    def __enter__(self) -> "Callbacks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool | None:
        silent = {site for opened in self._open.values() for site in opened.silent()}
        for name in list(self._open):
            self.remove(name)
        if kind is None and silent:
            missing = ", ".join(f"'{site}'" for site in sorted(silent))
            raise HookError(f"Never ran while callbacks listened: {missing}. Run the model inside the body.")
        return isinstance(error, _Stopped) and error.args[0] is self


class _Open:
    """One callback with its hooks, from add() to remove()."""

    def __init__(self, owner: Callbacks, functions: dict[Kind, Callable[[Event], object]], inputs: bool) -> None:
        self.owner, self.functions, self.inputs = owner, functions, inputs
        self.calls: dict[tuple[str, str], int] = {}
        self.listener: _Listener | None = None
        self.handles: list[Any] = []

    def listen(self, sites: list[str]) -> None:
        outputs, grads = "forward" in self.functions, "backward" in self.functions
        self.listener = _Listener(self.owner.model, sites, inputs=self.inputs, outputs=outputs, grads=grads)
        self.listener.tell = self.heard
        self.listener._open()

    def watch(self, patterns: Iterable[str]) -> None:
        names = dict.fromkeys(n for one in patterns for n in select(self.owner.model, one, kind="parameter"))
        chosen = {name: get_parameter(self.owner.model, name) for name in names}
        trained = {name: p for name, p in chosen.items() if p.requires_grad}
        if not trained:
            raise HookError(f"None of {len(chosen)} chosen parameters requires a gradient: see requires_grad(model).")
        for name, parameter in trained.items():

            def arrived(p: Tensor, name: str = name) -> None:
                self.tell("parameter", name, p.grad)

            hooked: Any = parameter  # torch has no types for this call
            self.handles.append(hooked.register_post_accumulate_grad_hook(arrived))

    def heard(self, kind: Kind, record: Record) -> None:
        if kind == "forward":
            self.tell(kind, record.site, record._kept.get("output"), record._kept.get("input"))
        else:
            self.tell(kind, record.site, record._kept["grad"])

    def tell(self, kind: Kind, site: str, tensor: Tensor | None = None, given: Tensor | None = None) -> None:
        if kind in self.functions:
            call = self.calls[kind, site] = self.calls.get((kind, site), -1) + 1
            with torch.no_grad():
                self.functions[kind](Event(kind, site, self.owner.step, call, tensor, given, self.owner.stop))

    def silent(self) -> list[str]:
        return [site for site in self.listener.sites if site not in self.listener._records] if self.listener else []

    def close(self) -> None:
        if self.listener:
            self.listener._close()
        while self.handles:
            self.handles.pop().remove()


class ActivationStatistics:
    """Mean, standard deviation, range, share of zeros and number of non-finite values of each site's output.

    Over all calls; read them with `table()`.
    """

    def __init__(self) -> None:
        self._sites: dict[str, dict[str, float]] = {}

    def forward(self, event: Event) -> None:
        assert event.tensor is not None
        x = event.tensor.detach().float()
        finite = x[x.isfinite()]
        if not finite.numel():
            one: dict[str, float] = {
                "count": 0.0,
                "mean": 0.0,
                "m2": 0.0,
                "min": math.inf,
                "max": -math.inf,
                "zeros": 0.0,
            }
        else:
            variance, mean = torch.var_mean(finite, correction=0)
            values = torch.stack([mean, variance * finite.numel(), finite.min(), finite.max(), (finite == 0).sum()])
            one = dict(zip(("mean", "m2", "min", "max", "zeros"), values.tolist(), strict=True))
            one["count"] = finite.numel()
        one |= {"calls": 1, "nonfinite": x.numel() - finite.numel()}
        old = self._sites.get(event.site)
        self._sites[event.site] = one if old is None else _merged(old, one)

    def table(self) -> list[dict[str, Any]]:
        """A row for each site: site, calls, values, mean, std (population), min, max, zeros (share), nonfinite (count).

        `values` counts the finite values, which mean to zeros describe; these are NaN where there is none.
        """
        rows = []
        for site, one in self._sites.items():
            n = one["count"]
            shown = {"mean": one["mean"], "std": math.sqrt(one["m2"] / n) if n else 0.0}
            shown |= {"min": one["min"], "max": one["max"], "zeros": one["zeros"] / n if n else 0.0}
            shown = shown if n else dict.fromkeys(shown, math.nan)
            counts = {"calls": int(one["calls"]), "values": int(n)}
            rows.append({"site": site, **counts, **shown, "nonfinite": int(one["nonfinite"])})
        return rows


def _merged(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Statistics of two samples together (Chan, Golub and LeVeque 1983, equation 2.1), without cancellation."""
    n = a["count"] + b["count"]
    delta = b["mean"] - a["mean"]
    both = {key: a[key] + b[key] for key in ("count", "zeros", "calls", "nonfinite")}
    both["mean"] = a["mean"] + delta * b["count"] / n if n else 0.0
    both["m2"] = a["m2"] + b["m2"] + (delta**2 * a["count"] * b["count"] / n if n else 0.0)
    return both | {"min": min(a["min"], b["min"]), "max": max(a["max"], b["max"])}


@dataclass(frozen=True)
class Finding:
    """One gradient or output with a fault."""

    kind: Kind
    site: str
    step: int
    call: int
    fault: str  # "NaN", "Inf", "zero", "vanishing" or "exploding"
    rms: float  # root mean square of the tensor's values
    ratio: float  # to the first gradient of the same kind in the same step

    def __str__(self) -> str:
        what = {"forward": "output of", "backward": "gradient at", "parameter": "gradient of"}[self.kind]
        return f"step {self.step}: {what} '{self.site}' is {self.fault} (rms {self.rms:.2g}, ratio {self.ratio:.2g})"


class GradientFlow:
    """Where gradients first go wrong: NaN, Inf, zero, vanishing or exploding, by site.

    Outputs are checked for NaN and Inf, since most bad gradients begin there. Gradients are also checked for zeros, and
    their root mean square is compared with that of the first gradient of their kind in the step, which is nearest the
    loss; a ratio does not depend on the scale of the loss.

    - `vanishing`, `exploding`: a gradient's ratio is a fault below the one and above the other.
    - `on_bad`: "record" adds each fault to `findings`, in order; "warn" also warns of the first in a step; "raise"
      makes that one a HookError.
    """

    def __init__(
        self,
        vanishing: float = 1e-5,
        exploding: float = 1e5,
        on_bad: Literal["record", "warn", "raise"] = "record",
    ) -> None:
        if on_bad not in ("record", "warn", "raise"):
            raise HookError(f"on_bad={on_bad!r}: give 'record', 'warn' or 'raise'.")
        self.vanishing, self.exploding, self.on_bad = vanishing, exploding, on_bad
        self.findings: list[Finding] = []
        self._first: dict[Kind, float] = {}
        self._seen: dict[tuple[Kind, str], list[float]] = {}
        self._step, self._before_step = -1, 0

    @property
    def first_bad(self) -> Finding | None:
        """The first finding, or None."""
        return self.findings[0] if self.findings else None

    def forward(self, event: Event) -> None:
        self._check(event)

    def backward(self, event: Event) -> None:
        self._check(event)

    def parameter(self, event: Event) -> None:
        self._check(event)

    def table(self) -> list[dict[str, Any]]:
        """A row for each site and kind, in the order of their first events.

        site, kind, calls, rms_min, rms_mean and rms_max over the calls, and the faults.
        """
        rows = []
        for (kind, site), seen in self._seen.items():
            faults = sorted({f.fault for f in self.findings if (f.kind, f.site) == (kind, site)})
            rms = {"rms_min": min(seen), "rms_mean": sum(seen) / len(seen), "rms_max": max(seen)}
            rows.append({"site": site, "kind": kind, "calls": len(seen), **rms, "faults": faults})
        return rows

    def _check(self, event: Event) -> None:
        # 1) a new step: forget the first gradients
        if event.step != self._step:
            self._first, self._step, self._before_step = {}, event.step, len(self.findings)
        assert event.tensor is not None
        # 2) size, and its ratio to the first of its kind
        x = event.tensor.detach().float()
        rms, nan, inf = torch.stack([x.pow(2).mean().sqrt(), x.isnan().any(), x.isinf().any()]).tolist()
        self._seen.setdefault((event.kind, event.site), []).append(rms)
        first = self._first.setdefault(event.kind, rms) if math.isfinite(rms) and rms else self._first.get(event.kind)
        ratio = rms / first if first else math.nan
        # 3) the fault, if any
        fault = "NaN" if nan else "Inf" if inf else ""
        if not fault and event.kind != "forward":
            fault = "zero" if rms == 0 else "vanishing" if ratio < self.vanishing else ""
            fault = fault or ("exploding" if ratio > self.exploding else "")
        if fault:
            self.findings.append(Finding(event.kind, event.site, event.step, event.call, fault, rms, ratio))
            if len(self.findings) == self._before_step + 1 and self.on_bad != "record":
                if self.on_bad == "raise":
                    raise HookError(f"{self.findings[-1]}; it is the first bad one.")
                warnings.warn(str(self.findings[-1]), stacklevel=2)


class Progress:
    """Print the number of the step and the steps per second on one line of stderr.

    `total`: steps expected. `every`: seconds between updates. `file`: instead of stderr.
    """

    def __init__(self, total: int | None = None, every: float = 1.0, file: TextIO | None = None) -> None:
        self.total, self.every, self.file = total, every, file or sys.stderr
        self._began = self._shown = time.monotonic()

    def step(self, event: Event) -> None:
        now, done = time.monotonic(), event.step + 1
        last = done == self.total
        if now - self._shown >= self.every or last:
            of = f"/{self.total}" if self.total else ""
            rate = done / max(now - self._began, 1e-9)
            print(f"\rstep {done}{of}  {rate:.1f}/s", end="\n" if last else "", file=self.file, flush=True)
            self._shown = now


class Stop:
    """Leave the body after `after` steps, or at the first event for which `when` is true.

    `when` is called with the events chosen in Callbacks.add and at the end of each step.
    """

    def __init__(self, after: int | None = None, when: Callable[[Event], bool] | None = None) -> None:
        if (after is None) == (when is None):
            raise HookError("Stop takes a number of steps (after=) or a condition (when=), one of them.")
        self.after, self.when = after, when

    def forward(self, event: Event) -> None:
        if self.when and self.when(event):
            where = f" at '{event.site}'" if event.site else ""
            event.stop(f"the condition held in step {event.step}{where}")

    backward = parameter = forward

    def step(self, event: Event) -> None:
        if self.after is not None and event.step + 1 >= self.after:
            event.stop(f"{self.after} steps were done")
        self.forward(event)
