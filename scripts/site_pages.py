"""Pages of the site that come from the code: every method with its formula and settings, every metric, every setting.

mkdocs calls `on_files` (mkdocs.yml). `python scripts/site_pages.py methods` prints a page.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from editkit import methods
from editkit.config import CONF_DIR
from editkit.metrics.metric import registered

BETTER = {1: "more", -1: "less", 0: "neither"}


def methods_page() -> str:
    """A section a method: what its file says at its head, its settings as YAML, its published constants."""
    parts = [
        "# Methods",
        "What each file says at its head, in one notation: W [d_model, d_ff], keys K [d_ff, n], values V [d_model, n], "
        "C = E[k kᵀ]. `method=NAME` chooses one. What each costs, does and survives is measured in the repository's "
        "experiments/: cost, methods, benchmark, lasting.",
    ]
    for name in methods.names():
        method = methods.get_method(name)
        module = importlib.import_module(method.function.__module__)
        parts += [f"## {name}", _plain(inspect.getdoc(module) or "")]
        conf = CONF_DIR / "method" / f"{name}.yaml"
        if conf.exists():
            parts += ["Settings:", f"```yaml\n{conf.read_text(encoding='utf-8').strip()}\n```"]
        constants = getattr(method.settings, "constants", None)
        if constants is not None and constants.published:
            rows = [f"| {model} | {_values(values)} |" for model, values in constants.published.items()]
            parts.append("\n".join(["| model | constants |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    """A table a protocol."""
    said = "Each is declared once, beside its formula, in `editkit/metrics/`. In tables it is called PROTOCOL.METRIC."
    parts = ["# Metrics", said]
    by: dict[str, list[Any]] = {}
    titles: dict[str, str] = {}
    for entry in registered():
        by.setdefault(entry.metric.protocol.name, []).append(entry.metric)
        titles[entry.metric.protocol.name] = entry.metric.protocol.title
    for name, found in by.items():
        cells = ((m.short, _cell(m.meaning), BETTER[m.better], m.unit or "–", _cell(m.averaged)) for m in found)
        rows = [f"| `{own}` | " + " | ".join(others) + " |" for own, *others in cells]
        head = ["| metric | what it is | better | unit | averaged |", "|---|---|---|---|---|"]
        parts += [f"## {name}", titles[name] + ".", "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"


def settings_page() -> str:
    """Every YAML of conf/ but the methods', as it stands."""
    parts = [
        "# Settings",
        "The files of `conf/`, each key with its default and what it is. A method's are on its page.",
    ]
    for group in ("task", "model", "data", "moments", "reproduce"):
        parts.append(f"## {group}")
        for path in sorted((CONF_DIR / group).glob("*.yaml")):
            parts += [f"### {group}={path.stem}", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(parts) + "\n"


PAGES: dict[str, Callable[[], str]] = {"methods": methods_page, "metrics": metrics_page, "settings": settings_page}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages; called by mkdocs."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]  # of the extra `docs`

    for name, page in PAGES.items():
        files.append(File.generated(config, f"{name}.md", content=page()))
    return files


def _plain(text: str) -> str:
    """A docstring as Markdown: what is indented in it is code already, and nothing else is marked up."""
    marked = str.maketrans({"<": "&lt;", "*": "\\*", "_": "\\_"})
    return "\n".join(line if line.startswith("    ") else line.translate(marked) for line in text.split("\n"))


def _values(values: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(PAGES[sys.argv[1] if len(sys.argv) > 1 else "methods"]())
