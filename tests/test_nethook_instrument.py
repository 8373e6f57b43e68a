"""InstrumentedModel: captures and edits that stay on a model, are listed, switched and removed."""

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from editkit.nethook import HookError, InstrumentedModel, NameNotFound, Trace
from editkit.testing.tiny import SITES, build
from editkit.testing.untouched import count_hooks
from tests.hooking import IDS, logits, loss_of

MLPS = [f"transformer.h.{i}.mlp" for i in range(3)]


@pytest.fixture
def fresh() -> Iterator[PreTrainedModel]:
    """A model of each test's own; no test may leave a hook on it or change what it says."""
    model = build("gpt2")
    hooks, said = count_hooks(model), logits(model).detach().clone()
    yield model
    assert count_hooks(model) == hooks
    assert torch.equal(logits(model), said)


def double(h: torch.Tensor) -> torch.Tensor:
    return 2 * h


@pytest.mark.parametrize("family", SITES)
def test_edits_equal_those_of_a_trace(family: str) -> None:
    model = build(family)
    sites = [SITES[family].block.format(0), SITES[family].attention.format(1)]
    with Trace(model, sites, edit=double) as trace:
        wanted = logits(model)
    with InstrumentedModel(model, retain=sites) as im:
        im.add("double", sites, edit=double)
        assert torch.equal(logits(im), wanted)
        for site in sites:
            assert torch.equal(im[site].output, trace[site].output)
    assert count_hooks(model) == 0


def test_it_is_used_as_the_model_itself(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh, retain="transformer.h.*.mlp") as im:
        assert im.config is fresh.config
        assert len(list(im.parameters())) == len(list(fresh.parameters()))
        assert torch.equal(
            im.generate(IDS, max_new_tokens=4, do_sample=False),
            cast(Any, fresh).generate(IDS, max_new_tokens=4, do_sample=False),
        )
        assert im.retained == MLPS
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = im.no_such_thing


def test_retained_is_of_the_latest_forward_pass(fresh: PreTrainedModel, recwarn: pytest.WarningsRecorder) -> None:
    with InstrumentedModel(fresh, retain=MLPS[1]) as im:
        with pytest.raises(HookError, match="has not run yet"):
            _ = im[MLPS[1]].output
        im(IDS)
        im(IDS[:, :3])
        assert im[MLPS[1]].output.shape == (2, 3, 32)
        assert im[MLPS[1]].count == 1
        im.clear()
        with pytest.raises(HookError, match="has not run yet"):
            _ = im[MLPS[1]].output
        im(IDS)
    assert im[MLPS[1]].output.shape == (2, 7, 32)  # can be read after closing
    assert not [w for w in recwarn if "ran" in str(w.message)]


def test_every_call_of_a_generation_is_kept_on_request(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh, retain=MLPS[0], calls="all", positions=-1) as im:
        im.generate(IDS, max_new_tokens=4, do_sample=False)
        assert [c.output.shape for c in im[MLPS[0]].calls] == [(2, 32)] * 4


def test_rules_apply_in_the_order_added(fresh: PreTrainedModel) -> None:
    with Trace(fresh, MLPS[0]) as plain:
        fresh(IDS)
    with InstrumentedModel(fresh, retain=MLPS[0]) as im:
        im.add("double", MLPS, edit=double)
        im.add("plus one", MLPS[:1], edit=lambda h: h + 1)
        im(IDS)
        assert torch.equal(im[MLPS[0]].output, 2 * plain.output + 1)
        im.remove("double")
        im.add("double", MLPS[:1], edit=double)
        im(IDS)
        assert torch.equal(im[MLPS[0]].output, 2 * (plain.output + 1))
        assert [(r.name, r.sites, r.option, r.on) for r in im.rules] == [
            ("plus one", (MLPS[0],), "edit", True),
            ("double", (MLPS[0],), "edit", True),
        ]


def test_rules_are_switched(fresh: PreTrainedModel) -> None:
    plain = changed = logits(fresh)
    with InstrumentedModel(fresh) as im:
        im.add("double", "transformer.h.*", edit=double, on=False)
        assert torch.equal(logits(im), plain)
        with pytest.raises(KeyError), im.switched("double"):
            changed = logits(im)
            raise KeyError
        assert not torch.allclose(changed, plain, atol=1e-2)
        assert torch.equal(logits(im), plain)
        im.switch("double", on=True)
        assert torch.equal(logits(im), changed)


def test_inputs_and_gradients_are_edited_and_kept(fresh: PreTrainedModel) -> None:
    with Trace(fresh, MLPS[1], inputs=True, grads=True) as plain:
        loss_of(logits(fresh)).backward()
    fresh.zero_grad()
    with InstrumentedModel(fresh, retain=MLPS[1], inputs=True, grads=True, when="before_edit") as im:
        im.add("grow", MLPS[1], edit_input=lambda h, site: h + len(site))
        im.add("reverse", MLPS[1], edit_grad=lambda g: -g)
        loss_of(logits(im)).backward()
        assert torch.equal(im[MLPS[1]].input, plain.input)
        im.switch("grow", on=False)
        fresh.zero_grad()
        loss_of(logits(im)).backward()
        assert torch.allclose(im[MLPS[1]].grad, plain.grad)
    fresh.zero_grad()


def test_no_gradient_is_no_error(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh, retain=MLPS[1], grads=True) as im:
        with torch.no_grad():
            im(IDS)
        with pytest.raises(HookError, match="No gradient has reached"):
            _ = im[MLPS[1]].grad
        im.generate(IDS, max_new_tokens=2)
        loss_of(logits(im)).backward()
        assert im[MLPS[1]].grad.abs().sum() > 0
    fresh.zero_grad()


def test_before_and_after_edit(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh) as im:
        im.retain(MLPS[0], when="before_edit")
        im.add("double", MLPS[0], edit=double)
        im(IDS)
        before = im[MLPS[0]].output
        im.retain(MLPS[0])
        im(IDS)
        assert torch.equal(im[MLPS[0]].output, 2 * before)


def test_adding_a_rule_keeps_what_is_retained(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh, retain=MLPS[0]) as im:
        im(IDS)
        kept = im[MLPS[0]].output
        im.add("double", MLPS[2], edit=double)
        assert im[MLPS[0]].output is kept


def test_other_threads_are_left_alone(fresh: PreTrainedModel) -> None:
    plain, heard = logits(fresh), []
    with InstrumentedModel(fresh, retain=MLPS[0]) as im:
        im.add("double", "transformer.h.*", edit=double)
        thread = threading.Thread(target=lambda: heard.append(logits(fresh)))
        thread.start()
        thread.join()
        assert torch.equal(heard[0], plain)
        with pytest.raises(HookError, match="has not run"):
            _ = im[MLPS[0]].output


def test_a_copy_of_the_model_is_free_of_it(fresh: PreTrainedModel) -> None:
    plain = logits(fresh)
    with InstrumentedModel(fresh, retain=MLPS[0]) as im:
        im.add("double", "transformer.h.*", edit=double)
        assert torch.equal(logits(copy.deepcopy(fresh)), plain)


@pytest.mark.parametrize(
    ("ask", "wanted"),
    [
        (lambda im: im.add("x", MLPS[0]), "give one of edit, edit_input, edit_grad"),
        (lambda im: im.add("x", MLPS[0], edit=double, edit_grad=double), "give one of"),
        (lambda im: im.add("taken", MLPS[0], edit=double), "a rule 'taken' already"),
        (lambda im: im.add("x", "transformer.h.7.mlp", edit=double), "has no module 'transformer.h.7.mlp'"),
        (lambda im: im.add("x", "transformer.*.mlps", edit=double), "matches 'transformer.*.mlps'"),
        (lambda im: im.retain(MLPS[0], stop=True), "['stop'] is no option"),
        (lambda im: im.retain(MLPS[0], when="never"), "when='never'"),
        (lambda im: im.remove("x"), "no rule 'x': the rules are taken"),
        (lambda im: im.switch("x", on=True), "no rule 'x'"),
        (lambda im: im["transformer.h.2.mlp"], "is not retained"),
    ],
)
def test_refusals_change_nothing(
    fresh: PreTrainedModel, ask: Callable[[InstrumentedModel], object], wanted: str
) -> None:
    with InstrumentedModel(fresh, retain=MLPS[0]) as im:
        im.add("taken", MLPS[1], edit=double)
        hooks, said = count_hooks(fresh), logits(im)
        with pytest.raises((HookError, NameNotFound)) as error:
            ask(im)
        assert wanted in str(error.value)
        assert count_hooks(fresh) == hooks
        assert torch.equal(logits(im), said)
        assert [r.name for r in im.rules] == ["taken"]


def test_a_failing_start_leaves_no_hook(fresh: PreTrainedModel) -> None:
    with pytest.raises(NameNotFound):
        InstrumentedModel(fresh, retain="nothing")


def test_closed_is_closed(fresh: PreTrainedModel) -> None:
    im = InstrumentedModel(fresh, retain=MLPS[0])
    im.close()
    im.close()
    with pytest.raises(HookError, match="closed"):
        im.add("x", MLPS[0], edit=double)


def test_a_rule_that_returns_nothing_is_named(fresh: PreTrainedModel) -> None:
    with InstrumentedModel(fresh) as im:
        im.add("forgetful", MLPS[0], edit=cast(Any, lambda h: None))
        with pytest.raises(HookError, match=r"rule 'forgetful' \(edit\) at 'transformer.h.0.mlp' returned NoneType"):
            im(IDS)
