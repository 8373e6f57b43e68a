"""Second moments against a loop over single keys, in every family; the cache; health; refusals."""

import dataclasses
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from editkit.corpora import running_text
from editkit.errors import EditkitError, ModelError
from editkit.methods.shared.prelude import Factors
from editkit.models.architecture import Architecture
from editkit.models.load import LanguageModel
from editkit.moments import SecondMoment, factored, packed_blocks, second_moments
from editkit.settings import MomentSettings
from editkit.testing.tiny import SITES, build, byte_level_tokenizer, tiny_lm
from tests.oracles import moment_of, second_moment

SETTINGS = MomentSettings(tokens=600, block=32, ridge=0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equal_to_one_key_at_a_time(family: str, tmp_path: Path) -> None:
    lm = tiny_lm(family)
    found = second_moments(lm, [0, 2], SETTINGS, progress=False, cache=tmp_path)
    blocks = packed_blocks(lm, running_text("atlas", seed=0), 32)
    used = [next(blocks).tolist() for _ in range(found[0].count // 32)]
    for layer, moment in found.items():
        module = lm.model.get_submodule(lm.architecture.down(layer))
        C = second_moment(lm.model, module, used)
        assert moment.count >= 600
        torch.testing.assert_close(moment.matrix, C.detach(), rtol=1e-4, atol=1e-7)
        lm.model.float()


def any_family_lm(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A LanguageModel of a family whether editkit has an entry for it or not."""
    tokenizer = byte_level_tokenizer()
    model = build(family, vocab_size=len(tokenizer), dtype=dtype)
    names = {id(module): name for name, module in model.named_modules()}
    embedding = names[id(model.get_input_embeddings())]
    sites = SITES[family]
    assert sites.down_projection is not None
    architecture = Architecture(
        family,
        embedding=embedding,
        block=sites.block,
        attention=sites.attention,
        down_projection=sites.down_projection,
        final_norm="",  # the collection never asks for it
        mlp=sites.mlp,
    )
    return LanguageModel(f"tiny-{family}", model, tokenizer, architecture)


@contextmanager
def keys_seen(lm: LanguageModel, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """All keys that pass the down-projections meanwhile, by plain hooks: layer → list of [d_ff]."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:
        module = lm.model.get_submodule(SITES[lm.name.removeprefix("tiny-")].down_of(layer))

        def keep(_: nn.Module, args: tuple[Tensor], layer: int = layer) -> None:
            seen[layer].extend(args[0].detach().clone().flatten(0, -2))

        handles.append(module.register_forward_pre_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", [family for family, sites in SITES.items() if sites.down_projection])
def test_one_pass_for_all_layers_equals_a_pass_a_layer_and_a_loop_over_keys(family: str, tmp_path: Path) -> None:
    lm = any_family_lm(family)
    settings = MomentSettings(tokens=200, block=25)
    with keys_seen(lm, range(lm.layers)) as seen:
        together = second_moments(lm, range(lm.layers), settings, progress=False, cache=tmp_path / "a")
    for layer, moment in together.items():
        assert moment.count == len(seen[layer]) >= 200
        alone = second_moments(lm, [layer], settings, progress=False, cache=tmp_path / "b")[layer]
        scale = moment.matrix.abs().max()
        assert (moment.matrix - alone.matrix).abs().max() <= 1e-6 * scale
        assert (moment.matrix - moment_of(seen[layer])).abs().max() <= 1e-12 * scale
        assert torch.equal(moment.matrix, moment.matrix.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:.*less exact")
def test_keys_in_half_precision_are_summed_in_float64(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editkit.models.precision.SHARE", 0.0)  # as on a GPU, where a half model runs in half
    lm = any_family_lm(family, dtype)
    with keys_seen(lm, [1]) as seen:
        moment = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    assert seen[1][0].dtype == dtype and moment.matrix.dtype == torch.float64
    torch.testing.assert_close(moment.matrix, moment_of(seen[1]), rtol=1e-12, atol=1e-15)


def test_the_pass_stops_after_the_last_asked_layer(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    ran = []
    handles = [
        block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.model.model.layers)
    ]
    second_moments(lm, [0, 1], SETTINGS, progress=False, cache=tmp_path)
    assert set(ran) == {0}  # block 1 is left at its down-projection
    for handle in handles:
        handle.remove()


def test_blocks_hold_the_text_in_order_without_padding() -> None:
    lm = tiny_lm("gpt2")
    end, texts = lm.tokenizer.eos_token_id, ["one two three", "", "four " * 40, "five"]
    joined = [token for text in texts for token in [*lm.tokenizer(text)["input_ids"], end]]
    blocks = torch.stack(list(packed_blocks(lm, iter(texts), 7)))
    assert blocks.flatten().tolist() == joined[: len(joined) // 7 * 7] and len(blocks) > 3


def test_the_cache_belongs_to_one_model_and_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2")
    first = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 1
    with monkeypatch.context() as patch:
        patch.setattr("editkit.moments.cache.collect", lambda *a, **k: pytest.fail("collected again"))
        again = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    assert torch.equal(first.matrix, again.matrix) and (again.count, again.source) == (first.count, "atlas")
    second_moments(tiny_lm("gpt2", seed=1), [1], SETTINGS, progress=False, cache=tmp_path)
    second_moments(lm, [1], MomentSettings(tokens=300, block=32), progress=False, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    files[0].write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="collected again") as told:
        again = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    assert torch.equal(again.matrix, first.matrix) and len(told) == 1


def test_solving_needs_no_inverse(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    moment = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    k = torch.randn(moment.matrix.shape[0])
    ridge = 1e-2
    shifted = moment.matrix + ridge * moment.matrix.diagonal().mean() * torch.eye(len(k), dtype=torch.float64)
    found = moment.factor(ridge)
    torch.testing.assert_close(found.solve(k), torch.linalg.inv(shifted) @ k.double(), rtol=1e-8, atol=0)
    assert found.condition == pytest.approx(torch.linalg.cond(shifted).item(), rel=1e-6)


@pytest.mark.parametrize("free", [0, 2**40])
def test_a_large_one_is_factored_and_solved_with_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    moment = second_moments(tiny_lm("gpt2"), [1], SETTINGS, progress=False, cache=tmp_path)[1]
    k = torch.randn(moment.d_ff, 3)
    small = moment.factor(1e-2)
    monkeypatch.setattr(factored, "LARGE", 0)
    monkeypatch.setattr(factored, "free_bytes", lambda: free)
    monkeypatch.setattr("editkit.moments.moment.KEPT", 0)
    large = dataclasses.replace(moment).factor(1e-2)
    torch.testing.assert_close(large.lower, small.lower, rtol=1e-12, atol=0)
    torch.testing.assert_close(large.solve(k), small.solve(k), rtol=1e-10, atol=0)
    torch.testing.assert_close(large.solve(k[:, 0]), small.solve(k[:, 0]), rtol=1e-10, atol=0)
    exact = (torch.linalg.svdvals(small.lower)[[0, -1]] ** 2).tolist()
    assert exact[0] / exact[1] * 0.9 < large.condition <= exact[0] / exact[1] * (1 + 1e-9)


def test_the_largest_eigenvalue_of_a_known_spectrum() -> None:
    values = torch.cat((torch.linspace(0, 1, 500), torch.tensor([1.5]))).double()
    assert factored.largest_eigenvalue(lambda x: values * x, 501) == pytest.approx(1.5, rel=1e-3)
    assert factored.largest_eigenvalue(lambda x: values[-3:] * x, 3) == pytest.approx(1.5)


def test_large_factors_are_made_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = second_moments(tiny_lm("gpt2"), [0, 1], SETTINGS, progress=False, cache=tmp_path)
    kept = Factors(found, 1e-2)
    monkeypatch.setattr("editkit.moments.moment.KEPT", 0)
    made: list[str] = []
    factor = SecondMoment.factor

    def counted(self: SecondMoment, ridge: float = 0.0) -> factored.Factored:
        made.append(self.module)
        return factor(self, ridge)

    monkeypatch.setattr(SecondMoment, "factor", counted)
    large = Factors({layer: dataclasses.replace(moment) for layer, moment in found.items()}, 1e-2)
    assert made == []
    first = weakref.ref(large[0])
    assert large[0] is first() and made == [found[0].module]
    assert torch.equal(large[1].lower, kept[1].lower) and first() is None
    assert large.condition == pytest.approx(kept.condition)


def test_a_singular_one_is_refused_before_anything_is_computed() -> None:
    moment = SecondMoment("m", torch.zeros(8, 8, dtype=torch.float64), 100, "text")
    with pytest.raises(EditkitError, match="singular"):
        Factors({0: moment}, 0.0)


def test_health_is_that_of_a_known_spectrum() -> None:
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    flat = torch.tensor([2.0] * 4 + [0.0] * 4, dtype=torch.float64)
    moment = SecondMoment("m", rotation @ flat.diag() @ rotation.T, 100, "text")
    assert moment.effective_rank == pytest.approx(4) and moment.condition > 1e12
    moment = SecondMoment("m", rotation @ torch.arange(1.0, 9, dtype=torch.float64).diag() @ rotation.T, 100, "text")
    assert moment.condition == pytest.approx(8) and moment.vectors_per_dimension == 12.5
    shares = [i / 36 for i in range(1, 9)]
    assert moment.effective_rank == pytest.approx(torch.tensor([s**-s for s in shares]).prod().item())


def test_the_effective_count_is_kishs(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with keys_seen(lm, [0]) as seen:
        moment = second_moments(lm, [0], SETTINGS, progress=False, cache=tmp_path)[0]
    weights = [sum(x**2 for x in k.double().tolist()) for k in seen[0]]
    assert moment.effective_count == pytest.approx(sum(weights) ** 2 / sum(w**2 for w in weights), rel=1e-10)
    assert moment.effective_count is not None and moment.effective_count < moment.count


def test_the_digest_is_of_the_values(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    moment = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    before = moment.digest
    moment.matrix[3, 4] += 1e-15 * moment.matrix[3, 4].abs() + 1e-300
    assert moment.digest != before


def test_too_few_keys_for_the_dimensions_is_a_warning_with_the_number_needed(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with pytest.warns(UserWarning, match=r"32 keys for 64 dimensions.*0\.5 each.*moments\.tokens to 128 or more\."):
        few = MomentSettings(tokens=32, block=32, source=str(_text(tmp_path, "word " * 32)))
        second_moments(lm, [1], few, progress=False, cache=tmp_path)
    with pytest.warns(UserWarning, match="a longer text.*gave 32 of 500"):
        few = MomentSettings(tokens=500, block=32, source=few.source)
        second_moments(lm, [1], few, progress=False, cache=tmp_path)


def _text(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_too_few_keys_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    few = second_moments(lm, [1], MomentSettings(tokens=600, block=32), progress=False, cache=tmp_path)[1]
    few.matrix[0] = few.matrix[:, 0] = 0  # a dimension that never fired
    with pytest.raises(EditkitError, match=r"singular: \d+ keys.*moments\.tokens.*moments\.ridge"):
        few.factor(0.0)
    few.factor(1e-2)


def test_bad_input(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    with pytest.raises(ModelError, match="Layer 9 was asked for.*0 to 2"):
        second_moments(lm, [9], SETTINGS, progress=False, cache=tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("few words\n", encoding="utf-8")
    with pytest.raises(EditkitError, match="fewer than 32 tokens"):
        second_moments(lm, [0], MomentSettings(source=str(short), block=32), progress=False, cache=tmp_path)


def test_a_key_that_is_not_finite_ends_the_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    weight = lm.model.get_parameter("transformer.h.1.mlp.c_fc.weight").data
    weight *= 6e4
    second_moments(lm, [0, 1], SETTINGS, progress=False, cache=tmp_path / "float32")  # float32 holds what half cannot
    monkeypatch.setattr("editkit.models.precision.SHARE", 0.0)  # so that it runs in half
    with pytest.raises(EditkitError, match=r"h\.1\.mlp\.c_proj is not finite in float16.*bfloat16 or float32"):
        second_moments(lm, [0, 1], SETTINGS, progress=False, cache=tmp_path / "half")
    monkeypatch.undo()
    weight[0, 0] = torch.inf
    with pytest.raises(EditkitError, match=r"not finite in float32: no second moment can be collected\. Check its we"):
        second_moments(lm, [0, 1], SETTINGS, progress=False, cache=tmp_path / "half")
    assert not list((tmp_path / "half").rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "moments").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.warns(UserWarning, match="not cached"):
        second_moments(tiny_lm("gpt2"), [0], SETTINGS, progress=False, cache=tmp_path)
