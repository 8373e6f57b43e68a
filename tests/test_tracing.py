"""Causal tracing: replay against the whole model, in every family, and both against a loop of plain hooks."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from editkit import Fact, trace
from editkit.errors import ConfigError, EditkitError, FactError
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.nethook import Trace
from editkit.settings import TRACE_KINDS, TraceSettings
from editkit.testing.tiny import SITES, tiny_lm
from editkit.testing.untouched import count_hooks
from editkit.tracing import PARTS, Traced, embedding_std, parts_of
from editkit.tracing.corruption import noised

Key = tuple[str, int]  # kind of activation, block
Hooked = tuple[nn.Module, Callable[..., Any]]
FAMILIES = list(SITES)
FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome"),
    Fact("Because of this the town of {} is in the state of", "Big Ben", "Oslo"),
    Fact("The city that has the {}", "Big Ben", "Oslo"),  # nothing behind the subject
]


def by_both(lm: LanguageModel, fact: Fact, **settings: Any) -> list[Traced]:
    return [trace(lm, fact, TraceSettings(engine=e, samples=3, **settings), progress=False) for e in ("replay", "full")]


@pytest.mark.cells
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.subject)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_the_whole_model(family: str, fact: Fact) -> None:
    lm = tiny_lm(family)
    hooks = count_hooks(lm.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast, slow = by_both(lm, fact, window=2, kinds=TRACE_KINDS)
    assert (fast.tokens, fast.subject, fast.answer) == (slow.tokens, slow.subject, slow.answer)
    assert fast.clean == pytest.approx(slow.clean, rel=1e-5)
    assert fast.corrupted == pytest.approx(slow.corrupted, rel=1e-4)
    for kind in TRACE_KINDS:
        assert fast.probability[kind].shape == (len(fast.tokens), lm.layers)
        assert torch.allclose(fast.probability[kind], slow.probability[kind], rtol=0, atol=1e-5), kind
        assert slow.indirect_effect(kind).abs().max() > 1e-4  # something is put back
    assert count_hooks(lm.model) == hooks


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_putting_all_back_is_the_clean_run_and_nothing_the_corrupted(family: str) -> None:
    lm = tiny_lm(family)
    found = trace(lm, FACTS[1], TraceSettings(samples=4, kinds=TRACE_KINDS), progress=False)
    state = found.probability["state"]
    assert state[-1, -1] == pytest.approx(found.clean, rel=1e-5)  # what the last token's answer is read from
    before = found.subject[0]
    for kind in TRACE_KINDS:
        assert (found.probability[kind][:before] == found.corrupted).all()
    assert (state[before:-1, -1] - found.corrupted).abs().max() < 1e-6  # behind the last block no token sees another
    assert found.total_effect == found.clean - found.corrupted != 0


@pytest.mark.parametrize("corruption", ["noise", "swap"])
def test_against_a_loop_of_plain_hooks(corruption: str) -> None:
    """The reference's way, written out with plain hooks: one forward a place, its frozen parts of a first forward."""
    lm, fact = tiny_lm("gpt2"), FACTS[0]
    settings = TraceSettings(corruption=corruption, samples=3, kinds=TRACE_KINDS, window=2)
    other = "The Abbey Tower"
    found = trace(lm, fact, settings, others=[other, "Bonn"], seed=5, progress=False)
    ids = torch.tensor([lm.tokenizer(fact.text)["input_ids"]])
    first, last = found.subject
    model: Any = lm.model
    blocks = model.transformer.h

    def run(rows: Tensor, hooks: Sequence[Hooked]) -> Tensor:
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            with torch.no_grad():
                probabilities: Tensor = model(rows).logits[:, -1].softmax(-1)
            return probabilities
        finally:
            for handle in handles:
                handle.remove()

    modules: dict[Key, nn.Module] = {("state", i): b for i, b in enumerate(blocks)} | {
        ("mlp", i): b.mlp for i, b in enumerate(blocks)
    }
    modules |= {("attention", i): b.attn for i, b in enumerate(blocks)}

    def keeping(kept: dict[Key, Tensor]) -> list[Hooked]:
        def keep(key: Key) -> Callable[..., Any]:
            return lambda _, __, out: kept.__setitem__(key, out[0] if isinstance(out, tuple) else out)

        return [(module, keep(key)) for key, module in modules.items()]

    def put(key: Key, token: int, values: dict[Key, Tensor]) -> Hooked:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            h = (out[0] if isinstance(out, tuple) else out).clone()
            h[:, token] = values[key][:, token]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return modules[key], hook

    clean: dict[Key, Tensor] = {}
    noisy: dict[Key, Tensor] = {}
    answer = run(ids, keeping(clean))[0].argmax()
    if corruption == "noise":
        rows = ids.repeat(3, 1)
        with torch.no_grad():
            subject = noised(lm, ids[0, first : last + 1], settings, model.transformer.wte.weight.std().item(), 5)

        def corrupt(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, first : last + 1] = subject
            return out

        changes: list[Hooked] = [(model.transformer.wte, corrupt)]
        assert (subject - model.transformer.wte.weight[ids[0, first : last + 1]].detach()).std() == pytest.approx(
            0.6, abs=0.1
        )
    else:  # the other prompt itself
        assert found.others == (other,)
        rows, changes = torch.tensor([lm.tokenizer(fact.prompt.replace("{}", other))["input_ids"]]), []
        assert rows.shape == ids.shape
    assert found.corrupted == pytest.approx(run(rows, changes + keeping(noisy))[:, answer].mean().item(), rel=1e-4)
    for token in range(ids.shape[1]):
        for layer in range(lm.layers):
            window = range(max(0, layer - 1), min(lm.layers, layer + 1))
            state, behind = [put(("state", layer), token, clean)], range(layer + 1, lm.layers)
            puts = {
                "state": state,
                "mlp": [put(("mlp", i), token, clean) for i in window],
                "attention": [put(("attention", i), token, clean) for i in window],
                "severed_mlp": state + [put(("mlp", i), token, noisy) for i in behind],
                "severed_attention": state + [put(("attention", i), token, noisy) for i in behind],
            }
            for kind, hooks in puts.items():
                p = run(rows, changes + hooks)[:, answer].mean().item()
                assert found.probability[kind][token, layer] == pytest.approx(p, rel=1e-4), (kind, token, layer)


def test_attention_of_bloom_is_put_back_without_the_residual_that_its_module_adds() -> None:
    lm = tiny_lm("bloom")
    ids = tokenise(lm, [FACTS[0].text]).inputs()
    site = lm.architecture.attention_output.format(1)
    block: Any = lm.model.get_submodule("transformer.h.1")
    with (
        torch.no_grad(),
        Trace(lm.model, ["transformer.h.1", site, "transformer.h.1.self_attention"], inputs=True) as t,
    ):
        lm.model(**ids)
    stream = t["transformer.h.1"].input
    assert torch.allclose(t["transformer.h.1.self_attention"].output, stream + t[site].output, atol=1e-5)
    assert not block.apply_residual_connection_post_layernorm


def test_sigma_is_of_the_vocabulary_or_of_subjects() -> None:
    lm = tiny_lm("llama")
    model: Any = lm.model
    table = model.get_input_embeddings().weight.detach().double()
    assert embedding_std(lm) == pytest.approx(table.std().item(), rel=1e-5)
    subjects = ["Big Ben", "The Eiffel Tower"]
    ids = [i for subject in subjects for i in lm.tokenizer(subject)["input_ids"]]
    assert embedding_std(lm, subjects) == pytest.approx(table[ids].std().item(), rel=1e-5)
    assert embedding_std(lm, subjects) != embedding_std(lm, subjects[:1])
    gemma = tiny_lm("gemma3")  # its embedding multiplies by √d inside
    model = gemma.model
    inside = model.get_input_embeddings().weight.detach().double().std().item()
    assert embedding_std(gemma) == pytest.approx(inside * 32**0.5, rel=1e-3)


def test_no_other_subject_that_fits_is_said() -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(FactError, match="None of the 1 other subjects has the . tokens of 'The Eiffel Tower'"):
        trace(lm, FACTS[0], TraceSettings(corruption="swap"), others=["Bonn", "The Eiffel Tower"], progress=False)


def test_a_trace_is_kept_with_its_axes(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    found = trace(lm, FACTS[0], TraceSettings(samples=2, kinds=("state", "severed_mlp")), progress=False)
    path = found.save(tmp_path / "deep" / "tower.v1")
    assert path.name == "tower.v1.npz" and sorted(p.name for p in path.parent.iterdir()) == [
        "tower.v1.json",
        "tower.v1.npz",
    ]
    again = Traced.load(path)
    for field in dataclasses.fields(Traced):
        if field.name != "probability":
            assert getattr(again, field.name) == getattr(found, field.name), field.name
    assert all(torch.equal(again.probability[kind], found.probability[kind]) for kind in found.probability)
    frame = found.to_frame()
    assert list(frame) == ["kind", "position", "token", "block", "probability", "indirect_effect"]
    assert len(frame) == 2 * len(found.tokens) * lm.layers
    row = frame[(frame.kind == "severed_mlp") & (frame.position == 2) & (frame.block == 1)].iloc[0]
    assert row.indirect_effect == found.indirect_effect("severed_mlp")[2, 1] and row.token == found.tokens[2]
    first, last = found.subject
    assert [i for i, token in enumerate(found.starred) if token.endswith("*")] == list(range(first, last + 1))
    (tmp_path / "deep" / "tower.v1.npz").unlink()
    with pytest.raises(EditkitError, match="No arrays can be read from"):
        Traced.load(path)


@pytest.mark.parametrize(
    ("tokens", "subject", "parts"),
    [
        (8, (1, 4), [[1], [2, 3], [4], [5], [6], [7]]),
        (4, (1, 1), [[1], [], [1], [2], [], [3]]),
        (4, (0, 2), [[0], [1], [2], [3], [], [3]]),
        (3, (1, 2), [[1], [], [2], [], [], []]),
    ],
)
def test_the_parts_of_a_prompt(tokens: int, subject: tuple[int, int], parts: list[list[int]]) -> None:
    assert parts_of(tokens, subject) == dict(zip(PARTS, parts, strict=True))


def test_a_seed_decides_the_noise_and_the_window_is_scaled() -> None:
    lm = tiny_lm("gpt2")
    settings = TraceSettings(samples=2, kinds=("state",))
    one, again, other = (trace(lm, FACTS[0], settings, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(one.probability["state"], again.probability["state"])
    assert one.corrupted != other.corrupted
    assert one.window == 1  # 10 of 48, of 3 blocks


def test_what_cannot_be_replayed_is_traced_at_full_depth(recwarn: pytest.WarningsRecorder) -> None:
    lm = tiny_lm("gpt2")

    def scaled(module: nn.Module, args: Any, output: Any) -> None:
        output.last_hidden_state = 1.5 * output.last_hidden_state

    handle = lm.model.get_submodule("transformer").register_forward_hook(scaled)
    fast, slow = by_both(lm, FACTS[0], kinds=("state",))
    handle.remove()
    assert torch.equal(fast.probability["state"], slow.probability["state"])
    assert "traced at full depth" in str(recwarn.pop().message)


def test_the_atlas_model_recalls_at_the_subjects_last_token(atlas_lm: LanguageModel) -> None:
    fact = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
    found = trace(atlas_lm, fact, progress=False)
    assert found.answer.strip() == "Paris" and found.total_effect > 0.5
    token, block = divmod(int(found.probability["state"][:-1].argmax()), atlas_lm.layers)
    assert token == found.subject[1] and block <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": 0}, "trace.noise must be positive"),
        ({"samples": 0}, "trace.samples must be positive"),
        ({"window": 0}, "trace.window must be positive"),
        ({"kinds": ()}, "trace.kinds must be one or more"),
        (
            {"kinds": ("mlps",)},
            "trace.kinds must be one of state, mlp, attention, severed_mlp, severed_attention; found 'mlps'",
        ),
        ({"corruption": "mask"}, "trace.corruption must be one of noise, swap; found 'mask'"),
        ({"sigma": 0.0}, "trace.sigma must be positive"),
        ({"engine": "fast"}, "trace.engine must be one of replay, full"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TraceSettings(**settings)
