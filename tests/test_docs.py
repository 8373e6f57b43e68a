"""The python blocks of docs/ and of the README run as they stand: each file's in order, in an empty folder."""

import re
from pathlib import Path

import pytest
from pictures import NAMES
from site_pages import PAGES

from editkit import methods, plots
from editkit.metrics.metric import registered

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = [*sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("howto/*.md")), DOCS.parent / "README.md"]


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


def test_the_gallery_shows_every_plot_and_every_picture_that_is_drawn() -> None:
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(([^)]+)\.png\)", text))
    assert shown == {*NAMES, "activations"} and {*re.findall(r"plots\.(\w+)\(", text)} == {*plots.names()}
    drawn = [*DOCS.glob("*.png"), *DOCS.glob("gallery/*")]
    assert {str(path.relative_to(DOCS).with_suffix("")) for path in drawn} == shown
    assert sum(path.stat().st_size for path in drawn) < 600_000


def test_the_site_names_every_page_and_no_other() -> None:
    """What `make docs` builds: the files of docs/, and those that scripts/site_pages.py writes from the code."""
    named = set(re.findall(r": ([\w/]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    written = {str(path.relative_to(DOCS)) for path in FILES if path.is_relative_to(DOCS)}
    assert named == written | {f"{name}.md" for name in PAGES}


def test_pages_from_the_code_hold_all_of_it() -> None:
    pages = {name: page() for name, page in PAGES.items()}
    assert all(f"\n## {name}\n" in pages["methods"] for name in methods.names())
    assert all(f"| `{entry.metric.short}` |" in pages["metrics"] for entry in registered())
    assert "### task=lifelong" in pages["settings"] and "ΔW = R Kᵀ (λ C + S + K Kᵀ)⁻¹" in pages["methods"]


def test_links_lead_to_pages() -> None:
    known = {path.resolve() for path in FILES} | {(DOCS / f"{name}.md").resolve() for name in PAGES}
    for path in FILES[:-1]:
        for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).resolve() in known or (path.parent / link).exists(), f"{path.name}: {link}"
