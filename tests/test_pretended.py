"""The pretended accelerator refuses what CUDA refuses, counts what waits, computes what the CPU computes, and finds
planted faults; and how often the value's optimisation makes a GPU wait."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from editkit import Fact
from editkit.methods import get_method
from editkit.methods.rome import RomeSettings, rome, rome_each
from editkit.methods.shared.engine import Replayed
from editkit.methods.shared.value import READ_EVERY
from editkit.models.load import LanguageModel
from editkit.settings import MomentSettings
from editkit.testing.tiny import EXPERTS, tiny_lm
from tests import pretended

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large

DEVICE = "pretended:1"


@pytest.fixture(autouse=True)
def accelerator() -> Iterator[None]:
    with pretended.accelerator():
        yield


def here(*shape: int) -> Tensor:
    """Numbers on the accelerator."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to(DEVICE)


# What it refuses

SAME = "Expected all tensors to be on the same device"
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "elementwise": (lambda: here(3) + torch.ones(3), RuntimeError, SAME),
    "one number of one dimension": (lambda: here(3) * torch.ones(1), RuntimeError, SAME),
    "into the CPU": (lambda: torch.ones(3).add_(here(3)), RuntimeError, SAME),
    "a scalar of the accelerator": (lambda: torch.ones(3) * here(1)[0], RuntimeError, SAME),
    "two accelerators": (lambda: here(3) + here(3).to("pretended:0"), RuntimeError, SAME),
    "matrices": (lambda: here(2, 2) @ torch.ones(2, 2), RuntimeError, SAME),
    "a layer left behind": (lambda: nn.Linear(3, 2)(here(4, 3)), RuntimeError, SAME),
    "concatenation": (lambda: torch.cat((here(2), torch.ones(2))), RuntimeError, SAME),
    "an embedding's ids": (lambda: nn.Embedding(4, 2).to(DEVICE)(torch.tensor([1])), RuntimeError, SAME),
    "a mask": (lambda: here(3).masked_fill(torch.tensor([True, False, True]), 0.0), RuntimeError, SAME),
    "gathering": (lambda: here(2, 2).gather(1, torch.tensor([[0], [1]])), RuntimeError, SAME),
    "summing by index": (lambda: here(3).index_add(0, torch.tensor([0]), here(1)), RuntimeError, SAME),
    "indices of an accelerator": (
        lambda: torch.ones(3)[here(1).long()],
        RuntimeError,
        "indices should be either on cpu",
    ),
    "indices of another": (lambda: here(3)[here(1).long().to("pretended:0")], RuntimeError, "indices should be"),
    "values at indices": (lambda: here(3).index_put_((here(2).long(),), torch.ones(2)), RuntimeError, SAME),
    "numpy": (lambda: here(3).numpy(), TypeError, "can't convert pretended:1 device type tensor to numpy"),
    "an array": (lambda: numpy.asarray(here(3)), TypeError, "Use Tensor.cpu"),
    "pinning": (lambda: here(3).pin_memory(), RuntimeError, "cannot pin"),
    "a generator of the CPU": (
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
        RuntimeError,
        "'pretended' device type for generator",
    ),
    "a device there is not": (lambda: torch.ones(3, device="pretended:2"), RuntimeError, "invalid device ordinal"),
    "data of the CPU": (lambda: setattr(here(3), "data", torch.ones(3)), RuntimeError, "incompatible tensor type"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses_what_cuda_refuses(what: str) -> None:
    act, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        act()


ALLOWED: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
    "a scalar of the CPU": (lambda: torch.tensor(2.0) * here(2), [2.0, 4.0]),
    "a scalar where": (lambda: torch.where(here(2) > 1, here(2), torch.tensor(0.0)), [0.0, 2.0]),
    "indices of the CPU": (lambda: here(3)[torch.tensor([2, 0])], [3.0, 1.0]),
    "a list as index": (lambda: here(3)[[2, 0]], [3.0, 1.0]),
    "copies between devices": (lambda: here(2).copy_(torch.tensor([5.0, 6.0])), [5.0, 6.0]),
    "a slice written": (lambda: _written(here(3)), [1.0, 9.0, 9.0]),
    "a mask of its own": (lambda: here(3)[here(3) > 1], [2.0, 3.0]),
    "a result given": (lambda: torch.add(here(2), 1.0, out=here(2)), [2.0, 3.0]),
    "a range": (lambda: torch.arange(1.0, 3.0, device=DEVICE), [1.0, 2.0]),
}


def _written(tensor: Tensor) -> Tensor:
    tensor[1:] = 9.0  # through a view
    return tensor


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", ALLOWED)
def test_it_allows_what_cuda_allows(what: str, inference: bool) -> None:
    act, values = ALLOWED[what]
    with torch.inference_mode(inference):
        found = act()
        assert str(found.device) == DEVICE and found.tolist() == values


def test_gradients_flow_on_both_devices_and_modules_keep_their_ties() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    cpu = nn.Sequential(first, nn.SiLU(), second)
    x = torch.randn(4, 3)
    cpu(x).square().sum().backward()
    wanted, weight = first.weight.grad, first.weight
    assert wanted is not None
    first.weight.grad = None
    for device in ("pretended:0", DEVICE):
        net = cpu.to(device)
        assert first.weight is weight is second.weight and str(weight.device) == device
        net(x.to(device)).square().sum().backward()
        assert weight.grad is not None and str(weight.grad.device) == device
        assert torch.equal(weight.grad.cpu(), wanted)
        weight.grad = None


def test_complex_numbers_and_their_conjugates_are_the_cpus() -> None:
    """Rotary embeddings of DeepSeek-V2 are products of complex numbers."""
    torch.manual_seed(0)
    there = torch.randn(3, dtype=torch.complex64)
    gradients = []
    for device in ("cpu", DEVICE):
        z = there.to(device, copy=True).requires_grad_()
        torch.view_as_real(z * z.detach().conj()).square().sum().backward()
        assert z.grad is not None
        gradients.append(z.grad.cpu())
    assert torch.equal(*gradients)


def test_a_view_of_a_plain_tensor_is_plain_in_inference_mode() -> None:
    weight = here(3)
    with torch.inference_mode():
        view, new = weight[1:], weight + 1
    assert (view.is_inference(), new.is_inference()) == (False, True)


def test_the_cpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(torch.ones(2) + 1) is Tensor and torch.tensor([1.0]).numpy().tolist() == [1.0]
    assert torch.accelerator.is_available() and torch.get_device_module("pretended").device_count() == 2
    monkeypatch.setattr(pretended, "_open", [])  # as outside of the body
    assert not torch.accelerator.is_available() and torch.get_device_module("pretended").device_count() == 0


# What waits

WAITS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "item": (lambda: here(1).item(), ["read"]),
    "bool": (lambda: bool(here(1) > 0), ["read"]),
    "float": (lambda: float(here(1)), ["read"]),
    "a formatted number": (lambda: f"{here(1).sum():.1f}", ["read"]),
    "tolist": (lambda: here(3).tolist(), ["down"]),
    "cpu": (lambda: here(3).cpu(), ["down"]),
    "to another accelerator": (lambda: here(3).to("pretended:0"), ["down"]),
    "nonzero": (lambda: here(3).nonzero(), ["read"]),
    "a mask": (lambda: here(3)[here(3) > 1], ["read"]),
    "equal": (lambda: torch.equal(here(3), here(3)), ["read"]),
    "repeats": (lambda: here(3).repeat_interleave(here(3).long()), ["read"]),
    "indices of the CPU": (lambda: here(3)[torch.tensor([0])], ["up"]),
    "a list as index": (lambda: here(3)[[0, 1]], ["up"]),
    "a tensor made": (lambda: torch.tensor([1.0], device=DEVICE), ["up"]),
    "a copy that need not": (lambda: here(3).to("cpu", non_blocking=True), []),
    "arithmetic": (lambda: here(3).softmax(-1).argmax(), []),
    "a slice and a number": (lambda: here(3)[1:] * 2 + here(3)[0], []),
    "zeros": (lambda: torch.zeros(3, device=DEVICE), []),
    "a histogram of integers": (lambda: torch.histc(here(3).int(), bins=3, min=1, max=3), []),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", WAITS)
def test_waits_are_counted_with_their_place(what: str, inference: bool) -> None:
    act, kinds = WAITS[what]
    ready = pytest.MonkeyPatch()
    numbers = {shape: here(*shape) for shape in ((1,), (3,))}  # their own copies to the device do not count
    ready.setitem(globals(), "here", lambda *shape: numbers[shape])
    try:
        with torch.inference_mode(inference), pretended.waits() as found:
            act()
    finally:
        ready.undo()
    assert [wait.kind for wait in found] == kinds
    assert all(wait.place.startswith("test_pretended.py:") for wait in found)


# The value's optimisation

FACTS = [Fact("The capital of {} is", "France", "Rome"), Fact("The capital of {} is", "Spain", "Rome")]  # one batch
VALUE: dict[str, Any] = {"clamp": 4.0, "stop_loss": 0.0}
OF_SOLVER: dict[str, dict[str, Any]] = {"adam": {"lr": 0.1, "weight_decay": 0.1}, "descent": {}}
EVERY = READ_EVERY.get("pretended", READ_EVERY["cuda"])  # steps between two looks at the losses


def waits_of(lm: LanguageModel, method: str, steps: int, solver: str = "adam") -> "Counter[tuple[str, str]]":
    """The waits of an edit whose value takes this many steps, by kind and place."""
    asked: dict[str, Any] = VALUE | OF_SOLVER[solver] | {"steps": steps, "solver": solver}
    options: dict[str, Any] = {
        "moments": MomentSettings(enabled=False),
        "contexts": ["{}", "So. {}"],
        "progress": False,
    }
    with pretended.waits() as found:
        if method == "rome":
            rome_each(lm, FACTS, RomeSettings(layer=1, **asked), **options)
        else:
            settings = replace(get_method(method).settings(), layers=[1], **asked)  # type: ignore[call-arg]
            get_method(method)(lm, FACTS, settings, **options)
    return Counter((wait.kind, wait.place) for wait in found)


def between(lm: LanguageModel, method: str, fewer: int, more: int, solver: str = "adam") -> "Counter[Any]":
    """What `more` steps wait beyond `fewer`: everything before and after the loop cancels out."""
    return waits_of(lm, method, more, solver) - waits_of(lm, method, fewer, solver)


def assert_no_wait_per_step(lm: LanguageModel, method: str, solver: str = "adam") -> None:
    """Two more steps between the same looks cost no wait."""
    extra = between(lm, method, EVERY + 1, EVERY + 3, solver)
    assert not extra, f"each step waits: {dict(extra)}"


@pytest.mark.cells
@pytest.mark.parametrize("solver", OF_SOLVER)
@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "rome"), ("gemma2", "rome"), ("llama", "memit"), ("gpt2", "pmet"), *((each, "rome") for each in EXPERTS)],
)
def test_the_value_loop_waits_once_at_each_look_and_at_no_step(family: str, method: str, solver: str) -> None:
    lm = tiny_lm(family)
    lm.model.to(DEVICE)  # pyright: ignore[reportArgumentType]
    assert_no_wait_per_step(lm, method, solver)
    looks = between(lm, method, EVERY + 1, 3 * EVERY + 1, solver)
    assert looks.total() == 2, dict(looks)


def test_descent_takes_the_cpus_steps() -> None:
    settings = RomeSettings(layer=1, steps=8, solver="descent")
    options: dict[str, Any] = {"moments": MomentSettings(enabled=False), "contexts": ["{}"], "progress": False}
    lm = tiny_lm("gpt2")
    lm.model.to(DEVICE)  # pyright: ignore[reportArgumentType]
    with pretended.same_kernels():
        assert (
            rome(lm, FACTS[0], settings, **options).digest
            == rome(tiny_lm("gpt2"), FACTS[0], settings, **options).digest
        )


# Planted faults


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Tensor], Any]) -> LanguageModel:
    """A model on the accelerator, with `fault` in every step of the value's optimisation, and what it returns added."""
    sound = Replayed.logits
    monkeypatch.setattr(Replayed, "logits", lambda self, delta: _plus(sound(self, delta), fault))
    lm = tiny_lm("gpt2")
    lm.model.to(DEVICE)  # pyright: ignore[reportArgumentType]
    return lm


def _plus(logits: Tensor, fault: Callable[[Tensor], Any]) -> Tensor:
    found: Tensor = logits + fault(logits)
    return found


def test_a_tensor_left_on_the_cpu_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = planted(monkeypatch, lambda logits: torch.zeros(logits.shape[-1]))
    with pytest.raises(RuntimeError, match=f"{SAME}, but found at least two devices, cpu and pretended:1"):
        waits_of(lm, "rome", 2)


def test_a_numpy_call_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = planted(monkeypatch, lambda logits: float(logits.detach().numpy().max()) * 0)
    with pytest.raises(TypeError, match="can't convert pretended:1 device type tensor to numpy"):
        waits_of(lm, "rome", 2)


def test_a_hidden_item_in_the_loop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = planted(monkeypatch, lambda logits: logits.max().item() * 0)
    with pytest.raises(AssertionError, match=r"each step waits: .*'read', 'test_pretended.py:"):
        assert_no_wait_per_step(lm, "rome")


def test_the_faults_go_unseen_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why there is a pretended accelerator."""
    for fault in (lambda logits: torch.zeros(logits.shape[-1]), lambda logits: logits.detach().numpy().max() * 0):
        with monkeypatch.context() as patch:
            planted(patch, fault)
            options: dict[str, Any] = {"contexts": ["{}"], "progress": False}
            rome(
                tiny_lm("gpt2"),
                FACTS[0],
                RomeSettings(layer=1, steps=1, **VALUE, **OF_SOLVER["adam"]),
                moments=MomentSettings(enabled=False),
                **options,
            )
