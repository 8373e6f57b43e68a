"""A walk through the workbench in a real browser, as pictures: python scripts/workbench_walk.py [FOLDER].

Needs Playwright's Python package and a Chromium. The pictures of docs/howto/workbench.md are at 1280 units and light,
and one at 400 and dark; with --all FOLDER gets each step at both widths in both themes.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = 128  # of a picture: few, so that files are small
SLOW = 120_000  # milliseconds that a step may take
# Where a step is, and its parts; a picture is of all of them, one below the other.
STEPS = {
    "fact": ("#fact",),
    "where": ("#where",),
    "draft": ("#edit",),
    "compared": ("#compared",),
    "audit": ("#audit",),
    "stack": ("#stack", "#leave"),
}


@contextmanager
def workbench() -> Iterator[str]:
    """The link of a workbench that runs meanwhile."""
    command = [sys.executable, "-m", "editkit.workbench", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[1] for line in process.stdout if line.startswith("open"))
        finally:
            process.terminate()


def walk(page: Any, link: str) -> Iterator[str]:
    """Go through the steps; after each comes its name."""
    page.goto(link)
    page.locator("#kinds button:nth-child(3)").wait_for()
    page.evaluate("document.querySelector('nav').style.position = 'static'")  # it would stand in the pictures
    yield "fact"
    yield "where"
    page.click("#compute")
    page.locator("#draft .card").wait_for()
    yield "draft"
    page.click("text=Apply it")
    page.locator("#alarm .card").wait_for()
    page.locator("#python:not(:empty)").wait_for()
    yield "compared"
    page.click("#run-audit")
    page.locator("#grid .square[data-row]").first.wait_for()
    page.locator("#grid .square.flipped[data-row]").first.click()
    yield "audit"
    page.fill("#prompt", "The capital of France is")
    for name, text in (("subject", "France"), ("true", "Paris"), ("new", "Madrid")):
        page.fill(f"#{name}", text)
    page.click("#compute")
    page.click("text=Apply it")
    page.locator("#steps li:nth-child(2)").wait_for()
    page.locator("#python").get_by_text("edit_2").first.wait_for()
    yield "stack"


def picture(page: Any, step: str, path: Path) -> None:
    """One picture of a step, with few colours."""
    page.wait_for_timeout(400)
    parts = []
    for number, place in enumerate(STEPS[step]):
        page.locator(place).screenshot(path=str(part := path.with_suffix(f".{number}.png")), animations="disabled")
        with Image.open(part) as image:
            parts.append(image.convert("RGB"))
        part.unlink()
    size = max(part.width for part in parts), sum(part.height for part in parts)
    whole = Image.new("RGB", size, parts[0].getpixel((0, 0)))
    top = 0
    for each in parts:
        whole.paste(each, (0, top))
        top += each.height
    whole.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent / "docs" / "howto")
    parser.add_argument("--all", action="store_true", help="every step at both widths in both themes")
    options = parser.parse_args()
    sync_playwright: Any = importlib.import_module("playwright.sync_api").sync_playwright  # it need not be installed
    ways = [(1280, "light"), (400, "dark")] + ([(1280, "dark"), (400, "light")] if options.all else [])
    chromium = os.environ.get("EDITKIT_CHROMIUM") or shutil.which("chromium")
    options.folder.mkdir(parents=True, exist_ok=True)
    with workbench() as link, sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, theme in ways:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
            context.set_default_timeout(SLOW)
            page = context.new_page()
            for step in walk(page, link):
                if options.all:
                    picture(page, step, options.folder / f"workbench_{step}_{width}_{theme}.png")
                elif theme == "light":
                    picture(page, step, options.folder / f"workbench_{step}.png")
                elif step == "where":
                    picture(page, step, options.folder / "workbench_narrow.png")
                    break
            context.close()
        browser.close()


if __name__ == "__main__":
    main()
