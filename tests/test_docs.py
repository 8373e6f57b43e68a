"""The python blocks of docs/ and of the README run as they stand: each file's in order, in an empty folder."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = [*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md"]


def test_there_are_docs_to_run() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_docs_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = path.read_text(encoding="utf-8"), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        # Padded so that a traceback names the line of the document.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(path), "exec"), names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_pictures_are_there(path: Path) -> None:
    for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        assert 0 < (path.parent / picture).stat().st_size < 150_000
