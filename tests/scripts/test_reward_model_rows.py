"""The listwise loss of the reward-model study: its formula by hand, and its limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models.objectives import bradley_terry
from scripts.study.reward_model_rows import decoupled_listwise


@given(st.integers(0, 10_000))
def test_decoupled_listwise_against_plain_python(seed: int) -> None:
    r = np.random.default_rng(seed).normal(0, 3, 4)
    good, bad = torch.tensor(r[None, :2], requires_grad=True), torch.tensor(r[None, 2:], requires_grad=True)
    loss = decoupled_listwise(good, bad)
    total = math.exp(r[2]) + math.exp(r[3])
    expected = np.mean([-math.log(math.exp(r[k]) / (math.exp(r[k]) + total)) for k in (0, 1)])
    assert float(loss.detach()) == pytest.approx(expected)
    of_good, of_bad = torch.autograd.grad(loss.sum(), (good, bad))
    assert (of_good <= 0).all() and (of_bad >= 0).all()
    assert float(of_good.sum() + of_bad.sum()) == pytest.approx(0, abs=1e-12)


def test_acceptable_responses_do_not_compete_and_one_each_is_bradley_terry() -> None:
    pair = decoupled_listwise(torch.tensor([[0.6]]), torch.tensor([[-0.4]]))
    assert pair.tolist() == pytest.approx(bradley_terry(torch.tensor([0.6]), torch.tensor([-0.4])).tolist())
    both = decoupled_listwise(torch.tensor([[0.6, 2.0]]), torch.tensor([[-0.4]]))
    other = bradley_terry(torch.tensor([2.0]), torch.tensor([-0.4]))
    assert both.tolist() == pytest.approx([float(pair + other) / 2])
