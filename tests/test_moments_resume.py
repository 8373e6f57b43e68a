"""Collections that are killed, interrupted, or asked for twice at once, in real processes."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from editkit.models.load import LanguageModel
from editkit.moments import cache as moments_cache
from editkit.moments import collect as moments_collect
from editkit.moments import second_moments
from editkit.moments.collect import Sums
from editkit.moments.moment import PARTIAL_FILE
from editkit.nethook import get_module
from editkit.settings import MomentSettings
from editkit.tensorfiles import read_header
from editkit.testing.tiny import tiny_lm

Interrupt = tuple[int, Callable[[], None]]  # batches that are kept, and what takes the interrupt away

KEYS = 12_800
SETTINGS = MomentSettings(tokens=KEYS, block=32)
BATCH = 64  # tokens a forward pass, so that there are 200 of them

# A server that has imported everything once, and forks real processes on demand.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_moments_resume"])


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """A job that a shell started in the background ignores SIGINT, and so would the tests that send it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_collect, "BATCH", BATCH)


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments_collect, "BATCH", BATCH)
        found = second_moments(
            tiny_lm("gpt2"), [0, 2], SETTINGS, progress=False, cache=tmp_path_factory.mktemp("whole")
        )
    return {layer: moment.digest for layer, moment in found.items()}


@contextlib.contextmanager
def forwards(lm: LanguageModel) -> Iterator[list[int]]:
    """How many forward passes the model makes meanwhile."""
    count: list[int] = []
    handle = lm.model.register_forward_pre_hook(lambda *_: count.append(1))
    yield count
    handle.remove()


def collect_and_save_each_batch(cache: Path) -> None:
    moments_collect.BATCH, moments_collect.SAVE_EVERY, moments_collect.SAVE_SHARE = BATCH, 0, 0
    second_moments(tiny_lm("gpt2"), [0, 2], SETTINGS, progress=False, cache=cache)


def killed_after(cache: Path, keys: int) -> int:
    """Start a collection in a process of its own and kill it once `keys` are saved; the number of saved keys."""
    process = PROCESSES.Process(target=collect_and_save_each_batch, args=(cache,))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for path in cache.rglob("*.partial"):
            if read_header(path, PARTIAL_FILE)["count"] >= keys:
                process.kill()
                process.join()
                assert process.exitcode == -signal.SIGKILL
                return int(read_header(path, PARTIAL_FILE)["count"])
        time.sleep(0.002)
    process.kill()
    raise AssertionError("nothing was saved within a minute")


def test_killed_twice_and_resumed_gives_the_digest_of_one_go(
    tmp_path: Path, in_one_go: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = killed_after(tmp_path, 1)
    second = killed_after(tmp_path, first + 640)
    assert 0 < first < second < KEYS
    assert list(tmp_path.rglob("*.lock")) and not list(tmp_path.rglob("*.safetensors"))
    (partial,) = tmp_path.rglob("*.partial")
    partial.with_name(f".{partial.name}.123.part").write_bytes(b"half")  # killed in a write
    lm = tiny_lm("gpt2")
    with forwards(lm) as count:
        resumed = second_moments(lm, [0, 2], SETTINGS, progress=True, cache=tmp_path)
    assert len(count) == (KEYS - second) / BATCH
    assert {layer: moment.digest for layer, moment in resumed.items()} == in_one_go
    assert "waiting" not in capsys.readouterr().err  # the dead process's lock is free
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert ".safetensors" in left and left <= {".safetensors", ".lock"}  # no .partial, no .part


def interrupt_in_forward(lm: LanguageModel, patch: pytest.MonkeyPatch) -> Interrupt:
    """Ctrl-C in the tenth forward pass."""
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGINT)

    handle = get_module(lm.model, "transformer.h.1").register_forward_hook(hook)
    return 9, handle.remove


def interrupt_between_sums(lm: LanguageModel, patch: pytest.MonkeyPatch) -> Interrupt:
    """Ctrl-C after one layer's sum has had the tenth batch and another's has not."""
    calls: list[int] = []
    add = Sums.add

    def added(self: Sums, module: str, k: torch.Tensor) -> None:
        add(self, module, k)
        calls.append(1)
        if len(calls) == 19:  # two layers a batch
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Sums, "add", added)
    return 10, lambda: None


@pytest.mark.parametrize("interrupt", [interrupt_in_forward, interrupt_between_sums])
def test_ctrl_c_keeps_what_was_collected(
    interrupt: Callable[[LanguageModel, pytest.MonkeyPatch], Interrupt], tmp_path: Path, in_one_go: dict[int, str]
) -> None:
    lm = tiny_lm("gpt2")
    with pytest.MonkeyPatch.context() as patch:
        batches, remove = interrupt(lm, patch)
        with pytest.raises(KeyboardInterrupt):
            second_moments(lm, [0, 2], SETTINGS, progress=False, cache=tmp_path)
        remove()
    (partial,) = tmp_path.rglob("*.partial")
    assert read_header(partial, PARTIAL_FILE)["count"] == batches * BATCH
    with forwards(lm) as count:
        resumed = second_moments(lm, [0, 2], SETTINGS, progress=False, cache=tmp_path)
    assert len(count) == 200 - batches
    assert {layer: moment.digest for layer, moment in resumed.items()} == in_one_go
    assert not list(tmp_path.rglob("*.part*"))


def test_a_killed_pass_serves_those_who_ask_for_less(
    tmp_path: Path, in_one_go: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("gpt2")
    _, remove = interrupt_in_forward(lm, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        second_moments(lm, [0, 2], SETTINGS, progress=False, cache=tmp_path)
    remove()
    for layer in (2, 0):
        with forwards(lm) as count:
            found = second_moments(lm, [layer], SETTINGS, progress=False, cache=tmp_path)
        assert len(count) == 200 - 9 and found[layer].digest == in_one_go[layer]
        assert len(list(tmp_path.rglob("*.partial"))) == (layer == 2)  # layer 0 still needs it after layer 2


def collect_with_others(cache: Path, layers: list[int], everyone: Any, told: Any) -> None:
    """One of several: logs that it collects, waits long enough for others to notice, and tells its digests."""
    real = moments_collect.collect

    def logged(*arguments: Any, **options: Any) -> Sums:
        with (cache / "log").open("a") as log:
            log.write("collected\n")
        time.sleep(2)
        return real(*arguments, **options)

    lm = tiny_lm("gpt2")
    everyone.wait()
    with (
        (cache / f"stderr-{os.getpid()}").open("w") as stderr,
        contextlib.redirect_stderr(stderr),
        mock.patch.object(moments_cache, "collect", logged),
    ):
        found = second_moments(lm, layers, MomentSettings(tokens=2000, block=32), cache=cache)
    told.put({layer: moment.digest for layer, moment in found.items()})


def test_processes_at_once_collect_once(tmp_path: Path) -> None:
    everyone, told = PROCESSES.Barrier(3), PROCESSES.SimpleQueue()
    asked = ([0, 1, 2], [2, 1, 0], [1, 2, 0])
    processes = [PROCESSES.Process(target=collect_with_others, args=(tmp_path, a, everyone, told)) for a in asked]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that waits for ever
    assert codes == [0, 0, 0]
    first, *others = (told.get() for _ in asked)
    assert sorted(first) == [0, 1, 2] and all(other == first for other in others)
    assert (tmp_path / "log").read_text() == "collected\n"
    notices = [path.read_text().count("another process collects") for path in tmp_path.glob("stderr-*")]
    assert sorted(notices) == [0, 1, 1]


def test_a_state_that_cannot_be_saved_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    monkeypatch.setattr(moments_collect, "SAVE_EVERY", 0)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.warns(UserWarning, match="would start again: .*No space left"):
        found = second_moments(lm, [0], MomentSettings(tokens=600, block=32), progress=False, cache=tmp_path)
    assert found[0].count >= 600 and torch.isfinite(found[0].matrix).all()
