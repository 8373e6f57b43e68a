"""Edits of mixtures of experts: what they write, that they come off, their files and adapters, and the routing."""

import copy
import json
import pkgutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from editkit import Edit, RomeSettings, Session, rome
from editkit.edits import base_of, dense_delta, low_rank_delta, routing_change, spectra
from editkit.errors import EditkitError
from editkit.methods import get_method, names
from editkit.methods.ft import FtSettings, ft
from editkit.methods.lora import LoraSettings, lora
from editkit.methods.mend import Mend, rank_one_gradients
from editkit.methods.shared.transforms import prune, rect
from editkit.metrics.scoring import score_targets
from editkit.models.experts import down_of, site_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.nethook import Trace
from editkit.testing.tiny import EXPERTS, tiny_lm
from editkit.testing.untouched import everything, plain_nll, tokens_of, untouched
from tests.expert_oracle import Experts, gates_of, memory_of
from tests.run_folders import really_run
from tests.test_experts import CONTEXTS, FACT, FACTS, MOMENTS, TEXT
from tests.test_methods import SETTINGS

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),  # on tiny random models it is large
    pytest.mark.filterwarnings("ignore:The second moment at"),  # and few tokens are read
]


def random_edit(lm: LanguageModel, layers: list[int], rank: int = 2, size: float = 0.2) -> Edit:
    deltas = []
    for layer in layers:
        draw = torch.Generator().manual_seed(layer)
        site = down_of(lm, layer)
        d_model, width = memory_of(lm.model, site_of(lm, layer)).matrix().shape
        left, right = (torch.randn(shape, generator=draw) for shape in ((d_model, rank), (rank, width)))
        deltas.append(low_rank_delta(lm, site, size * left, size * right))
    return Edit(tuple(deltas), base_of(lm))


class Stop(Exception):
    pass


@pytest.mark.parametrize("family", EXPERTS)
def test_an_edit_writes_the_chosen_experts_alone_and_comes_off(family: str) -> None:
    lm = tiny_lm(family)
    settings = RomeSettings(layer=1, steps=3, lr=0.1, stop_loss=0.0)
    with untouched(lm, down_of(lm, 1)):
        edit = rome(lm, FACT, settings, moments=MOMENTS, contexts=["{}"], progress=False)
    before = everything(lm.model)
    (delta,) = edit.deltas
    assert delta.right is not None and delta.experts is not None
    written = delta.right.view(delta.experts, -1).any(1)
    assert written.sum() == lm.model.config.num_experts_per_tok < delta.experts
    slices = torch.empty(0)
    with pytest.raises(Stop), edit.applied(lm):
        now = everything(lm.model)
        assert [name for name in now if not torch.equal(now[name], before[name])] == [delta.parameter]
        moved = (now[delta.parameter] != before[delta.parameter]).flatten(1).any(1)
        assert torch.equal(moved, written)
        slices = torch.stack(Experts(lm.model, site_of(lm, 1)).slices()).detach()
        raise Stop
    assert all(torch.equal(bits, before[name]) for name, bits in everything(lm.model).items())
    own = torch.stack(Experts(lm.model, site_of(lm, 1)).slices()).detach()
    change = torch.stack(list(delta.change().chunk(delta.experts, 1)))  # [E, d_model, d_ff]
    torch.testing.assert_close(slices, (own.double() + change).float(), rtol=0, atol=1e-6)


@pytest.mark.cells
@pytest.mark.parametrize("method", names())
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_method_leaves_the_model_as_it_was(family: str, method: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    found = get_method(method)
    options: dict[str, Any] = {
        "steps": 2,
        "layer": 1,
        "layers": (1,),
        "tokens": 256,
        "warm_up": 256,
        "end_of_text": False,
    }
    if method == "mend":
        options["hypernetwork"] = str(Mend.for_model(lm, [1], rank=2, lr=0.01).save(tmp_path / "mend.safetensors"))
    fields = found.settings.__dataclass_fields__
    settings = found.settings(**{k: v for k, v in options.items() if k in fields})
    with untouched(lm, down_of(lm, 1)):
        edit = found(lm, FACT, settings, moments=MOMENTS, progress=False)
    before = everything(lm.model)
    with edit.applied(lm) as applied:
        assert edit.norm() > 0 or edit.installed
    assert applied.reversal is not None and applied.reversal.exact
    assert all(torch.equal(bits, before[name]) for name, bits in everything(lm.model).items())


@pytest.mark.parametrize("where", ["editkit.methods.shared.value.kl_div", "editkit.methods.shared.spread.mean_keys"])
def test_an_interrupt_leaves_the_model_as_it_was(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop, and between two blocks, when the first is written."""
    lm = tiny_lm("gpt_oss")
    calls, original = list[int](), pkgutil.resolve_name(":".join(where.rsplit(".", 1)))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(where, interrupted)
    settings: Any = replace(SETTINGS["memit"], layers=[1, 2], steps=3)
    with untouched(lm, down_of(lm, 1)), pytest.raises(KeyboardInterrupt):
        get_method("memit")(lm, FACTS, settings, moments=MOMENTS, contexts=CONTEXTS, progress=False)
    assert len(calls) == 2


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_algebra_files_and_sessions(family: str, dense: bool, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    edit = random_edit(lm, [1])
    if dense:
        edit = replace(edit, deltas=(dense_delta(lm, down_of(lm, 1), edit.deltas[0].change()),))
    (delta,) = edit.deltas
    assert delta.bias is (family == "gpt_oss") and delta.orientation == ("in_out" if family == "gpt_oss" else "out_in")
    stored = lm.model.get_parameter(delta.parameter)
    assert delta.matrix().shape == stored.shape
    for index, part in delta.parts():
        torch.testing.assert_close(delta.matrix()[index], part)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    assert again.digest == edit.digest and again.deltas[0].experts == 4
    once = stored.detach().clone()
    with again.applied(lm):
        torch.testing.assert_close(stored.detach(), once + delta.matrix())
    with (edit + edit).applied(lm):
        torch.testing.assert_close(stored.detach(), once + 2 * delta.matrix())
    assert (edit - edit).norm() <= 1e-6 * edit.norm()
    half = edit.in_dtype_of(tiny_lm(family, dtype=torch.bfloat16))
    assert half.base.dtype == "bfloat16" and torch.equal(half.deltas[0].change(), delta.change())
    other = tiny_lm("mixtral" if family == "gpt_oss" else "gpt_oss", dtype=torch.bfloat16)
    with pytest.raises(EditkitError, match="does not fit|do not fit|is stored"):
        edit.in_dtype_of(other)
    (spectrum,) = spectra(edit, lm)
    assert spectrum.rounding_error is not None and spectrum.rounding_error < 1e-5
    assert len(spectrum.values) == (2 if not dense else 32)
    for transform in (rect, prune):
        changed = transform(lm, edit)
        with changed.applied(lm):
            torch.testing.assert_close(stored.detach(), once + changed.deltas[0].matrix())
    assert torch.equal(stored.detach(), once)


def test_a_session_of_two_facts_and_one_taken_back() -> None:
    lm = tiny_lm("deepseek_v3")
    before = everything(lm.model)
    settings = RomeSettings(layer=1, steps=3)
    with Session(lm, "rome", settings, moments=MOMENTS, progress=False) as session:
        for fact in FACTS[:2]:
            session.edit(fact)
        both = lm.model.get_parameter("model.layers.1.mlp.experts.down_proj").detach().clone()
        session.undo(0)
        one = lm.model.get_parameter("model.layers.1.mlp.experts.down_proj").detach().clone()
    assert not torch.equal(both, one)
    assert all(torch.equal(bits, before[name]) for name, bits in everything(lm.model).items())


def test_mends_pairs_are_the_gradient_of_the_weight() -> None:
    """Σ g κᵀ is autograd's gradient of [W_1 … W_E], of a fact's mean −log p."""
    for family in EXPERTS:
        lm = tiny_lm(family)
        pairs, _ = rank_one_gradients(lm, [down_of(lm, 1)], [FACT])
        ((k, g),) = pairs.values()
        memory = Experts(lm.model, site_of(lm, 1))
        (gradient,) = torch.autograd.grad(
            plain_nll(lm.model, [tokens_of(lm, FACT.text, FACT.target_new)]), memory.experts.get_parameter("down_proj")
        )
        slices = [each.T if family == "gpt_oss" else each for each in gradient]
        wanted = torch.cat(slices, 1).double()
        assert (g.double().T @ k.double() - wanted).norm() <= 1e-4 * wanted.norm() > 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_ft_is_adam_on_the_experts(family: str) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    edit = ft(lm, FACT, FtSettings(layer=1, steps=4, lr=1e-2, stop_loss=0.0), progress=False)
    model = copy.deepcopy(lm.model)
    memory = Experts(model, site_of(lm, 1))
    weight, start = memory.experts.get_parameter("down_proj"), memory.matrix().detach().clone()
    adam = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(4):
        adam.zero_grad()
        plain_nll(model, [tokens_of(lm, FACT.text, FACT.target_new)]).backward()
        adam.step()
    change = memory.matrix().detach() - start
    assert (edit.deltas[0].change() - change).norm() <= 1e-5 * change.norm() > 0


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # peft does not look for parameters
@pytest.mark.parametrize("family", EXPERTS)
def test_peft_gives_the_logits_of_the_edited_model(family: str, tmp_path: Path) -> None:
    """Over blocks 0 and 2, of which DeepSeek's and Qwen2-MoE's first is dense."""
    lm = tiny_lm(family)
    edit = Edit((*random_edit(lm, [0], rank=1).deltas, *random_edit(lm, [2], rank=3).deltas), base_of(lm))
    ids = tokenise(lm, [TEXT]).inputs()
    with torch.no_grad():
        plain = lm.model(**ids).logits
        with edit.applied(lm):
            edited = lm.model(**ids).logits
    assert max(edit.to_peft(tmp_path).values()) == 0.0
    adapted = peft.PeftModel.from_pretrained(lm.model, tmp_path)
    with torch.no_grad():
        found = adapted(**ids).logits
    assert (edited - plain).abs().max() > 0.1
    torch.testing.assert_close(found, edited, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_adapter_that_lora_trained_is_its_edit(family: str) -> None:
    """The edited model's loss goes on where the tuning's losses ended; over a dense block too, where there is one."""
    lm = tiny_lm(family)
    settings = LoraSettings(layers=(0, 1), rank=3, alpha=5.0, steps=40, lr=1e-3, stop_loss=0.0)
    edit = lora(lm, FACT, settings, progress=False)
    losses = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    with edit.applied(lm):
        (score,) = score_targets(lm, [FACT.text], [FACT.target_new])
    assert losses[-1] < 0.9 * losses[0] and losses[-1] * 0.9 < score.nll < losses[-1]


# Routing


def test_routing_is_that_of_plain_loops_before_and_after() -> None:
    lm = tiny_lm("mixtral")
    edit = random_edit(lm, [1], size=0.4)
    prompts = [TEXT, "Rome", FACT.text]
    found = routing_change(lm, edit, prompts)
    assert found.layers == (1, 2) and found.prompts == tuple(prompts)
    assert not found.changed[0].any() and not found.shift[0].any() and not found.last[0].any()  # its own block

    def gates(prompt: str) -> list[dict[int, Tensor]]:
        site = site_of(lm, 2)
        with torch.no_grad(), Trace(lm.model, site, inputs=True) as trace:
            lm.model(**tokenise(lm, [prompt]).inputs(), use_cache=False)
        memory = Experts(lm.model, site)
        with torch.no_grad():
            return [gates_of("mixtral", memory.config, memory.router, x) for x in trace.input[0]]

    for place, prompt in enumerate(prompts):
        before = gates(prompt)
        with edit.applied(lm):
            after = gates(prompt)
        other = [set(a) != set(b) for a, b in zip(before, after, strict=True)]
        shifts = [
            sum(abs(a.get(e, torch.zeros(())) - b.get(e, torch.zeros(()))) for e in {*a, *b}) / 2
            for a, b in zip(before, after, strict=True)
        ]
        assert found.changed[1, place].item() == pytest.approx(sum(other) / len(other))
        assert bool(found.last[1, place]) == other[-1]
        assert found.shift[1, place].item() == pytest.approx(float(max(shifts)), rel=1e-3)
    assert 0 < found.changed[1].mean() < 1
    with pytest.raises(EditkitError, match="the weight in 'tiny-mixtral' is"):
        routing_change(tiny_lm("mixtral", seed=1), edit, prompts)


def test_the_edit_and_the_run_report_the_routing(tmp_path: Path) -> None:
    lm = tiny_lm("qwen3_moe")
    settings: Any = replace(SETTINGS["memit"], layers=[0, 1], steps=3)
    for edit in (
        rome(lm, FACT, RomeSettings(layer=1, steps=3), moments=MOMENTS, contexts=["{}"], progress=False),
        get_method("memit")(lm, FACTS, settings, moments=MOMENTS, contexts=CONTEXTS, progress=False),
    ):
        report = edit.provenance["routing"]
        own = routing_change(lm, edit, [fact["prompt"].format(fact["subject"]) for fact in edit.provenance["facts"]])
        assert report == own.to_json() and report["prompts"] == len(edit.provenance["facts"])
    plain = tiny_lm("llama")
    edit = rome(plain, FACT, RomeSettings(layer=1, steps=2), moments=MOMENTS, contexts=["{}"], progress=False)
    assert "routing" not in edit.provenance and routing_change(plain, edit, [TEXT]).layers == ()

    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    run = [
        "edit=gpt2_fact",
        f"model.name={tmp_path / 'model'}",
        "method=rome",
        "method.layer=0",
        "method.steps=2",
        "moments.tokens=2000",
    ]
    folder = really_run(tmp_path / "run", *run)
    record = json.loads((folder / "record.json").read_text())
    assert record["edit"]["routing"].keys() >= {"rewrite", "neighborhood"}
    assert record["edit"]["routing"]["neighborhood"]["layers"] == [0, 1, 2] and record["reversal"]["exact"]
