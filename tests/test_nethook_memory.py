"""A capture over many batches holds nothing but what it was asked for, and what only looks builds no graph.

Figures are counts, not the process's memory: the bytes of every storage that torch still holds (from Python or from
a graph), and the tensors with a `grad_fn` that the garbage collector knows.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from editkit.nethook import Trace, requires_grad
from editkit.testing.tiny import SITES, build

BATCHES, FEWER, WARM = 200, 50, 20
IDS = torch.arange(2, 26).view(3, 8)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


class Meter(TorchDispatchMode):
    """Bytes of the storages made inside and still alive; `peak` is the most at any one operation.

    It sees each operation below autograd, and holds storages weakly, so that what only a graph keeps counts too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._given: dict[int, StorageWeakRef] = {}  # parameters and inputs; a weak reference keeps the key unique
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._given.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._given:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live())
        return result

    def live(self) -> int:
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        return sum(size for _, size in self._made.values())


def graph_tensors() -> int:
    """Tensors with a `grad_fn`, anywhere in the process."""
    return sum(isinstance(x, Tensor) and x.grad_fn is not None for x in gc.get_objects() if type(x) is Tensor)


def graph_nodes(loss: Tensor) -> int:
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


@contextmanager
def no_collection() -> Iterator[None]:
    """Reference counting alone has to free everything: what waits for the collector piles up between its runs."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def figures(batch: Callable[[], object], batches: int = BATCHES) -> list[tuple[int, int, int]]:
    """(graph tensors, bytes alive, peak bytes within the batch) after each batch."""
    found = []
    with no_collection(), Meter() as meter:
        for number in range(batches):
            meter.peak = 0
            batch()
            counted = graph_tensors() if number in (WARM - 1, batches - 1) else -1
            found.append((counted, meter.live(), meter.peak))
    return found


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    model: nn.Module = build("gpt2")
    return model


_BUILT: dict[str, nn.Module] = {}


def built(family: str) -> nn.Module:
    model: nn.Module = _BUILT.setdefault(family, build(family))
    return model


def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS, use_cache=False).logits
    return output


def sites_of(family: str) -> list[str]:
    names = SITES[family]
    return [s.format(i) for s in (names.block, names.attention, names.mlp) if s for i in range(2)]


@pytest.mark.cells
@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "gradients on"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_capture_over_many_batches_stays_flat(family: str, graph: bool) -> None:
    """The feature loop: each batch's last-token activations, used and dropped."""
    model, sites, latest = built(family), sites_of(family), {}

    def batch() -> None:
        with nullcontext() if graph else torch.no_grad():
            with Trace(model, sites, inputs=True, device="cpu", positions=-1) as t:
                logits(model)
            for site in t:
                latest[site] = (t[site].output, t[site].input)
                assert all(not x.requires_grad and x.grad_fn is None for x in latest[site])

    found = figures(batch)
    assert found[WARM - 1] == found[-1]
    assert len({live for _, live, _ in found[WARM - 1 :]}) == 1 and len({peak for *_, peak in found[WARM - 1 :]}) == 1
    assert found[-1][1] == 2 * len(sites) * 3 * 32 * 4  # inputs and outputs of 3 last tokens in float32, nothing else


@pytest.mark.parametrize("graph", [False, True], ids=["no_grad", "gradients on"])
def test_what_is_kept_grows_by_its_own_bytes_alone(gpt2: PreTrainedModel, graph: bool) -> None:
    kept = []

    def batch() -> None:
        with nullcontext() if graph else torch.no_grad():
            with Trace(gpt2, "transformer.h.1.mlp", device="cpu", positions=-1) as t:
                logits(gpt2)
            kept.append(t.output)

    found = figures(batch)
    assert found[-1][1] - found[WARM - 1][1] == (BATCHES - WARM) * 3 * 32 * 4
    assert found[-1][0] == found[WARM - 1][0]


def test_whole_traces_may_be_kept(gpt2: PreTrainedModel) -> None:
    """The Trace itself in a list holds what it captured, though gradients were on."""
    kept = []

    def batch() -> None:
        with Trace(gpt2, ["transformer.h.1.mlp", "transformer.h.2"], positions=-1, calls="all") as t:
            logits(gpt2)
        kept.append(t)

    found = figures(batch, FEWER)
    assert found[-1][1] - found[WARM - 1][1] == (FEWER - WARM) * 2 * 3 * 32 * 4
    assert found[-1][0] == found[WARM - 1][0]


@pytest.mark.parametrize("ends", ["cleanly", "by stop", "by an error"])
def test_gradients_and_errors_leave_nothing_alive(gpt2: PreTrainedModel, ends: str) -> None:
    """A captured gradient, an early stop and an error drop their graphs too."""
    sites = ["transformer.h.0", "transformer.h.1.mlp"]

    def fails(h: torch.Tensor) -> Any:
        raise ZeroDivisionError

    def batch() -> None:
        if ends == "cleanly":
            with Trace(gpt2, sites, grads=True, inputs=True, positions=-1) as t:
                logits(gpt2).pow(2).mean().backward()
            assert t[sites[0]].grad.shape == (3, 32)
            gpt2.zero_grad()
        elif ends == "by stop":
            with Trace(gpt2, sites, stop=True):
                logits(gpt2)
        else:
            try:
                with Trace(gpt2, sites, edit={sites[1]: fails}):
                    logits(gpt2)
            except ZeroDivisionError:
                pass

    found = figures(batch, FEWER)
    assert found[-1] == found[WARM - 1] and found[-1][1] == 0


@pytest.mark.parametrize(
    ("graph", "options"),
    [
        pytest.param(True, {"detach": False}, id="detach=False keeps the graph"),
        pytest.param(False, {}, id="no positions keeps every token"),
    ],
)
def test_the_meters_do_see_growth(gpt2: PreTrainedModel, graph: bool, options: dict[str, Any]) -> None:
    """The same loop done wrong: were the meters blind, the tests above would prove nothing."""
    kept = []

    def batch() -> None:
        with nullcontext() if graph else torch.no_grad():
            with Trace(gpt2, "transformer.h.1.mlp", **options) as t:
                logits(gpt2)
            kept.append(t.output)

    found = figures(batch, FEWER)
    rows = (FEWER - WARM) * 3 * 32 * 4
    grown = found[-1][1] - found[WARM - 1][1]
    assert grown > (20 if graph else 7) * rows
    assert (found[-1][0] > found[WARM - 1][0]) is graph


@pytest.mark.parametrize("family", SITES)
def test_looking_builds_no_graph(family: str) -> None:
    """With gradients on: the model's own graph, not one node more; without: none, and nothing saved for backward."""
    model, sites = built(family), sites_of(family)
    saved: list[Tensor] = []

    def save(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    plain = graph_nodes(logits(model))
    with Trace(model, sites, inputs=True, clone=True, positions=-1 if family != "opt" else None, calls="all") as t:
        looked = graph_nodes(logits(model))
    assert looked == plain > 0
    for call in (call for site in t for call in t[site].calls):
        assert not call.output.requires_grad and call.output.grad_fn is None
        assert not call.input.requires_grad and call.input.grad_fn is None
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda x: x),
        torch.no_grad(),
        Trace(model, sites, inputs=True),
    ):
        assert logits(model).grad_fn is None
    assert not saved


def test_looking_at_a_frozen_model_builds_no_graph(gpt2: PreTrainedModel) -> None:
    with requires_grad(gpt2, only=[]), Trace(gpt2, sites_of("gpt2"), inputs=True, edit=lambda h: 2 * h):
        assert not logits(gpt2).requires_grad


def test_a_gradient_that_is_kept_has_no_graph(gpt2: PreTrainedModel) -> None:
    with Trace(gpt2, "transformer.h.1.mlp", grads=True, edit_grad=lambda g: 2 * g) as t:
        loss = logits(gpt2).pow(2).mean()
    torch.autograd.grad(loss, gpt2.get_parameter("transformer.h.0.ln_1.weight"), create_graph=True)
    assert not t.grad.requires_grad and t.grad.grad_fn is None


def test_other_arguments_are_detached_too() -> None:
    """Bloom gives its MLP the residual as a second tensor, kept whole: its graph must not be."""
    model, kept = built("bloom"), []

    def batch() -> None:
        with Trace(model, SITES["bloom"].mlp_of(1), inputs=True, positions=-1) as t:
            logits(model)
        kept.append(t)

    found = figures(batch, FEWER)
    rows, residual = 2 * 3 * 32 * 4, 3 * 8 * 32 * 4
    assert found[-1][0] == found[WARM - 1][0]
    assert found[-1][1] - found[WARM - 1][1] == (FEWER - WARM) * (rows + residual)
