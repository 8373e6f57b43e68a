"""Reversal is bit for bit, on everything, under exceptions; subtraction is shown not to be."""

import os
import signal

import pytest
import torch
from torch import nn

from editkit.edits import Edit, base_of, low_rank_delta
from editkit.errors import EditkitError, ReversalError
from editkit.models.load import LanguageModel
from editkit.models.snapshot import Snapshot, bits, digest, model_digest, same_bits, uninterrupted
from editkit.testing.tiny import tiny_lm
from editkit.testing.untouched import everything

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_edit(lm: LanguageModel, layer: int = 1, rank: int = 2) -> Edit:
    site = lm.architecture.down(layer)
    weight = lm.model.get_parameter(f"{site}.weight")
    rows, columns = weight.shape if type(lm.model.get_submodule(site)) is nn.Linear else weight.shape[::-1]
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(rows, rank, generator=g), torch.randn(rank, columns, generator=g)
    return Edit((low_rank_delta(lm, site, left, right),), base_of(lm))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("raised", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_every_bit_is_back(family: str, dtype: torch.dtype, raised: type[BaseException] | None) -> None:
    lm = tiny_lm(family, dtype=dtype)
    weight = lm.model.get_parameter(lm.architecture.down(1) + ".weight")
    with torch.no_grad():  # values that ordinary comparison cannot tell apart, or calls unequal
        lm.model.get_parameter(lm.architecture.down(0) + ".weight").view(-1)[:2] = torch.tensor([-0.0, float("nan")])
        weight.view(-1)[:2] = torch.tensor([-0.0, 0.0])
    before, identity = everything(lm.model), id(weight)
    edit = random_edit(lm)
    try:
        with edit.applied(lm) as applied:
            assert not torch.equal(bits(weight), before[lm.architecture.down(1) + ".weight"])
            if raised:
                raise raised
    except BaseException as error:
        assert type(error) is raised
    else:
        assert applied.reversal is not None and applied.reversal.exact and applied.reversal.tensors == len(before)
    after = everything(lm.model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert id(lm.model.get_parameter(lm.architecture.down(1) + ".weight")) == identity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subtraction_does_not_give_the_bits_back(dtype: torch.dtype) -> None:
    lm = tiny_lm("gpt2", dtype=dtype)
    weight = lm.model.get_parameter(lm.architecture.down(1) + ".weight")
    before = weight.detach().clone()
    delta = random_edit(lm).deltas[0].matrix().to(dtype)
    with torch.no_grad():
        weight += delta
        weight -= delta
    assert not same_bits(weight, before)


def test_integer_views_tell_what_equality_does_not() -> None:
    assert torch.equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert not torch.equal(nan, nan.clone()) and same_bits(nan, nan.clone())
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


def test_what_else_moved_is_named() -> None:
    norm = nn.BatchNorm1d(3)
    net = nn.Sequential(nn.Linear(3, 3), norm)
    snapshot = Snapshot.take(net, ["0.weight"])
    assert norm.running_mean is not None
    norm.running_mean += 1
    found = snapshot.verify()
    assert found.unequal == ("1.running_mean",) and found.touched == ("0.weight",)
    with pytest.raises(ReversalError, match=r"1\.running_mean"):
        found.require()


def test_a_write_through_data_is_seen() -> None:
    net = nn.Linear(3, 3)
    snapshot = Snapshot.take(net, [])
    net.weight.data.mul_(2)
    assert snapshot.verify().unequal == ("weight",)


def test_tied_weights_are_found_by_both_names_and_counted_once() -> None:
    lm = tiny_lm("gpt2")
    snapshot = Snapshot.take(lm.model, ["lm_head.weight"])
    assert "transformer.wte.weight" not in snapshot.others
    with torch.no_grad():
        lm.model.get_parameter("transformer.wte.weight").zero_()
    assert snapshot.verify().unequal == ("lm_head.weight",)
    snapshot.restore()
    assert snapshot.verify().exact


def test_the_identity_of_a_model_is_its_persistent_state() -> None:
    lm = tiny_lm("llama")
    before = model_digest(lm.model)
    lm.model.model.rotary_emb.inv_freq.mul_(2)  # a cache, not part of the state dict
    assert model_digest(lm.model) == before
    assert model_digest(tiny_lm("llama", dtype=torch.bfloat16).model) != before


def test_a_result_that_is_not_finite_is_refused_and_undone() -> None:
    lm = tiny_lm("gpt2", dtype=torch.float16)
    site = lm.architecture.down(1)
    before = everything(lm.model)
    d_ff, d_model = lm.model.get_parameter(f"{site}.weight").shape
    delta = low_rank_delta(lm, site, torch.full((d_model, 1), 1e4), torch.full((1, d_ff), 1e4))
    with pytest.raises(EditkitError, match="not finite in torch.float16"):
        Edit((delta,), base_of(lm)).apply(lm)
    assert all(torch.equal(b, before[n]) for n, b in everything(lm.model).items())


def test_ctrl_c_waits_for_the_end_of_restoring() -> None:
    done = []
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("restored")
    signal.signal(signal.SIGINT, inherited)
    assert done == ["restored"]
