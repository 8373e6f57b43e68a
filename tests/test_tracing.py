"""Causal tracing: replay against the whole model, in every family, and both against a loop of plain hooks."""

import warnings

import pytest
import torch

from editkit import Fact, trace
from editkit.errors import ConfigError
from editkit.settings import TRACE_KINDS, TraceSettings
from editkit.tracing import _noise
from tests.conftest import tiny_lm
from tests.families import SITES
from tests.hooking import count_hooks

FAMILIES = [family for family in SITES if family != "mixtral"]
FACTS = [
    Fact("{} is located in the city of", "The Eiffel Tower", "Rome"),
    Fact("Because of this the town of {} is in the state of", "Big Ben", "Oslo"),
    Fact("The city that has the {}", "Big Ben", "Oslo"),  # nothing behind the subject
]


def by_both(lm, fact, **settings):
    return [trace(lm, fact, TraceSettings(engine=e, samples=3, **settings), progress=False) for e in ("replay", "full")]


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_the_whole_model(family):
    lm = tiny_lm(family)
    hooks = count_hooks(lm.model)
    for fact in FACTS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast, slow = by_both(lm, fact, window=2)
        assert (fast.tokens, fast.subject, fast.answer) == (slow.tokens, slow.subject, slow.answer)
        assert fast.clean == pytest.approx(slow.clean, rel=1e-5)
        assert fast.corrupted == pytest.approx(slow.corrupted, rel=1e-4)
        for kind in TRACE_KINDS:
            assert fast.probability[kind].shape == (len(fast.tokens), lm.layers)
            assert torch.allclose(fast.probability[kind], slow.probability[kind], rtol=1e-4, atol=1e-5), kind
            assert slow.indirect_effect(kind).abs().max() > 1e-4  # something is put back
    assert count_hooks(lm.model) == hooks


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_putting_all_back_is_the_clean_run_and_nothing_the_corrupted(family):
    lm = tiny_lm(family)
    found = trace(lm, FACTS[1], TraceSettings(samples=4), progress=False)
    state = found.probability["state"]
    assert state[-1, -1] == pytest.approx(found.clean, rel=1e-5)  # what the last token's answer is read from
    before = found.subject[0]
    for kind in TRACE_KINDS:
        assert (found.probability[kind][:before] == found.corrupted).all()
    assert (state[before:-1, -1] - found.corrupted).abs().max() < 1e-6  # behind the last block no token sees another
    assert found.total_effect == found.clean - found.corrupted != 0


def test_against_a_loop_of_plain_hooks():
    """The reference's way, written out: noise by a hook on the embedding, one forward a place."""
    lm, fact = tiny_lm("gpt2"), FACTS[0]
    settings = TraceSettings(samples=3, kinds=("state", "mlp"), window=2)
    found = trace(lm, fact, settings, seed=5, progress=False)
    ids = torch.tensor([lm.tokenizer(fact.text)["input_ids"]])
    first, last = found.subject
    noise = _noise(lm, last + 1 - first, settings, 5)
    blocks = lm.model.transformer.h

    def run(rows, hooks):
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            with torch.no_grad():
                return lm.model(rows).logits[:, -1].softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    kept = {}
    modules = {("state", i): b for i, b in enumerate(blocks)} | {("mlp", i): b.mlp for i, b in enumerate(blocks)}
    keep = [(m, lambda _, __, out, key=key: kept.__setitem__(key, out)) for key, m in modules.items()]
    clean = run(ids, keep)[0]
    answer = clean.argmax()

    def corrupt(module, args, out):
        out = out.clone()
        out[:, first : last + 1] += noise
        return out

    def put(key, token):
        def hook(module, args, out):
            out = out.clone()
            out[:, token] = kept[key][0, token]
            return out

        return modules[key], hook

    noisy = (lm.model.transformer.wte, corrupt)
    rows = ids.repeat(3, 1)
    assert found.corrupted == pytest.approx(run(rows, [noisy])[:, answer].mean().item(), rel=1e-4)
    for token in range(ids.shape[1]):
        for layer in range(lm.layers):
            window = range(max(0, layer - 1), min(lm.layers, layer + 1))
            for kind, where in (("state", [layer]), ("mlp", window)):
                p = run(rows, [noisy, *(put((kind, i), token) for i in where)])[:, answer].mean()
                assert found.probability[kind][token, layer] == pytest.approx(p.item(), rel=1e-4), (kind, token, layer)


def test_a_seed_decides_the_noise_and_the_window_is_scaled():
    lm = tiny_lm("gpt2")
    settings = TraceSettings(samples=2, kinds=("state",))
    one, again, other = (trace(lm, FACTS[0], settings, seed=s, progress=False) for s in (0, 0, 1))
    assert torch.equal(one.probability["state"], again.probability["state"])
    assert one.corrupted != other.corrupted
    assert one.window == 1  # 10 of 48, of 3 blocks


def test_what_cannot_be_replayed_is_traced_at_full_depth(recwarn):
    lm = tiny_lm("gpt2")

    def scaled(module, args, output):
        output.last_hidden_state = 1.5 * output.last_hidden_state

    handle = lm.model.transformer.register_forward_hook(scaled)
    fast, slow = by_both(lm, FACTS[0], kinds=("state",))
    handle.remove()
    assert torch.equal(fast.probability["state"], slow.probability["state"])
    assert "traced at full depth" in str(recwarn.pop().message)


def test_the_atlas_model_recalls_at_the_subjects_last_token(atlas_lm):
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
        ({"kinds": ("mlps",)}, "trace.kinds must be one of state, mlp, attention; found 'mlps'"),
        ({"engine": "fast"}, "trace.engine must be one of replay, full"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        TraceSettings(**settings)
