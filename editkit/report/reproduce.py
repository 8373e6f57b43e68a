"""What is needed to run it again: the command, the commit, the versions, every setting."""

import shlex
from pathlib import Path
from typing import Any

from editkit.report.html import Code, Fold, Pairs, Table, Text, cell
from editkit.runs.read import Run, flat

_NAMED = ("task", "model", "method", "data")  # groups whose option is (mostly) the `name` of what they hold


def command(run: Run) -> tuple[str, bool]:
    """The command of this run, and whether it is of this run alone (of a sweep's job it may be the whole sweep's).

    Hydra's folders are left out, so that running it again writes a new folder.
    """
    found = run.record["environment"].get("command")
    if not isinstance(found, list) or not found:
        return "", False
    door, *words = map(str, found)
    name = "python -m editkit.run" if Path(door).name in ("run.py", "__main__.py") else Path(door).name
    sweep = any(word in ("-m", "--multirun") for word in words)
    words = [word for word in words if not word.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    if not sweep:
        return " ".join([name, *map(shlex.quote, words)]), True
    one = [_chosen(word, run.settings) for word in words if word not in ("-m", "--multirun")]
    if any(word is None or word.startswith("hydra") for word in one):
        return " ".join([name, *map(shlex.quote, words)]), False
    return " ".join([name, *(shlex.quote(word) for word in one if word)]), True


def _chosen(word: str, settings: dict[str, Any]) -> str | None:
    """One override of a sweep with this run's own value of several; None where that cannot be told."""
    key, equals, value = word.partition("=")
    if not equals or "," not in value:
        return None if "(" in value else word
    if any(mark in value for mark in "[]{}()'\"\\"):
        return None
    mine = settings.get(f"{key}.name" if key in _NAMED else key)
    options = [option.strip() for option in value.split(",")]
    text = str(mine).lower() if isinstance(mine, bool) else "null" if mine is None else str(mine)
    same = [option for option in options if option == text or _equal(option, mine)]
    return f"{key}={same[0]}" if len(same) == 1 else None


def _equal(option: str, value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and float(option) == value
    except ValueError:
        return False


def settings(run: Run) -> list[Any]:
    """Every setting of the run, a fold for each group."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for key, value in run.settings.items():
        group, dot, rest = key.partition(".")
        groups.setdefault(group if dot else "run", []).append((rest or key, cell(value)))
    resolved = run.record["edit"].get("provenance")
    chosen = resolved.get("settings") if isinstance(resolved, dict) else None
    if isinstance(chosen, dict):
        groups["method, with the model's constants"] = [(k, cell(v)) for k, v in flat(chosen).items()]
    return [Fold(name, [Pairs(items)]) for name, items in groups.items()]


def footer(run: Run) -> list[Any]:
    """The last block of a page."""
    found = run.record["environment"]
    text, alone = command(run)
    blocks: list[Any] = [Text("Run this again", "strong")]
    if text:
        blocks.append(Code(text))
        if not alone:
            blocks.append(Text("This is the command of the whole sweep; the run's own settings are above.", "note"))
    else:
        blocks.append(Text("The record does not hold the command.", "note"))
    names = ("commit", "editkit", "python", "platform", "device", "threads", "finished")
    blocks.append(Pairs([(name, cell(found[name])) for name in names if found.get(name) is not None]))
    packages = found.get("packages")
    if isinstance(packages, dict) and packages:
        blocks.append(Fold("Package versions", [Table(("package", "version"), list(packages.items()))]))
    digests = [
        ("model", run.record["model"].get("digest")),
        ("edit", run.record["edit"].get("digest")),
        ("data", run.record["data"].get("digest")),
    ]
    if any(digest for _, digest in digests):
        rows = [(name, digest) for name, digest in digests if digest]
        blocks.append(Fold("Digests", [Table(("of", "digest"), rows, stacked=True)]))
    return blocks
