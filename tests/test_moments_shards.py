"""Collections shared between real processes: gloo groups and arrays of jobs, killed, resumed, refused."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from editkit.errors import ConfigError, EditkitError
from editkit.moments import SecondMoment, Share, collect_share, collect_together, second_moments
from editkit.moments import collect as moments_collect
from editkit.moments.__main__ import main
from editkit.moments.collect import Sums
from editkit.moments.group import Group
from editkit.moments.moment import SHARD_FILE
from editkit.settings import MomentSettings
from editkit.start import _LAUNCHED
from editkit.tensorfiles import read_header
from editkit.testing.tiny import tiny_lm
from tests.test_start import lean

pytestmark = pytest.mark.filterwarnings("ignore:The second moment at")  # few tokens are read

BATCH = 64  # tokens a forward pass
SETTINGS = MomentSettings(tokens=1500, block=32)  # 24 passes: shares of 12, or of 8, or of 5, 5, 5, 5 and 4
LAYERS = {"gpt2": [0, 2], "llama": [1], "qwen2_moe": [0, 1]}  # block 0 of the last is dense, the others are experts

# A server that has imported everything once, and forks real processes on demand.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.test_moments_shards"])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("editkit.moments.collect.BATCH", BATCH)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, SecondMoment]]:
    """What one process collects, by family and layer."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("editkit.moments.collect.BATCH", BATCH)
        return {
            family: second_moments(
                tiny_lm(family), layers, SETTINGS, progress=False, cache=tmp_path_factory.mktemp(family)
            )
            for family, layers in LAYERS.items()
        }


def assert_equal(found: dict[int, SecondMoment], wanted: dict[int, SecondMoment]) -> None:
    """The same keys; C within 1e-6, and in fact within a few of float64's roundings."""
    assert found.keys() == wanted.keys()
    for layer, moment in found.items():
        one = wanted[layer]
        assert (moment.count, moment.routed, moment.source) == (one.count, one.routed, one.source)
        assert moment.effective_count == pytest.approx(one.effective_count, rel=1e-12)
        assert (moment.matrix - one.matrix).abs().max() <= 1e-14 * one.matrix.abs().max()
        assert torch.equal(moment.matrix, moment.matrix.mT)


def one_of_a_group(place: dict[str, int | str], family: str, cache: Path, options: dict[str, Any], told: Any) -> None:
    """A process of a gloo group: collects, saves after each batch, and tells its digests or its error.

    `place`: what torchrun puts into the environment.
    `options`: `each`, seconds that process 1 takes longer for a batch; `timeout`, minutes; `seed`, of process 1's text.
    """
    os.environ.update({name: str(value) for name, value in place.items()})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    moments_collect.BATCH, moments_collect.SAVE_EVERY, moments_collect.SAVE_SHARE = BATCH, 0, 0
    group = Group(timeout=options.get("timeout", 1))
    rank = group.rank
    total, each = group.total, options.get("each", 0) if rank == 1 else 0

    def slowly(count: int) -> int:
        time.sleep(each)
        return total(count)

    group.total = slowly  # type: ignore[method-assign]
    seed = options.get("seed", 0) if rank == 1 else 0
    try:
        found = collect_together(
            tiny_lm(family), LAYERS[family], SETTINGS, group=group, seed=seed, progress=False, cache=cache
        )
        told.put((rank, {layer: moment.digest for layer, moment in found.items()}))
    except (EditkitError, KeyboardInterrupt) as error:
        told.put((rank, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None


class Running:
    """The processes of a gloo group."""

    def __init__(self, size: int, family: str, cache: Path, **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.told = PROCESSES.SimpleQueue()
        place = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes: list[BaseProcess] = [
            PROCESSES.Process(target=one_of_a_group, args=(place | {"RANK": rank}, family, cache, options, self.told))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def ended(self) -> dict[int, Any]:
        """What each process told, once all have ended."""
        for process in self.processes:
            process.join(60)
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, "a process waits for ever"
        found = {}
        while not self.told.empty():
            rank, what = self.told.get()
            found[rank] = what
        return found


def counts(cache: Path) -> dict[tuple[int, int], int]:
    """Share → keys in its file."""
    headers = [read_header(path, SHARD_FILE) for path in cache.rglob("*.shard")]
    return {tuple(header["share"]): header["count"] for header in headers}


def wait_for(cache: Path, rank: int, keys: int) -> None:
    """Wait until process `rank` has saved `keys`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(share[0] == rank and count >= keys for share, count in counts(cache).items()):
            return
        time.sleep(0.002)
    raise AssertionError("nothing was saved within a minute")


@pytest.mark.parametrize("family", LAYERS)
def test_two_processes_equal_one(family: str, tmp_path: Path, alone: dict[str, dict[int, SecondMoment]]) -> None:
    told = Running(2, family, tmp_path).ended()
    assert told[0] == told[1] and sorted(told[0]) == LAYERS[family]
    found = second_moments(tiny_lm(family), LAYERS[family], SETTINGS, progress=False, cache=tmp_path)
    assert {layer: moment.digest for layer, moment in found.items()} == told[0]  # nothing was collected again
    assert_equal(found, alone[family])
    assert found[LAYERS[family][0]].provenance["processes"] == 2
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".lock"}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed_and_the_same_number_goes_on_to_the_same_bits(
    victim: int, tmp_path: Path, alone: dict[str, dict[int, SecondMoment]]
) -> None:
    whole = Running(2, "gpt2", tmp_path / "whole").ended()[0]
    cache = tmp_path / "killed"
    group = Running(2, "gpt2", cache, each=0.02)
    wait_for(cache, victim, 2 * BATCH)
    group.processes[victim].kill()
    told = group.ended()
    assert group.processes[victim].exitcode == -signal.SIGKILL and group.processes[1 - victim].exitcode == 1
    assert list(told) == [1 - victim] and "LostProcessError: Another process of this collection" in told[1 - victim]
    kept = counts(cache)
    assert all(0 < count < 12 * BATCH for count in kept.values()) and len(kept) == 2
    assert not list(cache.rglob("*.safetensors"))

    told = Running(2, "gpt2", cache).ended()
    assert told == {0: whole, 1: whole}
    found = second_moments(tiny_lm("gpt2"), LAYERS["gpt2"], SETTINGS, progress=False, cache=cache)
    assert_equal(found, alone["gpt2"])
    assert not list(cache.rglob("*.shard"))


def test_an_interrupted_process_saves_its_share_and_ends_the_others(tmp_path: Path) -> None:
    group = Running(2, "gpt2", tmp_path, each=0.05)
    wait_for(tmp_path, 1, BATCH)
    os.kill(group.processes[1].pid or 0, signal.SIGINT)
    told = group.ended()
    assert told[1].startswith("KeyboardInterrupt") and told[0].startswith("LostProcessError")
    assert set(counts(tmp_path)) == {(0, 2), (1, 2)}


def test_a_process_that_no_longer_answers_is_not_waited_for_without_end(tmp_path: Path) -> None:
    group = Running(2, "gpt2", tmp_path, each=0.05, timeout=1 / 30)
    wait_for(tmp_path, 1, BATCH)
    os.kill(group.processes[1].pid or 0, signal.SIGSTOP)
    group.processes[0].join(30)
    group.processes[1].kill()
    assert "has not answered for 0.0333333 minutes" in group.ended()[0]
    assert counts(tmp_path)[0, 2] > 0


def test_processes_that_collect_different_things_are_refused(tmp_path: Path) -> None:
    told = Running(2, "gpt2", tmp_path, seed=1).ended()
    assert told[0] == told[1] and "Processes 0 and 1 do not collect the same" in told[0]
    assert not counts(tmp_path)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("of", [3, 5])
def test_shares_of_unequal_size_in_any_order_equal_one_process(
    of: int, family: str, tmp_path: Path, alone: dict[str, dict[int, SecondMoment]]
) -> None:
    lm = tiny_lm(family)
    order = [of - 1, *range(of - 1)]
    for rank in order[:-1]:
        share = Share(rank, of)
        assert collect_share(lm, LAYERS[family], SETTINGS, share=share, progress=False, cache=tmp_path) == {}
    sizes = list(counts(tmp_path).values())
    found = collect_share(lm, LAYERS[family], SETTINGS, share=Share(order[-1], of), progress=False, cache=tmp_path)
    assert_equal(found, alone[family])
    assert of == 3 or len(set(sizes)) == 2
    again = collect_share(lm, LAYERS[family], SETTINGS, share=Share(0, of), progress=False, cache=tmp_path)
    assert {layer: moment.digest for layer, moment in again.items()} == {
        layer: moment.digest for layer, moment in found.items()
    }


def test_a_text_that_ends_early_and_more_processes_than_batches(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 12, encoding="utf-8")
    settings = MomentSettings(tokens=5000, block=32, source=str(text))
    lm = tiny_lm("gpt2")
    one = second_moments(lm, [1], settings, progress=False, cache=tmp_path / "one")
    assert one[1].count % BATCH and one[1].count < 8 * BATCH  # its last batch is smaller, and some shares have none
    shares = [
        collect_share(lm, [1], settings, share=Share(rank, 8), progress=False, cache=tmp_path / "shares")
        for rank in range(8)
    ]
    assert shares[:-1] == [{}] * 7
    assert_equal(shares[-1], one)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    collect_share(lm, [0, 2], SETTINGS, share=Share(0, 3), progress=False, cache=tmp_path)
    message = "2 processes were asked to collect what 3 began.*512 keys.*Start 3 to go on"
    for layers in ([0, 2], [2]):
        with pytest.raises(EditkitError, match=message):
            collect_share(lm, layers, SETTINGS, share=Share(0, 2), progress=False, cache=tmp_path)
    told = Running(2, "gpt2", tmp_path).ended()
    assert told[0] == told[1] and "2 processes were asked to collect what 3 began" in told[0]
    with pytest.warns(UserWarning, match="unfinished collection over 3 processes. One process alone does not go on"):
        second_moments(lm, [0], SETTINGS, progress=False, cache=tmp_path)
    assert len(counts(tmp_path)) == 1  # layer 2 needs it still
    second_moments(lm, [2], SETTINGS, progress=False, cache=tmp_path)
    assert not counts(tmp_path)


def test_what_one_process_began_is_not_begun_again_by_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, add, calls = tiny_lm("gpt2"), Sums.add, list[int]()

    def interrupting(self: Sums, module: str, k: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(self, module, k)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sums, "add", interrupting)
        second_moments(lm, [0], SETTINGS, progress=False, cache=tmp_path)
    with pytest.raises(EditkitError, match="2 processes were asked to collect what 1 began.*256 keys.*Start 1 "):
        collect_share(lm, [0], SETTINGS, share=Share(0, 2), progress=False, cache=tmp_path)


def test_a_share_that_another_process_collects_is_refused(tmp_path: Path) -> None:
    lm, share = tiny_lm("gpt2"), Share(1, 2)
    collect_share(lm, [0], SETTINGS, share=share, progress=False, cache=tmp_path)
    (lock,) = (path.with_suffix(".lock") for path in tmp_path.rglob("*.shard"))
    with FileLock(lock), pytest.raises(EditkitError, match="Another process collects share 1/2 already"):
        collect_share(lm, [0], SETTINGS, share=share, progress=False, cache=tmp_path)


def test_a_damaged_share_is_collected_again(tmp_path: Path, alone: dict[str, dict[int, SecondMoment]]) -> None:
    lm = tiny_lm("llama")
    collect_share(lm, [1], SETTINGS, share=Share(0, 2), progress=False, cache=tmp_path)
    (path,) = tmp_path.rglob("*.shard")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="an unfinished share is not continued: .*damaged"):
        collect_share(lm, [1], SETTINGS, share=Share(0, 2), progress=False, cache=tmp_path)
    found = collect_share(lm, [1], SETTINGS, share=Share(1, 2), progress=False, cache=tmp_path)
    assert_equal(found, alone["llama"])


def test_a_cache_that_not_all_share_is_an_error(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    for rank in (0, 1):  # two machines with a cache each
        assert not collect_share(lm, [0], SETTINGS, share=Share(rank, 2), progress=False, cache=tmp_path / str(rank))
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(EditkitError, match="cannot be written"):
        collect_share(lm, [0], SETTINGS, share=Share(0, 2), progress=False, cache=tmp_path / "file")
    with pytest.raises(EditkitError, match="was imported: there is nothing to collect"):
        imported = MomentSettings(source="imported:wiki")
        collect_share(lm, [0], imported, share=Share(0, 2), progress=False, cache=tmp_path)
    with pytest.raises(ConfigError, match="i/n with 0 ≤ i < n; found 2/2"):
        Share(2, 2)


# --- the command ----------------------------------------------------------------------------------------------


def test_torchrun_collects_what_one_process_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["collect", "--model", "atlas", "--device", "cpu", "--layers", "3", "--tokens", "8000"]
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*started, "-m", "editkit.moments", *command],
        env=kept | {"EDITKIT_CACHE": str(tmp_path / "two"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("layer 3: 8,192 keys, 10.7 per dimension") == 1  # by process 0 alone
    (path,) = (tmp_path / "two").rglob("*.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITKIT_CACHE", str(tmp_path / "one"))
        patch.setattr("editkit.moments.collect.BATCH", 2048)
        assert main(command) == 0
    one = SecondMoment.load(capsys.readouterr().out.splitlines()[-1].strip())
    assert_equal({3: SecondMoment.load(path)}, {3: one})


def test_shares_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr("editkit.moments.collect.BATCH", 2048)
    command = ["collect", "--model", "atlas", "--device", "cpu", "--layers", "0", "--tokens", "8192"]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "share 1/2 is finished; the last share to finish adds all up" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert "atlas, 1 modules: share 1/2 finished, 4,096 of 4,096 keys of atlas" in capsys.readouterr().out
    assert main([*command, "--shard", "0/3"]) == 1
    assert "3 processes were asked to collect what 2 began" in capsys.readouterr().err
    assert main([*command, "--shard", "0/2"]) == 0
    assert "layer 0: 8,192 keys, 10.7 per dimension" in capsys.readouterr().out
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(SystemExit):
            main([*command, f"--shard={wrong}"])
        assert "give i/n with 0 ≤ i < n" in capsys.readouterr().err


@lean
def test_one_process_does_without_torch_distributed(tmp_path: Path) -> None:
    code = """
import sys
from editkit.moments.__main__ import main
assert main(["collect", "--model", "atlas", "--device", "cpu", "--layers", "0", "--tokens", "2000"]) == 0
import torch
assert not torch.distributed.is_initialized()
print(*sys.modules)
"""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=kept | {"EDITKIT_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines()[-1].split())
    assert "transformers.modeling_utils" in imported
    assert not imported & {"torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.run"}
