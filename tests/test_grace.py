"""GRACE against the paper, one token and one entry at a time in float64; the codebook as state of a session."""

import copy
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editkit import Edit, Fact, Session
from editkit.errors import ConfigError, EditkitError, ModelError
from editkit.methods.grace import GraceSettings, grace
from editkit.methods.rome import RomeSettings
from editkit.metrics.scoring import score_targets
from editkit.models.codebook import Codebook, books_of
from editkit.models.generate import generate
from editkit.models.installed import Installed, install, installed_on
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot, digests, tensors_of
from editkit.models.tokens import tokenise
from editkit.testing.tiny import EXPERTS, SITES, tiny_lm
from editkit.testing.untouched import count_hooks, plain_nll, tokens_of, untouched
from tests.conftest import Near
from tests.oracles import logits_of
from tests.test_session import FACTS
from tests.test_wrapped import SAME, state
from tests.test_wrapped_weights import DOWN, adapted

LONG = Fact("The city of {}", "The Eiffel Tower", "Berlin Madrid", "Paris")
FEW = GraceSettings(layer=1, steps=4, lr=0.1, radius=0.1)
Entry = tuple[Tensor, Tensor, float, str]  # key, value, ε, label


# The oracle


def site(family: str, layer: int) -> str:
    """The module of the codebook: the down-projection, or the MLP of a mixture."""
    where = SITES[family]
    return where.mlp_of(layer) if family in EXPERTS else where.down_of(layer)


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """In the body the module's output is change(input [tokens, d], output [tokens, d_model])."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        flat = change(args[0].reshape(-1, args[0].shape[-1]), whole.reshape(-1, whole.shape[-1])).reshape(whole.shape)
        return (flat, *output[1:]) if isinstance(output, tuple) else flat

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def looked_up(module: nn.Module, entries: Sequence[Entry]) -> AbstractContextManager[None]:
    """In the body each token whose input lies in a ball of the nearest key has its value, found by trying them all."""

    def change(given: Tensor, output: Tensor) -> Tensor:
        rows = []
        for x, m in zip(given, output, strict=True):
            distances = [((x - key.to(x)) ** 2).sum().sqrt().item() for key, *_ in entries]
            near = distances.index(min(distances))
            rows.append(entries[near][1].to(m) if distances[near] <= entries[near][2] else m)
        return torch.stack(rows)

    return hooked(module, change)


def entry_of(lm: LanguageModel, name: str, fact: Fact, settings: GraceSettings, start: str) -> tuple[Tensor, Tensor]:
    """Key and value: Adam by hand on a copy in float64, at full depth."""
    assert settings.steps is not None and settings.lr is not None
    model: Any = copy.deepcopy(lm.model).double()
    module = model.get_submodule(name)
    ids, count = tokens_of(lm, fact.text, fact.target_new)
    at = len(ids) - count - 1
    seen: dict[str, Tensor] = {}

    def keep(given: Tensor, output: Tensor) -> Tensor:
        seen["key"], seen["own"] = given[at].detach().clone(), output[at].detach().clone()  # Falcon adds in place
        return output

    with hooked(module, keep), torch.no_grad():
        logits_of(model, ids)
    if start == "warm":
        value = seen["own"].clone()
    else:
        drawn = hashlib.sha256(f"0|{fact.text}|{fact.target_new}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(drawn[:8], "little") >> 1)
        value = torch.rand(len(seen["own"]), generator=draw, dtype=torch.float64)
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    for step in range(1, settings.steps + 1):
        value.requires_grad_(True)

        def put(_: Tensor, output: Tensor, value: Tensor = value) -> Tensor:
            return torch.cat((output[:at], value[None], output[at + 1 :]))

        with hooked(module, put):
            loss = plain_nll(model, [(ids, count)])
        (gradient,) = torch.autograd.grad(loss, value)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        step_size = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        value = value.detach() - settings.lr * step_size
    return seen["key"], value


def folded(entries: Sequence[Entry]) -> list[Entry]:
    """What the entries give, added one after the other, from the rules."""
    book: list[list[Any]] = []
    for key, value, radius, label in entries:
        distances = [((key - k) ** 2).sum().sqrt().item() for k, *_ in book]
        if not book or min(distances) > radius + book[distances.index(min(distances))][2]:
            book.append([key, value, radius, label])
            continue
        near, d = book[distances.index(min(distances))], min(distances)
        if near[3] == label:
            near[2] = max(near[2], d)
        elif d <= 1e-3 * radius:
            near[0], near[1], near[3] = key, value, label
        else:
            near[2] = min(near[2], d / 2)
            book.append([key, value, min(radius, d / 2), label])
    return [(k, v, e, y) for k, v, e, y in book]


@pytest.mark.cells
@pytest.mark.parametrize("start", ["cold", "warm"])
@pytest.mark.parametrize("family", SITES)
def test_an_entry_is_the_oracles(family: str, start: str, near: Near) -> None:
    # Padded rows of gemma2 are not numbers in float64: transformers adds two masks of its least number.
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    facts = [FACTS[0], LONG, FACTS[2]]
    with torch.random.fork_rng():
        edit = grace(lm, facts, GraceSettings(layer=1, steps=4, lr=0.1, radius=0.2, start=start), progress=False)
    (book,) = edit.installed
    assert isinstance(book, Codebook) and book.module == site(family, 1) and edit.deltas == ()
    assert book.labels == ("Rome", "Berlin Madrid", "Oslo")
    for number, fact in enumerate(facts):
        key, value = entry_of(lm, book.module, fact, FEW, start)
        near("grace", family, book.keys[number], key, 1e-5)
        near("grace", family, book.values[number], value, 1e-4)
        assert book.radii[number].item() == pytest.approx(0.2 * key.norm().item(), rel=1e-5)
    report = edit.provenance["reports"][1]
    assert len(report["steps"]) == 5 and report["steps"][-1]["loss"] < report["steps"][0]["loss"]


def random_book(module: str, draw: torch.Generator, count: int, width: int = 6, labels: str = "abc") -> Codebook:
    return Codebook(
        module,
        torch.randn(count, width, generator=draw),
        torch.randn(count, 4, generator=draw),
        torch.rand(count, generator=draw) * 1.5 + 0.5,
        tuple(labels[i] for i in torch.randint(len(labels), (count,), generator=draw)),
    )


def listed(*books: Codebook) -> list[Entry]:
    return [
        (k.double(), v, e, y)
        for book in books
        for k, v, e, y in zip(book.keys, book.values, book.radii.tolist(), book.labels, strict=True)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_a_codebook_grows_and_splits_as_the_rules_say(seed: int) -> None:
    draw, model = torch.Generator().manual_seed(seed), nn.Linear(1, 1)
    books = [random_book("m", draw, count) for count in (5, 1, 7)]
    again = Codebook("m", books[0].keys[2:3] + 1e-5, -books[0].values[2:3], books[0].radii[2:3], ("another",))
    books.insert(1, again)  # the same prompt with another answer
    orders = [books[:1], books[:2], books, [books[0], *books[2:]], books[1:], books]
    for order in orders:  # growing, shorter, and other lists: what was kept must not show
        found = books_of(model, order)["m"]
        wanted = folded(listed(*order))
        assert found.labels == tuple(entry[3] for entry in wanted)
        torch.testing.assert_close(found.keys, torch.stack([entry[0].float() for entry in wanted]))
        assert torch.equal(found.values, torch.stack([entry[1] for entry in wanted]))
        torch.testing.assert_close(found.radii, torch.tensor([entry[2] for entry in wanted]), rtol=1e-5, atol=1e-6)
    kept, anew = (books_of(each, books)["m"] for each in (model, nn.Linear(1, 1)))
    assert len(kept.labels) < sum(len(book.labels) for book in books)
    assert torch.equal(kept.keys, anew.keys) and torch.equal(kept.radii, anew.radii)


@pytest.mark.parametrize("family", SITES)
def test_a_text_gives_what_a_search_by_hand_gives(family: str) -> None:
    """Whole, in packs with others, one token at a time with a cache; several entries, one of which hides another."""
    lm = tiny_lm(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    edit = grace(lm, [FACTS[0], LONG], GraceSettings(layer=1, steps=8, lr=0.3, radius=0.15), progress=False)
    (book,) = edit.installed
    assert isinstance(book, Codebook)
    wide = Codebook(book.module, book.keys, book.values.flip(0), 4 * book.radii, ("other", "wider"))
    both = Edit((), edit.base, installed=(book, wide))
    model: Any = copy.deepcopy(lm.model)
    entries = folded(listed(book, wide))
    prompts = [FACTS[0].text, LONG.text, "The old bridge of stone", LONG.text + " Berlin"]
    targets = ["Rome", "Berlin Madrid", "over the river", "Madrid"]
    with both.applied(lm), torch.no_grad(), looked_up(model.get_submodule(book.module), entries):
        scores = score_targets(lm, prompts, targets)
        for prompt, target, score in zip(prompts, targets, scores, strict=True):
            row = tokens_of(lm, prompt, target)
            wanted = plain_nll(model, [row]).item()
            assert score.nll == pytest.approx(wanted, rel=1e-4)
            assert plain_nll(lm.model, [row]).item() == pytest.approx(wanted, rel=1e-6)
        said = generate(lm, prompts[:3], 6)
        for prompt, text in zip(prompts, said, strict=False):
            ids = lm.tokenizer(prompt)["input_ids"]
            for _ in range(6):
                ids = [*ids, int(logits_of(model, ids)[-1].argmax())]
            assert text == lm.tokenizer.decode(ids[-6:], skip_special_tokens=True)
    assert (book.values[0] - wide.values[1]).norm() == 0 and len(entries) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom", "gemma2", "mixtral"])
def test_no_bit_changes_and_no_hook_is_left(family: str) -> None:
    lm = tiny_lm(family)
    fact = FACTS[0]
    module = SITES[family].down_projection or f"{SITES[family].mlp_of(1)}.experts"
    with untouched(lm, module.format(1)):
        edit = grace(lm, fact, FEW, progress=False)
    before, hooks, start = digests(tensors_of(lm.model)), count_hooks(lm.model), lm.digest
    row = [tokens_of(lm, fact.text, fact.target_new)]
    ids = torch.tensor([row[0][0]])
    with torch.no_grad():
        logits = lm.model(ids).logits
        with edit.applied(lm) as applied:
            assert digests(tensors_of(lm.model)) == before and count_hooks(lm.model) == hooks + 1
            assert lm.digest != start and not torch.equal(lm.model(ids).logits, logits)
            other: Any = copy.deepcopy(lm.model)
            assert torch.equal(other(ids).logits, logits)  # a copy has the weights, and no edit
        assert applied.reversal is not None and applied.reversal.exact
        assert torch.equal(lm.model(ids).logits, logits)
    assert (digests(tensors_of(lm.model)), count_hooks(lm.model), lm.digest) == (before, hooks, start)
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error), edit.applied(lm):
            raise error
        assert count_hooks(lm.model) == hooks and installed_on(lm.model) == ()


def test_what_is_left_on_a_model_is_found() -> None:
    lm = tiny_lm("gpt2")
    edit = grace(lm, FACTS[0], FEW, progress=False)
    snapshot = Snapshot.take(lm.model, [])
    install(lm.model, edit.installed)
    assert "a codebook of 1 entry at transformer.h.1.mlp.c_proj (still in force)" in snapshot.verify().unequal
    (hook,) = lm.model.get_submodule("transformer.h.1.mlp.c_proj")._forward_hooks.items()
    inside = Snapshot.take(lm.model, [])
    lm.model.get_submodule("transformer.h.1.mlp.c_proj")._forward_hooks.clear()  # by somebody else
    assert any("a hook that is gone" in each for each in inside.verify().unequal)
    inside.restore()
    assert inside.verify().exact and snapshot.verify().unequal
    snapshot.restore()
    assert snapshot.verify().exact
    lm.model.get_submodule("transformer.h.1.mlp.c_proj")._forward_hooks[hook[0]] = hook[1]
    lm.model.get_submodule("transformer.h.1.mlp.c_proj")._forward_hooks_with_kwargs[hook[0]] = True
    assert snapshot.verify().unequal == ("a hook on a Conv1D",)
    snapshot.restore()
    assert snapshot.verify().exact and count_hooks(lm.model) == 0


@pytest.mark.parametrize("where", ["editkit.methods.grace.log_softmax", "editkit.models.codebook.distances"])
def test_an_interrupt_leaves_what_was_in_force(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    with Session(lm, "grace", FEW, progress=False) as session:
        session.edit(FACTS[0])
        state, hooks = lm.digest, count_hooks(lm.model)

        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(where, interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.edit(FACTS[1])
        assert (lm.digest, count_hooks(lm.model), len(session.steps)) == (state, hooks, 1)
        session.edit(FACTS[1])
    assert count_hooks(lm.model) == 0


# The state of a session


def in_force(lm: LanguageModel) -> list[Installed]:
    return list(installed_on(lm.model))


def test_a_step_undone_leaves_the_codebook_of_the_others(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    start = lm.digest
    other = Fact(FACTS[0].prompt, FACTS[0].subject, "Berlin", "Paris")  # the same prompt
    settings = GraceSettings(layer=1, steps=30, lr=0.3, radius=0.1)
    with Session(lm, "grace", settings, progress=False) as session:
        steps = [session.edit(fact) for fact in (FACTS[0], FACTS[1], other)]
        assert in_force(lm) == [each for step in steps for each in step.installed]
        last = [score.nll for score in score_targets(lm, [other.text] * 2, ["Berlin", "Rome"])]
        state = lm.digest
        session.save(tmp_path)
        session.undo(2)
        first = [score.nll for score in score_targets(lm, [other.text] * 2, ["Berlin", "Rome"])]
        assert last[0] + 1 < first[0] and first[1] + 1 < last[1]  # the last answer counts, and then the first again
        undone = session.undo(0, rerun=True)
        assert undone.later == (0,) and in_force(lm) == [*steps[1].installed]
        alone = lm.digest
        rows = tokenise(lm, [FACTS[1].text, FACTS[0].text]).inputs()
        with torch.no_grad():
            logits = lm.model(**rows).logits
        assert session.relative_norm() == 0.0
    assert lm.digest == start and count_hooks(lm.model) == 0
    with Session.load(tmp_path, lm, progress=False) as again:
        assert lm.digest == state
        again.undo(0)
        again.undo(1)
        assert lm.digest == alone
        with torch.no_grad():
            assert torch.equal(lm.model(**rows).logits, logits)
        total = again.total()
    assert lm.digest == start
    with total.applied(lm):
        assert lm.digest == alone


def test_a_step_does_not_depend_on_what_else_is_edited_with_it() -> None:
    lm = tiny_lm("llama")
    together = grace(lm, FACTS, FEW, progress=False).installed[0]
    assert isinstance(together, Codebook)
    for number, fact in enumerate(FACTS):
        alone = grace(lm, fact, FEW, progress=False).installed[0]
        assert isinstance(alone, Codebook)
        torch.testing.assert_close(alone.values[0], together.values[number], rtol=1e-4, atol=1e-5)


def test_an_edit_of_weights_on_top_and_below() -> None:
    """Weights and codebooks are put on and off apart from each other, in any order."""
    lm = tiny_lm("gpt2")
    start = lm.digest
    of_module = grace(lm, FACTS[0], FEW, progress=False)
    rome_settings = RomeSettings(layer=1, steps=2)
    with of_module.applied(lm):
        with Session(lm, "rome", rome_settings, progress=False) as session:
            session.edit(FACTS[1])
            assert in_force(lm) == [*of_module.installed]
        assert in_force(lm) == [*of_module.installed]
    assert lm.digest == start


@pytest.mark.parametrize("wrapping", [*SAME, "under an adapter"])
def test_a_wrapped_model_is_asked_through_the_codebook(wrapping: str) -> None:
    plain = tiny_lm("gpt2")
    if wrapping == "under an adapter":
        lm, outer = adapted("gpt2", DOWN["gpt2"])
        merged: Any = copy.deepcopy(outer).merge_and_unload()
        plain = replace(plain, model=merged.eval())
    else:
        lm = SAME[wrapping](tiny_lm("gpt2"))
    before, edit = state(lm.model), grace(lm, FACTS[0], FEW, progress=False)
    wanted = grace(plain, FACTS[0], FEW, progress=False)
    asked = [FACTS[0].text, "The old bridge"], ["Rome", "of stone"]
    with edit.applied(lm), wanted.applied(plain):
        ours, exact = score_targets(lm, *asked), score_targets(plain, *asked)
    assert [score.nll for score in ours] == pytest.approx([score.nll for score in exact], rel=1e-4)
    assert ours[0].nll != pytest.approx(score_targets(lm, *asked)[0].nll, rel=1e-3)
    assert state(lm.model) == before


# Files and refusals


def test_a_file_holds_it(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = grace(lm, FACTS, FEW, progress=False)
    path = edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(path)
    assert again.to_bytes() == edit.to_bytes() == path.read_bytes() and again.digest == edit.digest
    assert again.installed[0].digest == edit.installed[0].digest
    row = tokenise(lm, [FACTS[0].text]).inputs()
    with torch.no_grad(), edit.applied(lm):
        logits = lm.model(**row).logits
    with torch.no_grad(), again.applied(lm):
        assert torch.equal(lm.model(**row).logits, logits)
    half = again.in_dtype_of(tiny_lm("llama", dtype=torch.bfloat16))
    assert half.installed == again.installed and half.base.dtype == "bfloat16"
    with pytest.raises(EditkitError, match="other weights than the edited ones differ"):
        again.apply(tiny_lm("llama", seed=1))
    with pytest.raises(EditkitError, match="codebook on model.layers.1.mlp.down_proj, which the model does not have"):
        again.apply(tiny_lm("gpt2"), check=False)


def test_what_needs_a_change_of_weights_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    edit = grace(lm, FACTS[0], FEW, progress=False)
    assert (edit.rank, edit.norm(), edit.parameters) == (0, 0.0, [])
    for act in (lambda: edit.to_peft(tmp_path), lambda: edit + edit, lambda: 2.0 * edit):
        with pytest.raises(EditkitError, match="is for changes of weights, and this edit is a codebook of 1 entry at"):
            act()
    refused: list[dict[str, Any]] = [{"transform": "prune"}, {"simie": 1e4}, {"epsilon": -1.0}, {"start": "hot"}]
    for wrong in [*refused, {"steps": 0}]:
        with pytest.raises(ConfigError):
            GraceSettings(**wrong)
    with pytest.raises(ModelError, match="Layer 9 was asked for"):
        grace(lm, FACTS[0], GraceSettings(layer=9))
    with pytest.raises(EditkitError, match="not finite"):
        grace(lm, FACTS[0], GraceSettings(layer=1, steps=3, lr=1e30), progress=False)
    assert count_hooks(lm.model) == 0


def test_the_settings_of_a_model() -> None:
    unknown = GraceSettings().resolved("my-model", 12)
    assert (unknown.layer, unknown.epsilon, unknown.radius) == (8, None, 0.3)
    assert (unknown.steps, unknown.lr, unknown.start) == (100, 1.0, "cold")
    asked = GraceSettings(radius=0.1).resolved("gpt2-xl", 48)
    assert (asked.epsilon, asked.radius) == (None, 0.1)
    assert (
        GraceSettings().resolved("gpt2-xl", 48).layer == 35 and GraceSettings().resolved("gpt2-xl", 48).epsilon == 1.0
    )
