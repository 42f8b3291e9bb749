"""Weights and shrinkages of pairs: limits, bounds, invariances, over processes as in one."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.config import TiltSection
from align.losses.margin_weights import effective_sample_size
from align.losses.pair_weights import LossTilt, comp_sum_weight, mean_one, moderate, shaped, shrink_by_distance, tilt
from reward_models.objectives import bradley_terry, comp_sum

SHAPES = ("lin_upper", "quadratic", "extremes")
losses_of = st.lists(st.floats(0, 20), min_size=2, max_size=12).map(lambda v: torch.tensor(v, dtype=torch.float64))
temperatures = st.floats(0.3, 5)


@given(losses_of, temperatures, st.sampled_from([1, -1]))
def test_tilt_is_the_derivative_of_the_robust_loss(losses: Tensor, temperature: float, sign: int) -> None:
    free = losses.clone().requires_grad_()
    robust = sign * temperature * (torch.logsumexp(sign * free / temperature, 0) - math.log(len(losses)))
    (gradient,) = torch.autograd.grad(robust, free)
    found = tilt(losses, sign=sign, temperature=temperature)
    assert torch.allclose(found, len(losses) * gradient, atol=1e-10)
    assert float(found.mean()) == pytest.approx(1) and not found.requires_grad
    assert torch.allclose(tilt(losses + 3, sign=sign, temperature=temperature), found)
    assert (sign * (found[losses.argmax()] - found[losses.argmin()])) >= 0
    assert torch.allclose(tilt(losses, sign=sign, temperature=1e9), torch.ones_like(losses), atol=1e-6)


@given(losses_of, temperatures, st.sampled_from(SHAPES), st.floats(0.1, 9), st.floats(-5, 5), st.randoms())
def test_shapes(losses: Tensor, temperature: float, shape: Any, factor: float, shift: float, random: Any) -> None:
    found = shaped(losses, shape=shape, temperature=temperature)
    assert (
        float(found.mean()) == pytest.approx(1) and float(found.max() / found.min()) <= math.exp(1 / temperature) + 1e-9
    )
    order = torch.tensor(random.sample(range(len(losses)), len(losses)))
    assert torch.allclose(shaped(losses[order], shape=shape, temperature=temperature), found[order])
    if float(losses.max() - losses.min()) > 1e-2:
        moved = shaped(factor * losses + shift, shape=shape, temperature=temperature)
        assert torch.allclose(moved, found, atol=1e-6)
    assert torch.allclose(shaped(losses, shape=shape, temperature=1e8), torch.ones_like(losses), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_losses_have_equal_weights(shape: Any) -> None:
    assert torch.allclose(shaped(torch.full((5,), 2.0), shape=shape, temperature=0.4), torch.ones(5))


def test_which_losses_each_shape_favors() -> None:
    losses = torch.linspace(0, 1, 11)
    raised = {s: shaped(losses, shape=s, temperature=0.4, quantiles=(0, 1)) for s in SHAPES}  # type: ignore[arg-type]
    assert torch.allclose(raised["lin_upper"][5:], raised["lin_upper"][5].expand(6)) and raised["lin_upper"][0] < 0.3
    assert raised["quadratic"].argmax() == 5 and raised["extremes"].argmin() == 5
    assert float(raised["quadratic"].max() / raised["quadratic"].min()) == pytest.approx(math.exp(1 / 0.4), rel=1e-5)


def test_quantiles_keep_an_outlier_from_deciding() -> None:
    losses = torch.cat([torch.linspace(0.2, 1.2, 60), torch.tensor([50.0])])
    by_ends = shaped(losses, shape="lin_upper", temperature=0.4, quantiles=(0, 1))
    by_quantiles = shaped(losses, shape="lin_upper", temperature=0.4)
    assert (
        float(by_ends[:-1].max() / by_ends[:-1].min()) < 1.2 < 5 < float(by_quantiles[:-1].max() / by_quantiles.min())
    )
    assert float(by_ends[-1]) > 5 * float(by_quantiles[-1])


@given(st.lists(st.floats(-15, 15), min_size=1, max_size=9), st.floats(1, 3))
def test_comp_sum_weight(gaps: list[float], tau: float) -> None:
    """It turns Bradley-Terry's gradient into comp-sum's, and is a tilt of the losses before normalization."""
    gap = torch.tensor(gaps, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(gap)
    (plain,) = torch.autograd.grad(bradley_terry(gap, zero).sum(), gap)
    (wanted,) = torch.autograd.grad(comp_sum(gap, zero, tau=tau).sum(), gap)
    weight = comp_sum_weight(gap, tau=tau)
    assert torch.allclose(weight * plain, wanted, atol=1e-12) and (weight <= 1).all() and (weight > 0).all()
    assert not weight.requires_grad
    if tau > 1.01:
        tilted = tilt(bradley_terry(gap, zero), sign=-1, temperature=1 / (tau - 1))
        assert torch.allclose(mean_one(weight), tilted, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(comp_sum_weight(torch.tensor([-1e4, 1e4]), tau=0.0)).all()


@given(st.floats(-9, 9), st.floats(0, 50), st.floats(0, 20), st.floats(0.1, 5))
def test_distance_shrinks_margins_towards_zero(margin: float, distance: float, limit: float, softness: float) -> None:
    m, d = torch.tensor([margin]), torch.tensor([distance])
    found = float(shrink_by_distance(m, d, limit=limit, softness=softness))
    assert abs(found) <= abs(margin) + 1e-6 and found * margin >= 0
    farther = float(shrink_by_distance(m, d + 1, limit=limit, softness=softness))
    assert abs(farther) <= abs(found)
    if distance <= limit:
        assert found == pytest.approx(margin)


def test_moderation_is_the_mean_probability_of_the_ensemble() -> None:
    """Against E sigmoid(m + s e) by quadrature; MacKay's approximation is good to 0.02."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    for m in (-3.0, -0.5, 0.0, 1.0, 4.0):
        for s in (0.0, 0.5, 2.0, 6.0):
            mean = float(torch.trapezoid(torch.sigmoid(m + s * grid) * density, grid))
            found = moderate(torch.tensor(m, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))
            assert float(torch.sigmoid(found)) == pytest.approx(mean, abs=0.02)
    assert float(moderate(torch.tensor(2.0), torch.tensor(0.0))) == 2.0
    large = moderate(torch.tensor(2.0), torch.tensor(1e4))
    assert float(large) == pytest.approx(2.0 / (1e4 * math.sqrt(math.pi / 8)), rel=1e-3)


def test_mean_one_and_effective_size() -> None:
    weight = torch.tensor([0.0, 1.0, 3.0])
    assert float(mean_one(weight).mean()) == pytest.approx(1)
    assert float(effective_sample_size(mean_one(weight))) == pytest.approx(float(effective_sample_size(weight)))
    assert mean_one(torch.zeros(3)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["up", "down", "lin_upper", "quadratic", "extremes", "comp_sum"])
def test_two_processes_have_the_weights_of_one(kind: Any) -> None:
    config = TiltSection(kind=kind, temperature=0.5, warmup=2)
    losses, gap = torch.tensor([0.1, 2.0, 0.7, 0.4]), torch.tensor([2.0, -2.0, 0.0, 1.0])
    whole, share = LossTilt(config, lambda own: own, 0)(losses, gap, 2)
    parts = []
    both = torch.stack([losses, gap], dim=1)
    for rank in (0, 1):
        own = slice(2 * rank, 2 * rank + 2)
        found, same = LossTilt(config, lambda _: both, rank)(losses[own], gap[own], 2)
        parts.append(found)
        assert same == share < 1
    assert torch.equal(torch.cat(parts), whole)
    assert LossTilt(config, lambda own: own, 0)(losses, gap, 1)[0].tolist() == [1, 1, 1, 1]
