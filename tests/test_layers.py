"""The layer rule: each room imports only from rooms below it, so there is no circle. nethook imports none."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "editkit"

# Bottom first; rooms on one line do not know each other.
LAYERS = [
    {"editkit", "errors", "nethook", "numbers", "progress", "shown", "start"},
    {"corpora", "files", "registry", "settings"},
    {"tensorfiles"},
    {"models"},
    {"commands"},
    {"edits", "facts", "moments", "new"},
    {"activations", "data", "methods", "tracing"},
    {"folded", "lenses", "metrics"},
    {"alarm", "composition", "judges", "sessionfiles"},
    {"judging", "plan", "runs", "session"},
    {"report"},
    {"plots"},
    {"doctor", "tasks", "testing"},
    {"config", "workbench"},
    {"run"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    if relative.stem == "__main__":  # a command, of the package or of a room: above all rooms
        return "__main__"
    if len(relative.parts) > 1:
        return relative.parts[0]
    return "editkit" if relative.stem == "__init__" else relative.stem


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == "nethook":  # so that the folder can be copied out
                continue
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"editkit.{a.name}" for a in node.names] if base == "editkit" else [base]
        for name in names:
            parts = name.split(".")
            if parts[0] == "editkit":
                room = parts[1] if len(parts) > 1 else "editkit"
                found.add("editkit" if room == "__version__" else room)
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "conf" not in p.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{room} is not in the layer rule"
    for other in imports(path) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports {other}, which is not below it"


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are run, at once or when a function is called: all but those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from run_nodes(child)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Imports in function bodies count too; `from package import module` is an import of the module."""
    named = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    named = {path: name.removesuffix(".__init__") for path, name in named.items()}
    modules = set(named.values())
    graph: dict[str, set[str]] = {}
    for path, name in named.items():
        graph[name] = set()
        for node in run_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules
                graph[name] |= parts or {node.module} & modules
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)  # CycleError names a circle


def test_nethook_works_where_it_is_copied(tmp_path: Path) -> None:
    """Alone in another folder, under another name, with no editkit and no transformers to import."""
    shutil.copytree(PACKAGE / "nethook", tmp_path / "hooks")
    code = """
import sys; sys.modules.update(editkit=None, transformers=None, numpy=None)
import torch; from torch import nn; from hooks import InstrumentedModel, Callbacks, GradientFlow, Trace
net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
with Trace(net, "0") as t: net(torch.ones(1, 2))
print(list(t.output.shape))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("[1, 3]\n", 0), run.stderr


def test_nothing_imports_experiments() -> None:
    imports = re.compile(r"^\s*(import|from) experiments", re.MULTILINE)
    assert not [p for p in FILES if imports.search(p.read_text(encoding="utf-8"))]


def test_only_the_door_knows_hydra() -> None:
    knows = {p.name for p in FILES if "import hydra" in (t := p.read_text(encoding="utf-8")) or "from hydra" in t}
    assert knows == {"run.py", "config.py"}
