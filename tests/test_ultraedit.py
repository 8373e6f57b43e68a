"""UltraEdit and StableEdit against the papers token by token, and their statistics as state of a session."""

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editkit import Fact, Session
from editkit.corpora import running_text
from editkit.errors import ConfigError, EditkitError, ModelError
from editkit.methods import get_method
from editkit.methods.shared.gradients import Pairs
from editkit.methods.shared.running import Running, remembered
from editkit.methods.stableedit import StableEditSettings
from editkit.methods.ultraedit import UltraEditSettings, ridge, ultraedit, warmed
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.moments import packed_blocks
from editkit.nethook import NameNotFound
from editkit.settings import MomentSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import tokens_of, untouched
from tests.conftest import Near
from tests.expert_oracle import memory_of
from tests.oracles import Memory, logits_of
from tests.present import present
from tests.scripts import SCRIPTS

pytestmark = pytest.mark.filterwarnings("ignore:the update of")  # on tiny random models it is large

FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris"),
    Fact("The capital of {} is", "France", "Madrid", "Paris"),
    Fact("{} was born in the city of", "Ada Lovelace", "Oslo", "London"),
    Fact("{} lies in", "Big Ben", "Berlin Madrid", "London"),
]
BATCHES = [FACTS[:2], FACTS[2:]]
TEXT = MomentSettings(block=16)
SETTINGS = {
    "ultraedit": UltraEditSettings(layers=(0, 1), lr=1e-3),
    "stableedit": StableEditSettings(layers=(0, 1), lr=1e-3, warm_up=60),  # more than q + 1 tokens
}
CELLS = [(family, method, "shape") for family in SITES for method in SETTINGS]
CELLS += [("gpt2", "ultraedit", "weight"), ("llama", "stableedit", "weight")]


# The oracle


def passed(
    model: nn.Module, memories: Sequence[Memory], ids: list[int], places: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """h and g of each module at `places`, whose next tokens are predicted there: one row, one token after the other."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(number: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            whole = whole.clone()
            whole.retain_grad()
            seen[number] = args[0].detach().reshape(len(ids), -1), whole
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        return hook

    handles = [memory.module.register_forward_hook(keep(i)) for i, memory in enumerate(memories)]
    try:
        p = logits_of(model, ids, use_cache=False).softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    torch.stack([-p[at, ids[at + 1]].log() for at in places]).sum().backward()
    found = []
    for number, memory in enumerate(memories):
        given, output = seen[number]
        found.append((memory.keys(given[places]), present(output.grad).reshape(len(ids), -1)[places]))
    return found


def updates(
    lm: LanguageModel, names: Sequence[str], settings: UltraEditSettings, whiten: bool, shapes: bool
) -> list[list[Tensor]]:
    """ΔW [q, p] of each module for each batch, solved in p × p, with the statistics computed anew from all tokens."""
    model = copy.deepcopy(lm.model).double()
    tokens: list[list[tuple[Tensor, Tensor]]] = []  # of all passes yet, h and g of each module
    memories = [memory_of(model, name) for name in names]
    left = -(-(settings.warm_up or 0) // (TEXT.block - 1))
    for _, block in zip(range(left), packed_blocks(lm, running_text(TEXT.source), TEXT.block), strict=False):
        tokens.append(passed(model, memories, block.tolist(), list(range(TEXT.block - 1))))
    found = []
    for batch in BATCHES:
        rows = [tokens_of(lm, fact.text, fact.target_new) for fact in batch]
        mine = [passed(model, memories, ids, [len(ids) - n - 1 + j for j in range(n)]) for ids, n in rows]
        tokens += mine
        changes = []
        for number, memory in enumerate(memories):
            H, G = (torch.cat([row[number][side] for row in mine]) for side in (0, 1))
            size = memory.matrix().shape
            alike = [i for i, m in enumerate(memories) if i == number or (shapes and m.matrix().shape == size)]
            all_h, all_g = (torch.cat([row[i][side] for i in alike for row in tokens]) for side in (0, 1))
            h, g = (H - all_h.mean(0)) / (all_h.std(0) + 2**-23), (G - all_g.mean(0)) / (all_g.std(0) + 2**-23)
            if whiten:
                centred = all_g - all_g.mean(0)
                values, vectors = torch.linalg.eigh(centred.T @ centred / (len(all_g) - all_g.shape[1] - 1))
                g = (G - all_g.mean(0)) @ vectors @ torch.diag(values.clamp(min=1e-6) ** -0.5) @ vectors.T
            V = torch.stack([-present(settings.lr) * (a @ a) * b for a, b in zip(h, g, strict=True)])
            eye = torch.eye(H.shape[1], dtype=torch.float64)
            changes.append((torch.linalg.inv(H.T @ H + settings.alpha * eye) @ H.T @ V).T)
        with torch.no_grad():
            for memory, change in zip(memories, changes, strict=True):
                memory.add(change)
        found.append(changes)
    return found


@pytest.mark.cells
@pytest.mark.parametrize(("family", "method", "statistics"), CELLS)
def test_a_session_is_the_oracles(family: str, method: str, statistics: str, near: Near) -> None:
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    settings = replace(SETTINGS[method], statistics=statistics)
    expected = updates(lm, [site_of(lm, i) for i in (0, 1)], settings, method == "stableedit", statistics == "shape")
    with Session(lm, method, settings, moments=TEXT, progress=False) as session:
        for batch, changes in zip(BATCHES, expected, strict=True):
            step = session.edit(batch)
            assert [delta.module for delta in step.deltas] == [down_of(lm, layer) for layer in (0, 1)]
            assert all(each["whitened"] is (method == "stableedit") for each in step.provenance["modules"])
            for delta, change in zip(step.deltas, changes, strict=True):
                near(f"{method}, a session", family, delta.change(), change, 1e-4)


@pytest.mark.parametrize(("tokens", "p"), [(1, 20), (7, 20), (19, 20), (20, 20), (50, 20)])
def test_the_dual_form_is_the_papers(tokens: int, p: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    h, v = (torch.randn(tokens, n, generator=draw, dtype=torch.float64) for n in (p, 12))
    left, right = ridge(h, v, 0.7)
    paper = torch.linalg.solve(h.T @ h + 0.7 * torch.eye(p, dtype=h.dtype), h.T @ v).T
    assert left.shape == (12, tokens) and right.shape == (tokens, p)
    assert (left @ right - paper).norm() <= 1e-12 * paper.norm()


# The state


def test_merged_statistics_are_those_of_all_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [Pairs(*(5 + torch.randn(n, k, generator=draw).double() for k in (6, 4))) for n in (1, 3, 9, 2)]
    running = None
    for pairs in parts:
        batch = Running.read(remembered("x", pairs, products=True), "x")
        running = batch if running is None else running.merged(batch)
    assert running is not None and running.products is not None
    x = torch.cat([torch.cat(pairs, 1) for pairs in parts])
    centred = x[:, 6:] - x[:, 6:].mean(0)
    assert running.count == 15
    torch.testing.assert_close(running.mean, x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(running.squares / 14, x.var(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(running.products, centred.T @ centred, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SETTINGS)
def test_undone_and_resumed_a_session_has_the_statistics_of_its_steps(method: str, tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    settings = replace(SETTINGS[method], warm_up=60)

    def opened() -> Session:
        return Session(lm, method, settings, moments=TEXT, progress=False)

    with opened() as session:
        for fact in FACTS[:3]:
            session.edit(fact)
        session.undo(0)
        session.save(tmp_path)
        after = session.edit(FACTS[3])
    with Session.load(tmp_path, lm, moments=TEXT, progress=False) as again:
        assert again.edit(FACTS[3]).to_bytes() == after.to_bytes()
    with opened() as other:
        assert other.edit(FACTS[3]).to_bytes() != after.to_bytes()


def test_the_first_statistics_are_of_the_unedited_model() -> None:
    """Whatever the session has done before they are asked for: they are the same after it was loaded."""
    lm = tiny_lm("gpt2")
    settings = replace(SETTINGS["ultraedit"], warm_up=60)
    given: dict[str, Any] = {"moments": TEXT, "seed": 0}
    first = warmed(lm, settings, progress=False, **given)
    assert {name: each.count for name, each in first.items()} == {"32 x 64": 2 * 60}
    edit = ultraedit(lm, FACTS, settings, **given)
    with edit.applied(lm):
        second = ultraedit(lm, FACTS[0], settings, earlier=[edit], base=first, **given)
        cold = ultraedit(lm, FACTS[0], settings, earlier=[edit], **given)
    with Session(lm, "ultraedit", settings, moments=TEXT, progress=False) as session:
        assert session.edit(FACTS).to_bytes() == edit.to_bytes()
        ours = session.edit(FACTS[0])
    assert torch.allclose(ours.deltas[1].change(), second.deltas[1].change(), rtol=1e-5)
    assert not torch.allclose(ours.deltas[1].change(), cold.deltas[1].change(), rtol=1e-3)


# As a method


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(family: str, method: str) -> None:
    lm = tiny_lm(family)
    with untouched(lm, lm.architecture.down(1)):
        edit = get_method(method)(lm, FACTS, SETTINGS[method], moments=TEXT, progress=False)
    assert edit.norm() > 0 and all(delta.right is not None for delta in edit.deltas)


def test_modules_by_name_and_pattern() -> None:
    lm = tiny_lm("llama")
    settings = UltraEditSettings(modules=("model.layers.[12].mlp.gate_proj", "model.layers.0.mlp.up_proj"), lr=1e-3)
    edit = ultraedit(lm, FACTS, settings)
    names = [f"model.layers.{i}.mlp.{part}_proj" for i, part in ((1, "gate"), (2, "gate"), (0, "up"))]
    assert [delta.module for delta in edit.deltas] == names
    assert {delta.shape for delta in edit.deltas} == {(64, 32)} and edit.norm() > 0
    before = lm.digest
    with edit.applied(lm):
        assert lm.digest != before
    assert lm.digest == before


def test_blocks_that_nobody_published_lie_late() -> None:
    assert UltraEditSettings().resolved("EleutherAI/gpt-j-6b", 28).layers == tuple(range(18, 27))
    assert UltraEditSettings().resolved("unknown", 28).layers == tuple(range(18, 27))
    assert UltraEditSettings().resolved("unknown", 1).layers == (0,)
    llama = UltraEditSettings().resolved("meta-llama/Meta-Llama-3-8B", 32)
    assert llama.layers is None and len(llama.modules or ()) == 12
    assert UltraEditSettings(layers=(3,)).resolved("meta-llama/Meta-Llama-3-8B", 32).modules is None


def test_bad_input(atlas_lm: LanguageModel) -> None:
    with pytest.raises(EditkitError, match="No fact"):
        ultraedit(atlas_lm, [])
    with pytest.raises(ModelError, match="Layer 9 was asked for"):
        ultraedit(atlas_lm, FACTS, UltraEditSettings(layers=(9,)))
    with pytest.raises(NameNotFound, match="nowhere"):
        ultraedit(atlas_lm, FACTS, UltraEditSettings(modules=("nowhere",)))
    with pytest.raises(ConfigError, match="method.statistics must be one of shape, weight"):
        UltraEditSettings(statistics="model")
    lm = tiny_lm("gpt2")
    one = next(
        fact
        for fact in (FACTS[0].with_target(t) for t in ("a", "the", "in"))
        if tokens_of(lm, fact.text, fact.target_new)[1] == 1
    )
    with pytest.raises(EditkitError, match="one token has no variance.*method.warm_up=2000"):
        ultraedit(lm, one, UltraEditSettings(layers=(1,), lr=1e-3))
    assert ultraedit(lm, one, UltraEditSettings(layers=(1,), lr=1e-3, warm_up=60)).norm() > 0


# Its script


def test_the_script_compares_both_forms(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "ultraedit.py"), "--shapes", "tiny,atlas", "--whole", "--edits", "3"]
    command += ["--repeats", "1", "--threads", "1", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["shapes"]
    assert list(found) == ["tiny", "atlas"]
    for rows in found.values():
        assert [row["part"] for row in rows] == ["up", "down", "whole edit"]
    for row in (row for rows in found.values() for row in rows):
        assert row["ratio"] == pytest.approx(row["slow_seconds"] / row["fast_seconds"])
        assert row["edits_a_second"] == pytest.approx(3 / row["fast_seconds"])
        assert row.get("difference", 0) <= 1e-10
