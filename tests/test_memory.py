"""What the system says about memory, with its files put in place."""

from pathlib import Path

import pytest
import torch

from editkit.models import memory
from editkit.models.memory import free_bytes, own_bytes


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose files stand for the kernel's."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_LIMITS", ((tmp_path / "max", tmp_path / "current"),))
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     5000 kB\n")
    return tmp_path


def test_free_memory_is_what_the_kernel_calls_available(system: Path) -> None:
    assert free_bytes() == 5000 * 1024


@pytest.mark.parametrize(("limit", "free"), [("3000000", 2_000_000), ("500000", 0), ("max", 5000 * 1024)])
def test_a_container_has_no_more_than_its_limit_leaves(system: Path, limit: str, free: int) -> None:
    (system / "max").write_text(f"{limit}\n")
    (system / "current").write_text("1000000\n")
    assert free_bytes() == free


def test_a_system_that_does_not_say_gives_none(system: Path) -> None:
    (system / "meminfo").unlink()
    assert free_bytes() is None
    assert own_bytes() == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="it is Linux that says")
def test_own_memory_grows_by_what_is_allocated() -> None:
    before = own_bytes()
    held = torch.ones(50_000_000)
    assert own_bytes() - before == pytest.approx(held.nbytes, rel=0.1)
