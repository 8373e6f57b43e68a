"""After an edit only its blocks run again, and a sweep asks the unedited model once: the same bits either way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config import _composed as composed
from editkit.config import to_config
from editkit.data.atlas import atlas_cases
from editkit.metrics.measure import look
from editkit.metrics.scoring import score_probes
from editkit.models.architecture import experts_in, weight_name
from editkit.models.columns import Below, Packed, columns
from editkit.models.experts import down_of
from editkit.models.load import LanguageModel
from editkit.nethook import get_module
from editkit.runs import names
from editkit.settings import MeasureSettings
from editkit.tasks import common, get_task
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import count_hooks
from tests.covering import spread
from tests.test_tree import FAMILIES, TEXTS, asked, wide_lm


def blocks_run(lm: LanguageModel) -> tuple[list[int], Callable[[], None]]:
    """The numbers of the blocks that run from now on, and how to stop looking."""
    seen: list[int] = []
    modules = [get_module(lm.model, lm.architecture.block.format(block)) for block in range(lm.layers)]
    forwards = [module.forward for module in modules]  # hooks would be noticed

    def watched(number: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.append(number)
            return forwards[number](*args, **kwargs)

        return run

    for number, module in enumerate(modules):
        module.forward = watched(number)

    def stop() -> None:
        for module in modules:
            del module.__dict__["forward"]

    return seen, stop


@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_edit_only_its_blocks_run_and_every_bit_is_the_same(family: str) -> None:
    lm = wide_lm(family)
    rows, first, last = asked(lm)
    hooks = count_hooks(lm.model)
    for start in range(lm.layers):
        held = down_of(lm, start)
        weight = lm.model.get_parameter(weight_name(held, experts_in(get_module(lm.model, held))))
        held, below = weight.detach().clone(), Below(lm, start)
        below.refresh()
        before = columns(lm, rows, first, last, below)
        assert torch.equal(before.final, columns(lm, rows, first, last).final)
        with torch.no_grad():
            weight.mul_(1.5)
        wanted = columns(lm, rows, first, last)
        below.refresh()
        seen, stop = blocks_run(lm)
        found = columns(lm, rows, first, last, below)
        stop()
        with torch.no_grad():
            weight.copy_(held)
        assert torch.equal(found.final, wanted.final) and not torch.equal(found.final, before.final)
        assert family == "bloom" or (isinstance(found, Packed) and seen == [*range(start, lm.layers)])
    assert count_hooks(lm.model) == hooks


@pytest.mark.parametrize("change", ["written", "replaced", "buffer", "hooked", "embedding"])
def test_a_change_below_makes_it_run_whole(change: str) -> None:
    lm = tiny_lm("gpt2")
    rows, first, last = asked(lm)
    below = Below(lm, 1)
    below.refresh()
    columns(lm, rows, first, last, below)
    block: Any = get_module(lm.model, "transformer.h.0")
    with torch.no_grad():
        if change == "written":
            block.mlp.c_fc.weight[0, 0] += 1
        elif change == "replaced":
            block.mlp.c_fc.weight = torch.nn.Parameter(2 * block.mlp.c_fc.weight)
        elif change == "embedding":
            lm.model.get_parameter("transformer.wte.weight")[5] += 1
        elif change == "buffer":
            block.register_buffer("more", torch.ones(1))
        else:
            block.register_forward_hook(lambda module, args, output: 2 * output)
    below.refresh()
    seen, stop = blocks_run(lm)
    found = columns(lm, rows, first, last, below)
    stop()
    assert 0 in seen
    assert torch.equal(found.final, columns(lm, rows, first, last).final)


def test_without_room_it_runs_whole_and_other_texts_are_not_mistaken() -> None:
    lm = tiny_lm("gpt2")
    rows, first, last = asked(lm)
    small, below = Below(lm, 1, room=100), Below(lm, 1)
    for each in (small, below):
        each.refresh()
        columns(lm, rows, first, last, each)
    seen, stop = blocks_run(lm)
    columns(lm, rows, first, last, small)
    columns(lm, *asked(lm, [text.replace("Louvre", "Tower") for text in TEXTS]), below)
    stop()
    assert seen.count(0) >= 2


def test_a_model_that_does_something_between_its_blocks_and_its_norm_runs_whole() -> None:
    """What is run on from the stream is compared with the model once."""
    lm = tiny_lm("gpt2")
    rows, first, last = asked(lm)
    handle = get_module(lm.model, "transformer").register_forward_hook(
        lambda module, args, output: setattr(output, "last_hidden_state", output.last_hidden_state + 1)
    )
    below = Below(lm, 1)
    for _ in range(2):
        below.refresh()
        found = columns(lm, rows, first, last, below)
        assert torch.equal(found.final, columns(lm, rows, first, last).final)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_look_is_the_look_without_memory(dtype: torch.dtype) -> None:
    lm = tiny_lm("llama", dtype=dtype)
    case = atlas_cases(1)[0]
    below = Below(lm, 2)
    settings = MeasureSettings(fluency=0)
    first = look(lm, case, settings, below=below)
    assert first == look(lm, case, settings) and len(below._kept) == 1
    weight = lm.model.get_parameter(f"{lm.architecture.down(2)}.weight")
    with torch.no_grad():
        weight.mul_(2)
    seen, stop = blocks_run(lm)
    score_probes(lm, case.probes, below)  # other texts, without the distracted ones: run whole
    kept = look(lm, case, replace(settings, generate=0), below=below)
    stop()
    assert kept.scores == look(lm, case, settings).scores != first.scores
    assert seen.count(0) == 1 and seen.count(2) == 2


def test_an_exception_leaves_nothing_hooked_and_nothing_kept() -> None:
    lm = tiny_lm("gpt2")
    rows, first, last = asked(lm)
    hooks, below = count_hooks(lm.model), Below(lm, 1)
    below.refresh()
    block = get_module(lm.model, "transformer.h.2")

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    block.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        columns(lm, rows, first, last, below)
    del block.__dict__["forward"]
    assert count_hooks(lm.model) == hooks and not below._kept
    assert torch.equal(columns(lm, rows, first, last, below).final, columns(lm, rows, first, last).final)


@pytest.mark.parametrize("task", spread(["benchmark", "lifelong"], 2))
def test_the_methods_of_a_sweep_ask_the_unedited_model_once(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "_befores", {})
    asked: list[str] = []

    def counting(lm: LanguageModel, case: Any, *rest: Any) -> Any:
        asked.append(case.id)
        return look(lm, case, *rest)

    monkeypatch.setattr(common, "look", counting)
    few = {"data.limit": "1", "method.steps": "2", "moments.enabled": "false", "task.measure.generate": "1"}
    few |= {"task.untouched": "1"} if task == "lifelong" else {"task.measure.fluency": "8"}
    run = get_task(task).load()

    def tables(name: str, method: str) -> list[bytes]:
        (tmp_path / name).mkdir()
        run(to_config(composed({"task": task, "method": method} | few)), tmp_path / name, lambda _: None)
        if task == "benchmark":
            return [(tmp_path / name / file).read_bytes() for file in ("cases.parquet", "summary.csv")]
        _, *points = (tmp_path / name / names.POINT_LINES).read_bytes().splitlines()
        return points

    tables("one", "r_rome")
    number = len(asked)
    second = tables("two", "ft_l")
    assert len(asked) == number > 0
    monkeypatch.setattr(common, "_befores", {})
    assert tables("three", "ft_l") == second and len(asked) == 2 * number


def test_what_a_sweep_keeps_is_of_one_question_and_bounded(
    monkeypatch: pytest.MonkeyPatch, atlas_lm: LanguageModel
) -> None:
    monkeypatch.setattr(common, "_befores", {})
    monkeypatch.setattr(common, "MOST_BEFORES", 2)
    asked: list[int] = []
    monkeypatch.setattr(common, "look", lambda *given: asked.append(1))
    config = to_config(composed({"task": "benchmark"}))
    case, *others = atlas_cases(3)
    common.look_before(atlas_lm, "digest", case, config, None)
    common.look_before(atlas_lm, "digest", case, replace(config, method_name="ft", device="cpu"), None)
    assert len(asked) == 1
    measure = replace(config.task, measure=replace(config.task.measure, generate=0))
    for number, other in enumerate((replace(config, seed=1), replace(config, task=measure))):
        common.look_before(atlas_lm, "digest", case, other, None)
        assert len(asked) == 2 + number
    common.look_before(atlas_lm, "another", case, config, None)
    for other_case in others:
        common.look_before(atlas_lm, "digest", other_case, config, None)
    assert len(asked) == 6 and len(common._befores) == 2
