"""Callbacks: events in order, in training and in inference; statistics, gradient flow, progress and stop."""

import io
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from editkit.nethook import (
    ActivationStatistics,
    Callbacks,
    GradientFlow,
    HookError,
    NameNotFound,
    Progress,
    Stop,
    Trace,
)
from editkit.testing.tiny import SITES, build
from tests.hooking import IDS, gradients, logits, loss_of

BLOCKS = [f"transformer.h.{i}" for i in range(3)]


def every_hook(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = [len(getattr(m, kind)) for m in model.modules() for kind in kinds]
    return on_modules + [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]


@pytest.fixture
def fresh() -> Iterator[PreTrainedModel]:
    model = build("gpt2")
    before = every_hook(model)
    yield model
    assert every_hook(model) == before


@pytest.mark.parametrize("family", SITES)
def test_events_come_in_order_and_equal_a_trace(family: str) -> None:
    model = build(family)
    blocks = [SITES[family].block.format(i) for i in range(2)]
    with Trace(model, blocks, grads=True) as trace:
        loss_of(logits(model)).backward()
    parameter = next(n for n, p in model.named_parameters() if n.startswith(blocks[0]) and p.ndim == 2)
    grad = model.get_parameter(parameter).grad
    assert grad is not None
    wanted = grad.clone()
    model.zero_grad()
    events: list[Any] = []
    with Callbacks(model) as callbacks:
        callbacks.add(events.append, blocks, on=["forward", "backward", "parameter"], parameters=parameter)
        loss_of(logits(model)).backward()
    assert [(e.kind, e.site) for e in events] == [
        ("forward", blocks[0]),
        ("forward", blocks[1]),
        ("backward", blocks[1]),
        ("backward", blocks[0]),
        ("parameter", parameter),
    ]
    for event in events[:2]:
        assert torch.equal(event.tensor, trace[event.site].output)
        assert not event.tensor.requires_grad
    for event in events[2:4]:
        assert torch.equal(event.tensor, trace[event.site].grad)
    assert torch.equal(events[4].tensor, wanted)
    assert not any(every_hook(model))


def test_callbacks_are_called_in_the_order_added(fresh: PreTrainedModel) -> None:
    heard: list[Any] = []
    with Callbacks(fresh) as callbacks:
        for name in "abc":
            callbacks.add(
                lambda e, name=name: heard.append((e.kind, name)), BLOCKS[1], on=["forward", "backward"], name=name
            )
        assert callbacks.names == ["a", "b", "c"]
        callbacks.remove("b")
        loss_of(logits(fresh)).backward()
    assert heard == [("forward", "a"), ("forward", "c"), ("backward", "a"), ("backward", "c")]


def test_steps_and_calls_are_counted(fresh: PreTrainedModel) -> None:
    heard: list[Any] = []
    with Callbacks(fresh) as callbacks:
        callbacks.add(lambda e: heard.append((e.kind, e.step, e.call)), BLOCKS[0], on=["forward", "step"], name="x")
        for batch in callbacks.steps([IDS, IDS]):
            fresh(batch)
            fresh(batch)
    assert heard == [
        *[("forward", 0, 0), ("forward", 0, 1), ("step", 0, 0)],
        *[("forward", 1, 0), ("forward", 1, 1), ("step", 1, 0)],
    ]


def test_inference_has_forward_events_alone(fresh: PreTrainedModel) -> None:
    heard: list[Any] = []
    with Callbacks(fresh) as callbacks:
        callbacks.add(lambda e: heard.append((e.kind, e.call)), BLOCKS[0], on=["forward", "backward"], name="x")
        cast(Any, fresh).generate(IDS, max_new_tokens=3, do_sample=False)
    assert heard == [("forward", 0), ("forward", 1), ("forward", 2)]


def test_inputs_are_given_on_request(fresh: PreTrainedModel) -> None:
    with Trace(fresh, BLOCKS[1], inputs=True) as trace:
        fresh(IDS)
    heard: list[Any] = []
    with Callbacks(fresh) as callbacks:
        callbacks.add(heard.append, BLOCKS[1], inputs=True)
        fresh(IDS)
    assert torch.equal(heard[0].input, trace.input)


def test_looking_changes_neither_logits_nor_gradients(fresh: PreTrainedModel) -> None:
    loss_of(logits(fresh)).backward()
    wanted = gradients(fresh)
    fresh.zero_grad()
    with Callbacks(fresh) as callbacks:
        callbacks.add(ActivationStatistics(), "transformer.h.*")
        callbacks.add(GradientFlow(), "**.mlp", parameters="**")
        loss_of(logits(fresh)).backward()
    found = gradients(fresh)
    assert found.keys() == wanted.keys() == dict(fresh.named_parameters()).keys()
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())


def test_nothing_is_kept(fresh: PreTrainedModel) -> None:
    with Callbacks(fresh) as callbacks:
        callbacks.add(lambda e: None, "transformer.h.*", on=["forward", "backward"], inputs=True, name="x")
        for batch in callbacks.steps([IDS] * 3):
            loss_of(logits(fresh, batch)).backward()
        listener = callbacks._open["x"].listener
        assert listener is not None and all(not r._kept and not r._earlier for r in listener._records.values())


def test_frozen_parameters_are_left_out(fresh: PreTrainedModel) -> None:
    fresh.requires_grad_(False)
    fresh.get_parameter("transformer.h.1.mlp.c_proj.weight").requires_grad_(True)
    heard: list[Any] = []
    with Callbacks(fresh) as callbacks:
        callbacks.add(
            lambda e: heard.append(e.site), on="parameter", parameters="transformer.h.*.mlp.*.weight", name="x"
        )
        with pytest.raises(HookError, match="None of 1 chosen parameters requires a gradient"):
            callbacks.add(print, on="parameter", parameters="lm_head.weight", name="y")
        loss_of(logits(fresh)).backward()
    assert heard == ["transformer.h.1.mlp.c_proj.weight"]


def test_v16_autograd_grad_fires_no_parameter_event(fresh: PreTrainedModel) -> None:
    heard: list[Any] = []
    weight = fresh.get_parameter("transformer.h.0.mlp.c_proj.weight")
    with Callbacks(fresh) as callbacks:
        callbacks.add(heard.append, on="parameter", parameters="transformer.h.0.mlp.c_proj.weight", name="x")
        torch.autograd.grad(loss_of(logits(fresh)), weight)
        assert heard == []
        loss_of(logits(fresh)).backward()
        assert len(heard) == 1


def test_statistics_equal_those_of_all_values_at_once(fresh: PreTrainedModel) -> None:
    batches = [IDS, IDS + 3, IDS.flip(1)[:, :4]]
    outputs = []
    with Callbacks(fresh) as callbacks:
        stats = callbacks.add(ActivationStatistics(), "transformer.h.*.mlp.act")
        callbacks.add(lambda e: outputs.append(e.tensor.relu().clone()), "transformer.h.1.mlp.act", name="keep")
        with Trace(fresh, "transformer.h.1.mlp.act", edit=torch.relu, outputs=False):
            for batch in callbacks.steps(batches):
                fresh(batch)
    x = torch.cat([o.flatten() for o in outputs]).double()
    row = stats.table()[1]
    assert row["site"] == "transformer.h.1.mlp.act"
    assert (row["calls"], row["values"], row["nonfinite"]) == (3, x.numel(), 0)
    assert row["mean"] == pytest.approx(x.mean().item(), rel=1e-5)
    assert row["std"] == pytest.approx(x.std(correction=0).item(), rel=1e-5)
    assert (row["min"], row["max"]) == pytest.approx((x.min().item(), x.max().item()))
    assert row["zeros"] == pytest.approx((x == 0).double().mean().item())
    assert 0.2 < row["zeros"] < 0.8


def test_statistics_count_what_is_not_finite() -> None:
    net = nn.Sequential(nn.Identity())
    with Callbacks(net) as callbacks:
        stats = callbacks.add(ActivationStatistics(), "0")
        net(torch.tensor([1.0, math.nan, math.inf, 3.0]))
        net(torch.full((2,), math.nan))
    (row,) = stats.table()
    assert (row["values"], row["nonfinite"], row["mean"], row["std"], row["calls"]) == (2, 4, 2.0, 1.0, 2)


class Scale(nn.Module):
    """Passes values on; multiplies gradients by `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x = x.clone()
            x.register_hook(lambda g: g * self.factor)
        return x.clone()


def flow_through(
    faulty: nn.Module, on_bad: Literal["record", "warn", "raise"] = "record", **options: Any
) -> GradientFlow:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), faulty, nn.Linear(4, 4))
    with Callbacks(net) as callbacks:
        flow: GradientFlow = callbacks.add(
            GradientFlow(on_bad=on_bad, **options), ["0", "1", "2", "3"], parameters="*.weight"
        )
        for batch in callbacks.steps([torch.ones(2, 4)] * 2):
            net(batch).pow(2).sum().backward()
            net.zero_grad()
    return flow


@pytest.mark.parametrize(
    ("factor", "fault"),
    [(math.nan, "NaN"), (math.inf, "Inf"), (0.0, "zero"), (1e-7, "vanishing"), (1e7, "exploding")],
)
def test_the_first_bad_gradient_is_named(factor: float, fault: str) -> None:
    flow = flow_through(Scale(factor))
    first = flow.first_bad
    # The scale sits before site 2's output, so site 1's output is the first whose gradient is bad.
    assert first is not None and (first.kind, first.site, first.step, first.fault) == ("backward", "1", 0, fault)
    assert str(first).startswith(f"step 0: gradient at '1' is {fault}")
    assert {f.site for f in flow.findings} == {"0", "1", "0.weight", "1.weight"}
    faults = {(row["site"], row["kind"]): row["faults"] for row in flow.table()}
    assert faults["3", "backward"] == faults["3.weight", "parameter"] == []
    assert faults["1", "backward"] == [fault]
    assert all(row["calls"] == 2 for row in flow.table())


def test_a_healthy_model_has_no_finding(fresh: PreTrainedModel) -> None:
    with Callbacks(fresh) as callbacks:
        flow: GradientFlow = callbacks.add(
            GradientFlow(on_bad="raise"), "transformer.h.*", parameters="transformer.h.*.**.weight"
        )
        for scale in callbacks.steps([1.0, 1e-12]):  # the scale of the loss does not matter
            (scale * loss_of(logits(fresh))).backward()
            fresh.zero_grad()
    assert flow.first_bad is None
    assert len(flow.table()) > 10


def test_a_bad_value_is_named_where_it_begins() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sub(100).log()

    first = flow_through(Log()).first_bad
    assert first is not None and (first.kind, first.site, first.fault) == ("forward", "2", "NaN")


def test_bad_gradients_raise_or_warn_on_request() -> None:
    with pytest.raises(HookError, match="gradient at '1' is zero .* the first bad one"):
        flow_through(Scale(0.0), on_bad="raise")
    with pytest.warns(UserWarning, match="gradient at '1' is zero") as warned:
        flow_through(Scale(0.0), on_bad="warn")
    assert len(warned) == 2  # one a step
    with pytest.raises(HookError, match="on_bad='scream'"):
        GradientFlow(on_bad=cast(Any, "scream"))


@pytest.mark.parametrize("kind", ["forward", "backward", "parameter", "step"])
def test_stop_leaves_the_body(fresh: PreTrainedModel, kind: str) -> None:
    after = []
    with Callbacks(fresh) as callbacks:
        callbacks.add(
            Stop(when=lambda e: e.step == 1 and e.kind == kind),
            BLOCKS[1],
            parameters="lm_head.weight",
            on=cast(Any, kind),
        )
        for batch in callbacks.steps([IDS] * 3):
            loss_of(logits(fresh, batch)).backward()
        after.append("not reached")
    assert not after
    assert callbacks.step == 1
    assert callbacks.stopped is not None and callbacks.stopped.startswith("the condition held in step 1")


def test_stop_after_steps(fresh: PreTrainedModel) -> None:
    with Callbacks(fresh) as callbacks:
        callbacks.add(Stop(after=2))
        for batch in callbacks.steps([IDS] * 5):
            fresh(batch)
    assert callbacks.stopped == "2 steps were done"
    with pytest.raises(HookError, match="one of them"):
        Stop()


def test_only_its_own_stop_is_caught(fresh: PreTrainedModel) -> None:
    with Callbacks(fresh) as outer:
        outer.add(Stop(when=lambda e: True), BLOCKS[2])
        with Callbacks(fresh) as inner:
            inner.add(lambda e: None, BLOCKS[0], name="x")
            fresh(IDS)
        pytest.fail("the outer body went on")
    assert outer.stopped
    assert inner.stopped is None


def test_progress_says_step_and_speed(fresh: PreTrainedModel) -> None:
    out = io.StringIO()
    with Callbacks(fresh) as callbacks:
        callbacks.add(Progress(total=3, every=0, file=out))
        for batch in callbacks.steps([IDS] * 3):
            fresh(batch)
    lines = out.getvalue().split("\r")[1:]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert out.getvalue().endswith("/s\n")


def test_exceptions_in_a_callback_leave_no_hook(fresh: PreTrainedModel) -> None:
    def fail(event: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Callbacks(fresh) as callbacks:
        callbacks.add(fail, BLOCKS, on="backward", parameters="**.weight")
        loss_of(logits(fresh)).backward()


def test_a_site_that_never_runs(fresh: PreTrainedModel) -> None:
    with pytest.raises(HookError, match="Never ran while callbacks listened: 'transformer.h.1'"), Callbacks(fresh) as c:
        c.add(lambda e: None, BLOCKS[1], name="x")


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (lambda c: c.add(print), "was given no sites"),
        (lambda c: c.add(print, BLOCKS, on="sideways"), "the kinds are forward, backward, parameter, step"),
        (lambda c: c.add(3, BLOCKS), "which cannot be called"),
        (lambda c: c.add(print, "transformer.h.9"), "has no module 'transformer.h.9'"),
        (lambda c: c.add(print, BLOCKS, on="parameter", parameters="*.wait"), "matches '*.wait'"),
        (lambda c: c.add(print, BLOCKS, name="taken"), "a callback 'taken' already"),
        (lambda c: c.remove("x"), "no callback 'x': there are taken"),
    ],
)
def test_refusals(fresh: PreTrainedModel, ask: Callable[[Callbacks], object], wanted: str) -> None:
    with Callbacks(fresh) as callbacks:
        callbacks.add(lambda e: None, BLOCKS, name="taken")
        hooks = every_hook(fresh)
        with pytest.raises((HookError, NameNotFound)) as error:
            ask(callbacks)
        assert wanted in str(error.value)
        assert every_hook(fresh) == hooks
        assert callbacks.names == ["taken"]
        fresh(IDS)
