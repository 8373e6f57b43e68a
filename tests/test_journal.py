"""A journal keeps what was appended, whatever happens, and goes on only with the same work."""

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.errors import ConfigError, OutputError
from editkit.runs.journal import Journal

HEADER = {"config": {"seed": 0, "method": {"name": "rome", "lr": 0.5}}, "model": "abc"}


def write(path: Path, *lines: dict[str, Any], resume: bool = False) -> list[dict[str, Any]]:
    with Journal(path, HEADER, resume=resume) as journal:
        for line in lines:
            journal.append(line)
        return list(journal.lines)


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write(path, {"case": "a\nb", "x": 0.1 + 0.2}, {"case": "\ud800 é"})
    assert write(path, resume=True) == [{"case": "a\nb", "x": 0.1 + 0.2}, {"case": "\ud800 é"}]


@pytest.mark.parametrize("kept", [1, 5, 20])
def test_a_line_cut_short_is_removed_and_written_again(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cases.jsonl"
    write(path, {"case": 1}, {"case": 2, "text": "x" * 30})
    whole = path.read_bytes()
    begin = whole[:-1].rfind(b"\n") + 1
    path.write_bytes(whole[: begin + kept])
    assert write(path, {"case": 2, "text": "x" * 30}, resume=True) == [{"case": 1}, {"case": 2, "text": "x" * 30}]
    assert path.read_bytes() == whole


def test_a_header_cut_short_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b'{"config": {"se')
    assert write(path, {"case": 1}, resume=True) == [{"case": 1}]
    assert json.loads(path.read_text().splitlines()[0]) == HEADER


def test_another_setting_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write(path, {"case": 1})
    before = path.read_bytes()
    other = {"config": {"seed": 0, "method": {"name": "rome", "lr": 0.1}}, "model": "abc"}
    with pytest.raises(ConfigError, match=r"config\.method\.lr=0\.5, and now it is 0\.1"):
        Journal(path, other, resume=True)
    with pytest.raises(OutputError, match=r"holds 1 results.*resume=true"):
        Journal(path, HEADER, resume=False)
    assert path.read_bytes() == before
    assert write(path, resume=True) == [{"case": 1}]  # the lock was released by both


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    with (
        Journal(path, HEADER, resume=False) as journal,
        pytest.raises(OutputError, match="being written by another process"),
    ):
        journal.append({"case": 1})
        Journal(path, HEADER, resume=True)
    assert write(path, resume=True) == [{"case": 1}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    write(path, {"case": 1}, {"case": 2})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + lines[2])
    with pytest.raises(OutputError, match="line 2, is damaged"):
        Journal(path, HEADER, resume=True)
