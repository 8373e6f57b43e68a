"""Second moments against a loop over single keys; the cache; refusals."""

import pytest
import torch

from editkit.corpora import running_text
from editkit.errors import EditkitError, ModelError
from editkit.moments import packed_blocks, second_moments
from editkit.settings import MomentSettings
from tests.conftest import tiny_lm
from tests.oracles import second_moment

SETTINGS = MomentSettings(tokens=600, block=32, ridge=0.0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equal_to_one_key_at_a_time(family, tmp_path):
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


def test_one_pass_for_several_layers_equals_one_each(tmp_path):
    lm = tiny_lm("gpt2")
    together = second_moments(lm, [0, 1], SETTINGS, progress=False, cache=tmp_path / "a")
    alone = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path / "b")
    torch.testing.assert_close(together[1].matrix, alone[1].matrix, rtol=1e-9, atol=0)


def test_the_cache_belongs_to_one_model_and_one_setting(tmp_path, monkeypatch):
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
    with pytest.warns(UserWarning, match="collected again"):
        again = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    assert torch.equal(again.matrix, first.matrix)


def test_solving_needs_no_inverse(tmp_path):
    lm = tiny_lm("gpt2")
    moment = second_moments(lm, [1], SETTINGS, progress=False, cache=tmp_path)[1]
    k = torch.randn(moment.matrix.shape[0])
    ridge = 1e-2
    shifted = moment.matrix + ridge * moment.matrix.diagonal().mean() * torch.eye(len(k), dtype=torch.float64)
    factored = moment.factor(ridge)
    torch.testing.assert_close(factored.solve(k), torch.linalg.inv(shifted) @ k.double(), rtol=1e-8, atol=0)
    assert factored.condition == pytest.approx(torch.linalg.cond(shifted).item(), rel=1e-6)


def test_too_few_keys_are_refused_with_the_number_needed(tmp_path):
    lm = tiny_lm("gpt2")
    few = second_moments(lm, [1], MomentSettings(tokens=32, block=32), progress=False, cache=tmp_path)[1]
    few.matrix[0] = few.matrix[:, 0] = 0  # a dimension that never fired
    with pytest.raises(EditkitError, match=r"singular: \d+ keys.*moments\.tokens.*moments\.ridge"):
        few.factor(0.0)
    few.factor(1e-2)


def test_bad_input(tmp_path):
    lm = tiny_lm("gpt2")
    with pytest.raises(ModelError, match="Layer 9 was asked for.*0 to 2"):
        second_moments(lm, [9], SETTINGS, progress=False, cache=tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("few words\n", encoding="utf-8")
    with pytest.raises(EditkitError, match="fewer than 32 tokens"):
        second_moments(lm, [0], MomentSettings(source=str(short), block=32), progress=False, cache=tmp_path)


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "moments").write_text("a file where a folder should be", encoding="utf-8")
    with pytest.warns(UserWarning, match="not cached"):
        second_moments(tiny_lm("gpt2"), [0], SETTINGS, progress=False, cache=tmp_path)
