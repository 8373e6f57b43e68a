"""Shared fixtures: the atlas model, and tiny random models with two kinds of tokenizer."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from editkit.facts import Fact
from editkit.models.load import LanguageModel, load
from editkit.models.lookup import lookup_position
from editkit.models.tokens import encode_with_targets, spaced, tokenise
from editkit.testing.tiny import build
from editkit.testing.untouched import count_hooks
from tests.covering import left_out
from tests.oracles import FactRows
from tests.run_folders import TASKS, really_run

ORACLE = "oracle"  # the mark of a test with an oracle, and its property: method|family|difference|bound
CELL = "pretended"  # the property of a test that is one cell on the pretended accelerator

torch.set_num_threads(1)  # for tiny models two threads wait for each other more than they work


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run the slow tests too, and each cell")


def pytest_itemcollected(item: pytest.Item) -> None:  # before -m selects
    if "near" in getattr(item, "fixturenames", ()):
        item.add_marker(ORACLE)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--whole"):
        out = left_out(items, config.args)
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what ran on the pretended accelerator: cells, failures, seconds."""
    cells = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call" and dict(report.user_properties).get(CELL)
    ]
    if cells:
        failed, seconds = sum(report.failed for report in cells), sum(report.duration for report in cells)
        terminalreporter.write_line(
            f"pretended accelerator: {len(cells)} cells (method × family × dtype × device), {failed} failed, "
            f"{seconds:.0f} s"
        )


class Near(Protocol):
    def __call__(self, method: str, family: str, ours: Tensor, oracle: Tensor, within: float) -> None: ...


@pytest.fixture
def near(record_property: Callable[[str, object], None]) -> Near:
    """`near(method, family, ours, oracle, within)` asserts ‖ours − oracle‖/‖oracle‖ ≤ within, and keeps the difference
    for scripts/oracles.py."""

    def compare(method: str, family: str, ours: Tensor, oracle: Tensor, within: float) -> None:
        difference = float((ours.double() - oracle.double()).norm() / oracle.double().norm())
        record_property(ORACLE, f"{method}|{family}|{difference!r}|{within!r}")
        assert difference <= within

    return compare


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDITKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedModel:
    return build("gpt2")


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may leave a hook or a changed flag on the shared tiny models, or change the environment of the next."""
    environment, folder = surroundings(), os.getcwd()
    models = [request.getfixturevalue(name) for name in ("gpt2", "llama") if name in request.fixturenames]
    before = [count_hooks(model) for model in models]
    yield
    assert [count_hooks(model) for model in models] == before
    assert all(p.requires_grad for model in models for p in model.parameters())
    for model in models:
        model.zero_grad()
    assert (surroundings(), os.getcwd()) == (environment, folder)


def surroundings() -> dict[str, str]:
    """The environment, without what pytest sets, and torch's compiler at its first import."""
    others = ("PYTEST_", "TORCHINDUCTOR_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


class RealRuns(dict[str, Path]):
    """The folder of each task, by its name; the task runs when its folder is first asked for."""

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def __missing__(self, task: str) -> Path:
        return self.setdefault(task, really_run(self.parent / task, *TASKS[task]))


@pytest.fixture(scope="session")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each task, really run once on the atlas model. Copy a folder to change it."""
    return RealRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def atlas_lm() -> LanguageModel:
    return load("atlas", device="cpu")


def inputs_of(lm: LanguageModel, fact: Fact, templates: Sequence[str]) -> FactRows:
    """(rows, kl row) of a fact for the oracles, which take token ids."""
    prompts = [t.replace("{}", fact.prompt) for t in templates]
    scored = encode_with_targets(lm, [fact.filled(p) for p in prompts], [spaced(fact.target_new)] * len(prompts))
    rows = []
    for i, prompt in enumerate(prompts):
        ids = scored.rows.ids[i, : len(scored.rows.offsets[i])].tolist()
        rows.append((ids, lookup_position(scored.rows, i, prompt, fact.subject), len(scored.positions[i])))
    kl = tokenise(lm, [f"{fact.subject} is a"])
    return rows, (kl.ids[0].tolist(), lookup_position(kl, 0, "{} is a", fact.subject))


# Real data, not part of the project: beside the checkout, or where the variable says.
SHARED_DATA = Path(os.environ.get("EDITKIT_SHARED_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")
