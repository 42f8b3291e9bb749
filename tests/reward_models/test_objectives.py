"""Objectives of a reward model: limits, closed-form slopes against autograd, invariances; names and columns."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.config import ObjectiveSection, PairsSection, RewardSection
from align.data.pairs import load_pairs
from align.data.streaming import stream_pairs
from align.errors import ConfigError, DataError
from align.evaluation.ranking import auc as area
from reward_models import objectives as o
from reward_models.registry import OBJECTIVES, resolve_objective
from reward_models.train import train_reward_model
from tests.helpers.builders import rows

gaps = st.floats(-30, 30)
taus = st.floats(0, 3)
rewards = st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=7)


def two(gap: float, requires_grad: bool = True) -> tuple[Tensor, Tensor]:
    """Rewards whose difference is ``gap``, the first with a gradient."""
    chosen = torch.tensor([gap + 0.5], dtype=torch.float64, requires_grad=requires_grad)
    return chosen, torch.tensor([0.5], dtype=torch.float64)


def slope(loss: Any, gap: float) -> float:
    chosen, rejected = two(gap)
    loss(chosen, rejected).sum().backward()
    assert chosen.grad is not None
    return float(chosen.grad)


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def columns(count: int) -> dict[str, Tensor]:
    """Values for every column that an objective may read."""
    return {
        "teacher_margin": torch.linspace(-2, 2, count, dtype=torch.float64),
        "bag": torch.arange(count) // 2,
        "vote_share": torch.full((count,), 0.75, dtype=torch.float64),
        "group": torch.arange(count) % 2,
        "votes_chosen": torch.arange(count) % 3 + 1.0,
        "votes_rejected": torch.arange(count) % 2 * 1.0,
        "votes_tie": torch.arange(count) % 2 * 2.0,
        "thumb": torch.tensor([1.0, 0.0, float("nan")]).repeat(count)[:count],
    }


def test_thumbs_are_logistic_and_pairs_bradley_terry() -> None:
    """By hand: -log s(2), -log s(-2), -log s(2 - 0.5); the second response of a thumb has no gradient."""
    chosen = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    rejected = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    losses = o.thumbs(chosen, rejected, torch.tensor([1.0, 0.0, float("nan")]))
    assert losses.tolist() == pytest.approx([0.126928, 2.126928, 0.201413], abs=1e-6)
    assert losses[2] == o.bradley_terry(chosen, rejected)[2]
    losses.sum().backward()
    assert rejected.grad is not None and rejected.grad[:2].tolist() == [0.0, 0.0]
    assert chosen.grad is not None and chosen.grad.tolist() == pytest.approx([-0.119203, 0.880797, -0.182426], abs=1e-6)


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-3, 3))
def test_bradley_terry_gradient(chosen: float, rejected: float, margin: float) -> None:
    a, b = (
        torch.tensor([chosen], dtype=torch.float64, requires_grad=True),
        torch.tensor([rejected], dtype=torch.float64),
    )
    o.bradley_terry(a, b, torch.tensor([margin], dtype=torch.float64), centering=0.1).sum().backward()
    expected = -1 / (1 + np.exp(chosen - rejected - margin)) + 0.2 * (chosen + rejected)
    assert a.grad is not None and float(a.grad) == pytest.approx(expected, abs=1e-9)


@given(gaps)
def test_comp_sum_has_its_four_members(gap: float) -> None:
    chosen, rejected = two(gap, requires_grad=False)
    s = sigmoid(gap)
    q = 0.7
    assert float(o.comp_sum(chosen, rejected, tau=1.0)) == pytest.approx(float(o.bradley_terry(chosen, rejected)))
    assert float(o.comp_sum(chosen, rejected, tau=2.0)) == pytest.approx(1 - s, abs=1e-12)
    assert float(o.comp_sum(chosen, rejected, tau=1 + q)) == pytest.approx((1 - s**q) / q, abs=1e-12)
    assert float(o.comp_sum(chosen, rejected, tau=0.0)) == pytest.approx(math.exp(-gap), rel=1e-9)


@given(gaps, taus)
def test_comp_sum_slope_is_bradley_terry_times_a_power(gap: float, tau: float) -> None:
    expected = -(sigmoid(gap) ** (tau - 1)) * sigmoid(-gap)
    if (1 - tau) * math.log1p(math.exp(-gap)) < o.STEEPEST:
        assert slope(lambda a, b: o.comp_sum(a, b, tau=tau), gap) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(taus)
def test_comp_sum_is_continuous_at_its_tangent_and_finite_far_out(tau: float) -> None:
    for dtype in (torch.float32, torch.float64):
        far = torch.tensor([-1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
        loss = o.comp_sum(far, torch.zeros_like(far), tau=tau)
        loss.sum().backward()
        assert far.grad is not None and torch.isfinite(loss).all() and torch.isfinite(far.grad).all()
        assert loss[0] > loss[2] > loss[1] or tau > 1


def test_comp_sum_tau_2_is_symmetric_so_flips_only_rescale_its_risk() -> None:
    gap = torch.linspace(-5, 5, 41, dtype=torch.float64)
    zero = torch.zeros_like(gap)
    clean, flipped = o.comp_sum(gap, zero, tau=2.0), o.comp_sum(-gap, zero, tau=2.0)
    assert torch.allclose(clean + flipped, torch.ones_like(gap), atol=1e-14)
    noise = 0.3
    assert torch.allclose((1 - noise) * clean + noise * flipped, (1 - 2 * noise) * clean + noise)
    logistic = [o.comp_sum(sign * gap, zero, tau=1.0) for sign in (1, -1)]
    assert not torch.allclose(logistic[0] + logistic[1], torch.full_like(gap, 2 * math.log(2)))


@given(rewards, st.floats(-20, 20), st.floats(-20, 20))
def test_margin_mse_sees_margins_alone(pairs: list[tuple[float, float]], shift: float, teacher_shift: float) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    teacher = torch.linspace(-3, 3, len(pairs), dtype=torch.float64)
    loss = o.margin_mse(chosen, rejected, teacher, scale=0.5)
    assert torch.allclose(loss, o.margin_mse(chosen + shift, rejected + shift, teacher, scale=0.5), atol=1e-8)
    assert torch.allclose(loss, o.margin_mse(rejected, chosen, -teacher, scale=0.5))
    own = (chosen - rejected).requires_grad_()
    own_loss = o.margin_mse(own + teacher_shift, torch.full_like(own, teacher_shift), teacher)
    (gradient,) = torch.autograd.grad(own_loss.sum(), own)
    assert torch.allclose(gradient, 2 * (own - teacher), atol=1e-8)
    assert float(o.margin_mse(2 * teacher, teacher, teacher).abs().max()) < 1e-20


@given(rewards)
def test_auc_against_loops_and_its_bound(pairs: list[tuple[float, float]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T
    found = o.auc(chosen, rejected, temperature=0.7)
    expected = [np.mean([math.log1p(math.exp(-(c - r) / 0.7)) for _, r in pairs]) for c, _ in pairs]
    assert found.tolist() == pytest.approx(expected)
    assert 1 - area(chosen, rejected) <= float(found.mean()) / math.log(2) + 1e-12
    assert o.auc(chosen[:1], rejected[:1]).tolist() == pytest.approx(o.bradley_terry(chosen[:1], rejected[:1]).tolist())
    alone = torch.arange(len(pairs))
    assert torch.allclose(o.auc(chosen, rejected, alone), o.bradley_terry(chosen, rejected))
    assert torch.allclose(o.auc(chosen, rejected, share=0.0), o.bradley_terry(chosen, rejected))


def test_auc_within_groups_against_loops() -> None:
    """Each pair's own value, in groups of different size."""
    chosen = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.0], dtype=torch.float64)
    rejected = torch.tensor([0.2, 0.9, -1.0, 1.5, 0.7], dtype=torch.float64)
    group = [0, 1, 0, 1, 1]
    found = o.auc(chosen, rejected, torch.tensor(group), temperature=0.7)
    for i in range(5):
        costs = [math.log1p(math.exp(-float(chosen[i] - rejected[j]) / 0.7)) for j in range(5) if group[j] == group[i]]
        assert float(found[i]) == pytest.approx(sum(costs) / len(costs))


def test_auc_sees_an_offset_per_prompt_and_bradley_terry_does_not() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected, offset = (
        torch.tensor(rng.normal(mean, spread, 300)) for mean, spread in ((1, 1), (0, 1), (0, 5))
    )
    moved = (chosen + offset, rejected + offset)
    assert torch.allclose(o.bradley_terry(chosen, rejected), o.bradley_terry(*moved))
    assert float(o.auc(*moved).mean()) > float(o.auc(chosen, rejected).mean()) + 0.3
    both = torch.stack([chosen, rejected]).requires_grad_()
    o.auc(both[0], both[1]).mean().backward()
    assert both.grad is not None and abs(float(both.grad.sum())) < 1e-12


@given(gaps, st.floats(-2, 2))
def test_ldr_kl_limits_and_slope(gap: float, margin: float) -> None:
    chosen, rejected = two(gap, requires_grad=False)
    one = o.ldr_kl(chosen, rejected, lam=1.0, margin=0.0)
    assert float(one) == pytest.approx(float(o.bradley_terry(chosen, rejected)) - math.log(2))
    assert float(o.ldr_kl(chosen, rejected, lam=1e-5, margin=margin)) == pytest.approx(max(margin - gap, 0), abs=1e-4)
    assert float(o.ldr_kl(chosen, rejected, lam=1e7, margin=margin)) == pytest.approx((margin - gap) / 2, abs=1e-3)
    found = slope(lambda a, b: o.ldr_kl(a, b, lam=0.7, margin=margin), gap)
    assert found == pytest.approx(-sigmoid((margin - gap) / 0.7)) and -1 <= found <= 0


@given(gaps, st.floats(1.01, 5))
def test_adaptive_softness_is_within_its_bounds_and_has_no_gradient(gap: float, alpha: float) -> None:
    """The slope -sigmoid((c - z) / lam_i) gives lam_i back, and it is what the formula says."""
    found = slope(lambda a, b: o.ldr_kl(a, b, lam=2.0, margin=50.0, adaptive=True, alpha=alpha), gap)
    p = sigmoid(gap / 2)
    entropy = -sum(x * math.log(x) for x in (p, 1 - p) if x > 0)
    softness = 2.0 * (1 - (math.log(2) - entropy) / (alpha * math.log(2)))
    assert found == pytest.approx(-sigmoid((50.0 - gap) / softness), rel=1e-9)
    assert 2.0 * (1 - 1 / alpha) - 1e-9 <= softness <= 2.0


@given(st.lists(st.tuples(gaps, st.integers(0, 2)), min_size=1, max_size=9), st.floats(0, 1))
def test_instances_are_bags_plus_the_spread_within(drawn: list[tuple[float, int]], rho: float) -> None:
    gap = torch.tensor([value for value, _ in drawn], dtype=torch.float64)
    bag = torch.tensor([name for _, name in drawn])
    share = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)[bag]
    zero = torch.zeros_like(gap)
    p = torch.sigmoid(gap)
    found = {r: o.aggregated(gap, zero, bag, share, rho=r) for r in (0.0, rho, 1.0)}
    for name in set(bag.tolist()):
        inside = bag == name
        instance = ((share - p)[inside] ** 2).mean()
        assert float(found[1.0][inside].mean()) == pytest.approx(float(instance), abs=1e-12)
        assert float(found[0.0][inside].mean()) == pytest.approx(float((share[inside][0] - p[inside].mean()) ** 2))
    assert torch.allclose(found[rho], (1 - rho) * found[0.0] + rho * found[1.0], atol=1e-12)
    alone = torch.arange(len(drawn))
    assert torch.allclose(o.aggregated(gap, zero, alone, share, rho=rho), (share - p) ** 2, atol=1e-12)


def test_the_gradient_of_the_spread_term_is_zero_on_average() -> None:
    gap = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(gap).detach().requires_grad_()
    logits = torch.special.logit(p)
    bag = torch.zeros(4, dtype=torch.int64)
    share = torch.full((4,), 0.6, dtype=torch.float64)
    terms = [o.aggregated(logits, torch.zeros_like(logits), bag, share, rho=r).sum() for r in (1.0, 0.0)]
    (gradient,) = torch.autograd.grad(terms[0] - terms[1], p)
    assert abs(float(gradient.sum())) < 1e-12 and float(gradient.abs().max()) > 0.1


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_objective_is_finite_and_one_value_a_pair(name: str, dtype: torch.dtype) -> None:
    chosen = torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4], dtype=dtype, requires_grad=True)
    loss = resolve_objective(ObjectiveSection(name=name))(chosen, torch.zeros_like(chosen), columns(5))
    loss.sum().backward()
    assert loss.shape == (5,) and torch.isfinite(loss).all()
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all() and float(chosen.grad.abs().max()) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_against_finite_differences(name: str) -> None:
    objective = resolve_objective(ObjectiveSection(name=name))
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: objective(a, b, columns(6)), (chosen, rejected))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("comp_sun", {}, r"objective-name.*did you mean `comp_sum`"),
        ("comp_sum", {"taw": 1.5}, r"objective-parameter.*\n.*taw: not a parameter of comp_sum \(did you mean `tau`"),
        ("ldr_kl", {"alpha": 1.0, "adaptive": 1}, r"(?s)alpha: found 1.*above 1.*adaptive: found 1.0, expected true"),
        ("auc", {"share": 1.5}, "share: found 1.5, expected a number above -1e-12 and below 1"),
    ],
)
def test_unknown_names_and_values_are_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_objective(ObjectiveSection(name=name, parameters=parameters))


def table(count: int = 16) -> Dataset:
    """Pairs with every column that an objective reads; the teacher agrees with the labels."""
    pairs = rows(count)
    for k, row in enumerate(pairs):
        row |= {"teacher_margin": 2.0 + k % 3, "bag": f"b{k // 4}", "vote_share": 0.9, "group": f"g{k % 2}"}
        row |= {"votes_chosen": 4.0, "votes_rejected": 1.0 * (k % 2), "votes_tie": 1.0 * (k % 3)}
    return Dataset.from_list(pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.remove_columns("teacher_margin"), "teacher_margin: found no such column, expected a value for"),
        (lambda t: t.map(lambda row, k: {"teacher_margin": None if k == 3 else 1.0}, with_indices=True),
         "teacher_margin: found none in pairs p3"),
    ],
)  # fmt: skip
def test_a_missing_column_is_reported_before_training(change: Any, message: str, tmp_path: Path) -> None:
    config = RewardSection(model="nowhere", objective=ObjectiveSection(name="margin_mse"))
    with pytest.raises(DataError, match=message):
        train_reward_model(change(table()), config, tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    ("share", "message"),
    [(1.2, "vote_share of bag 'b0': found 1.2, expected a share in"), (0.4, "0.4 and another share")],
)
def test_invalid_vote_shares_are_refused(share: float, message: str, tmp_path: Path) -> None:
    wrong = table().map(lambda row, k: {"vote_share": share if k == 2 else 0.9}, with_indices=True)
    config = RewardSection(model="nowhere", objective=ObjectiveSection(name="aggregated"))
    with pytest.raises(DataError, match=message):
        train_reward_model(wrong, config, tmp_path / "out", seed=0)


def test_columns_of_objectives_are_read_from_files(tmp_path: Path) -> None:
    lines = [json.dumps(row | {"ood": 1.5, "bag": k % 2}) for k, row in enumerate(table(4))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"))
    for pairs in (load_pairs(source), stream_pairs(source, tmp_path / "pairs.arrow")):
        assert pairs["teacher_margin"] == [2.0, 3.0, 4.0, 2.0] and pairs["vote_share"] == [0.9] * 4
        assert pairs["bag"] == ["0", "1", "0", "1"] and pairs["ood"] == [1.5] * 4
    (tmp_path / "pairs.jsonl").write_text(json.dumps(table(1)[0] | {"vote_share": -0.1}))
    with pytest.raises(DataError, match=r"vote_share: found -0.1, expected a number that is not neg"):
        load_pairs(source)
