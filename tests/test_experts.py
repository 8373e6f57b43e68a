"""Mixtures of experts: keys, second moments, updates and edits against plain loops over tokens and experts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editkit import Fact, RomeSettings, rome
from editkit.corpora import running_text
from editkit.errors import EditkitError
from editkit.methods import get_method
from editkit.models.experts import down_of, has_experts, keys_of, routed, site_of
from editkit.models.load import LanguageModel
from editkit.models.tokens import tokenise
from editkit.moments import SecondMoment, packed_blocks, second_moments, to_npz
from editkit.moments.collect import Sums
from editkit.nethook import Trace
from editkit.settings import MomentSettings
from editkit.testing.tiny import EXPERTS, tiny_lm
from tests.conftest import inputs_of
from tests.expert_oracle import Experts, memory_of
from tests.oracles import moment_of, rome_update, spread_updates
from tests.test_methods import SETTINGS, SOLVERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:the update of"),  # on tiny random models it is large
    pytest.mark.filterwarnings("ignore:The second moment at"),  # and few tokens are read
]
FACT = Fact("{} is located in the city of", "The Eiffel Tower", "Rome", "Paris")
FACTS = [FACT, Fact("The capital of {} is", "France", "Madrid"), Fact("{} was born in", "Ada Lovelace", "Oslo")]
CONTEXTS = ["{}", "The old man went. {}", "I was. {}"]
MOMENTS = MomentSettings(tokens=2000)
TEXT = "The Eiffel Tower is located in the city of Rome and that is all of it"


def experts_of(lm: LanguageModel) -> list[int]:
    return [layer for layer in range(lm.layers) if has_experts(lm, layer)]


def passed(lm: LanguageModel, site: str) -> tuple[Tensor, Tensor]:
    """Input and output [tokens, d_model] of a module, for TEXT."""
    with torch.no_grad(), Trace(lm.model, site, inputs=True) as trace:
        lm.model(**tokenise(lm, [TEXT]).inputs(), use_cache=False)
    return trace.input.flatten(0, -2), trace.output.flatten(0, -2)


# Keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", EXPERTS)
def test_the_stacked_weight_times_the_stacked_key_is_what_the_module_puts_out(family: str, dtype: torch.dtype) -> None:
    """m = W κ + Σ g_e b_e + s(x), in every block; the shared experts s(x) are run by themselves."""
    lm = tiny_lm(family, dtype=dtype)
    assert len(experts_of(lm)) >= 2
    for layer in experts_of(lm):
        site = site_of(lm, layer)
        x, m = passed(lm, site)
        kappa = keys_of(lm, down_of(lm, layer), x)
        memory = Experts(lm.model, site)
        again = kappa @ memory.matrix().double().T
        if family == "gpt_oss":
            where = routed(lm, down_of(lm, layer), x)
            bias = memory.experts.get_parameter("down_proj_bias")
            again = again + (bias[where.experts] * where.gates[..., None]).sum(1)
        with torch.no_grad():
            if family.startswith("deepseek"):
                again = again + memory.module.get_submodule("shared_experts")(x)
            if family == "qwen2_moe":
                gate = memory.module.get_submodule("shared_expert_gate")(x).sigmoid()
                again = again + gate * memory.module.get_submodule("shared_expert")(x)
        assert (again - m).norm() <= {torch.float32: 1e-6, torch.float64: 1e-14}[dtype] * m.norm()


@pytest.mark.parametrize("family", EXPERTS)
def test_routing_and_keys_are_those_of_a_loop_over_tokens_and_experts(family: str) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    for layer in experts_of(lm):
        x, _ = passed(lm, site_of(lm, layer))
        wanted = Experts(lm.model, site_of(lm, layer)).keys(x)
        kappa = keys_of(lm, down_of(lm, layer), x)
        assert kappa.shape == wanted.shape and (kappa - wanted).norm() <= 1e-6 * wanted.norm()  # routers in float32
        assert torch.equal(kappa != 0, wanted != 0)
        used = wanted.view(len(x), -1, wanted.shape[1] // len(Experts(lm.model, site_of(lm, layer)).slices()))
        assert (used.any(-1).sum(1) == lm.model.config.num_experts_per_tok).all()
        assert len(used.any(-1).unique(dim=0)) > 1  # tokens go to different experts


def test_a_block_that_is_dense_has_a_down_projection() -> None:
    lm = tiny_lm("deepseek_v3")
    assert [has_experts(lm, layer) for layer in range(3)] == [False, True, True]
    assert down_of(lm, 0) == site_of(lm, 0) == "model.layers.0.mlp.down_proj"
    assert (down_of(lm, 1), site_of(lm, 1)) == ("model.layers.1.mlp.experts", "model.layers.1.mlp")
    x = torch.randn(2, 5)
    assert keys_of(lm, down_of(lm, 0), x) is x


# Second moments


def blocks_of(moment: SecondMoment, ridge: float = 0.0) -> Tensor:
    """C as one matrix: its blocks on the diagonal, 0 elsewhere, and the ridge."""
    whole = torch.block_diag(*moment.matrix) if moment.routed else moment.matrix
    return whole + ridge * whole.diagonal().mean() * torch.eye(len(whole)).double()


@pytest.mark.parametrize("family", EXPERTS)
def test_the_blocks_are_those_of_the_whole_second_moment(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[κ κᵀ] over all tokens, one token at a time, by plain loops; of it the diagonal blocks."""
    monkeypatch.setattr("editkit.moments.collect.BATCH", 40)
    lm = tiny_lm(family)
    layers = experts_of(lm)
    found = second_moments(lm, layers, MomentSettings(tokens=120, block=40), progress=False, cache=tmp_path)
    texts = packed_blocks(lm, running_text("atlas", seed=0), 40)
    used = [next(texts) for _ in range(3)]
    for layer in layers:
        site, keys = site_of(lm, layer), list[Tensor]()
        memory = Experts(lm.model, site)
        for ids in used:
            with torch.no_grad(), Trace(lm.model, site, inputs=True) as trace:
                lm.model(ids[None], use_cache=False)
            keys += memory.keys(trace.input[0].detach())
        whole = moment_of(keys)
        count = len(memory.slices())
        size = len(whole) // count
        moment = found[layer]
        assert moment.matrix.shape == (count, size, size) and moment.count == 120
        for e, block in enumerate(moment.matrix):
            mine = slice(e * size, (e + 1) * size)
            assert (block - whole[mine, mine]).abs().max() <= 1e-5 * whole.abs().max()
            assert moment.routed[e] == sum(bool(key[mine].any()) for key in keys)
            assert torch.equal(block, block.T)
        assert sum(moment.routed) == 120 * lm.model.config.num_experts_per_tok


def test_the_whole_pass_can_be_gone_on_with_and_its_file_read_again(tmp_path: Path) -> None:
    lm = tiny_lm("mixtral")
    moment = second_moments(lm, [1], MOMENTS, progress=False, cache=tmp_path)[1]
    assert moment.faults() == []
    again = SecondMoment.load(moment.save(tmp_path / "C.safetensors"))
    assert torch.equal(again.matrix, moment.matrix) and again.routed == moment.routed and again.digest == moment.digest
    assert second_moments(lm, [1], MOMENTS, progress=False, cache=tmp_path)[1].digest == moment.digest

    module = down_of(lm, 1)
    draw = torch.Generator().manual_seed(0)
    keys, chosen = torch.randn(9, 2, 5, generator=draw), torch.tensor([[0, 1], [3, 1], [0, 3]] * 3)
    once, part = Sums({}, {}), Sums({}, {})
    once.add_experts(module, 4, chosen, keys)
    part.add_experts(module, 4, chosen[:3], keys[:3])
    part.count = 3
    described = {"model": "m", "model_digest": "d", "settings": {}, "seed": 0}
    part.save(tmp_path / "part", described)
    rest = Sums.load(tmp_path / "part", [module])
    rest.add_experts(module, 4, chosen[3:], keys[3:])
    once.count = rest.count = 9
    one, other = (sums.pop(module, "", {}) for sums in (once, rest))
    torch.testing.assert_close(one.matrix, other.matrix, rtol=1e-12, atol=1e-15)
    assert one.routed == other.routed == (6, 6, 0, 6) and not one.matrix[2].any()
    assert one.effective_count == pytest.approx(other.effective_count)


def test_solving_with_the_blocks_is_solving_with_the_matrix() -> None:
    lm = tiny_lm("mixtral")
    moment = second_moments(lm, [1], MOMENTS, progress=False)[1]
    keys = torch.randn(len(moment.routed) * moment.d_ff, 3, generator=torch.Generator().manual_seed(0)).double()
    keys.view(len(moment.routed), -1, 3)[2] = 0  # an expert that no fact goes to
    factored, whole = moment.factor(1e-4), blocks_of(moment, 1e-4)
    wanted = torch.linalg.solve(whole, keys)
    torch.testing.assert_close(factored.solve(keys), wanted, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(factored.solve(keys[:, 0]), wanted[:, 0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(factored.matrix(len(keys)), whole)
    used = torch.cat([torch.linalg.eigvalsh(block) for e, block in enumerate(whole_blocks(whole, moment)) if e != 2])
    assert factored.condition == pytest.approx((used.max() / used.min()).item(), rel=1e-5)


def whole_blocks(whole: Tensor, moment: SecondMoment) -> list[Tensor]:
    size = moment.d_ff
    return [whole[e * size : (e + 1) * size, e * size : (e + 1) * size] for e in range(len(moment.routed))]


@pytest.mark.parametrize("family", EXPERTS)
def test_with_the_blocks_unseen_tokens_move_little_more_than_with_the_whole_second_moment(family: str) -> None:
    """E‖ΔW κ‖² over tokens that C has not seen, of rank-one updates for some of them; with C = I it is more."""
    lm = tiny_lm(family)
    texts = packed_blocks(lm, running_text("atlas", seed=0), 128)
    keys = []
    for _ in range(32):
        with torch.no_grad(), Trace(lm.model, site_of(lm, 1), inputs=True) as trace:
            lm.model(next(texts)[None], use_cache=False)
        keys.append(keys_of(lm, down_of(lm, 1), trace.input[0]))
    seen, unseen = torch.cat(keys[:24]), torch.cat(keys[24:])
    whole, other = (each.T @ each / len(each) for each in (seen, unseen))
    eye = torch.eye(len(whole)).double()
    count = len(Experts(lm.model, site_of(lm, 1)).slices())
    size = len(whole) // count
    blocks = torch.block_diag(*(whole[e * size : (e + 1) * size, e * size : (e + 1) * size] for e in range(count)))

    def moved(moment: Tensor) -> Tensor:
        facts = unseen[::40].T
        u = torch.linalg.solve(moment + 1e-4 * whole.diagonal().mean() * eye, facts)
        energy: Tensor = (u * (other @ u)).sum(0) / (u * facts).sum(0) ** 2
        return energy

    assert (moved(blocks) / moved(whole)).median() < 1.15 and (moved(eye) / moved(blocks)).median() > 1.15


def test_an_expert_without_keys_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("mixtral")
    moment = second_moments(lm, [1], MOMENTS, progress=False)[1]
    size = moment.d_ff
    never = replace(moment, matrix=moment.matrix.clone(), routed=(*moment.routed[:3], 0))
    never.matrix[3] = 0
    key = torch.ones(4 * size).double()
    with pytest.raises(EditkitError, match="expert 3 at model.layers.1.mlp.experts is singular: .* sent it 0 tokens"):
        never.factor(1e-4).solve(key)
    key[3 * size :] = 0
    assert never.factor(1e-4).solve(key).isfinite().all()
    with pytest.raises(EditkitError, match="a block for each of 4 experts"):
        to_npz(moment, tmp_path / "C.npz")
    monkeypatch.setattr("editkit.moments.collect.BATCH", 128)
    with pytest.warns(UserWarning, match="keys of one expert for 64 dimensions.*Set moments.tokens to"):
        second_moments(lm, [2], MomentSettings(tokens=200), progress=False)


# Methods


@pytest.mark.parametrize("keys", ["mixed", "mean"])
@pytest.mark.parametrize("family", EXPERTS)
def test_rome_is_the_oracles(family: str, keys: str) -> None:
    lm = tiny_lm(family, dtype=torch.float64)
    settings = RomeSettings(keys=keys, layer=1, clamp=4.0, lr=0.02, steps=6, weight_decay=1e-4, stop_loss=0.0)
    moment = second_moments(lm, [1], MOMENTS, progress=False)[1]
    edit = rome(lm, FACT, settings, moments={1: moment}, contexts=CONTEXTS, progress=False)
    rows, kl_row = inputs_of(lm, FACT, CONTEXTS)
    constants = {n: getattr(settings, n) for n in ("steps", "lr", "weight_decay", "kl_factor", "clamp", "stop_loss")}
    expected, losses = rome_update(
        lm.model,
        site_of(lm, 1),
        rows,
        kl_row,
        blocks_of(moment, MOMENTS.ridge),
        mixed=keys == "mixed",
        memories=memory_of,
        **constants,
    )
    (delta,) = edit.deltas
    assert delta.parameter == "model.layers.1.mlp.experts.down_proj" and delta.rank == 1
    assert (delta.change() - expected).norm() <= 1e-6 * expected.norm()
    steps = [step["loss"] for step in edit.provenance["reports"][0]["steps"]]
    assert steps == pytest.approx(losses, rel=1e-5)


@pytest.mark.cells
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("family", EXPERTS)
def test_methods_of_many_facts_are_the_oracles(family: str, method: str, solver: str) -> None:
    """Over blocks 0 and 1, of which DeepSeek's and Qwen2-MoE's first is dense."""
    lm = tiny_lm(family, dtype=torch.float64)
    layers = [1] if method == "emmet" else [0, 1]
    settings: Any = replace(SETTINGS[method], layers=layers, steps=4, clamp=0.75, stop_loss=0.0, **SOLVERS[solver])
    moments = second_moments(lm, layers, MOMENTS, progress=False)
    edit = get_method(method)(lm, FACTS, settings, moments=moments, contexts=CONTEXTS, progress=False)
    matrices = [blocks_of(moments[i], 0.0 if method == "alphaedit" else MOMENTS.ridge) for i in layers]
    expected = spread_updates(
        lm.model,
        method,
        lm.architecture.block,
        lm.architecture.attention,
        [site_of(lm, layer) for layer in layers],
        layers,
        [inputs_of(lm, fact, CONTEXTS) for fact in FACTS],
        matrices,
        settings,
        memories=memory_of,
    )
    assert [delta.module for delta in edit.deltas] == [down_of(lm, layer) for layer in layers]
    for delta, update in zip(edit.deltas, expected, strict=True):
        assert (delta.change() - update).norm() <= 1e-5 * update.norm()
