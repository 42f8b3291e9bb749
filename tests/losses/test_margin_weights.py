"""MADPO's weight: golden values and the properties of the paper (P1 to P4, P9, the bounds)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.errors import ConfigError
from align.losses.margin_weights import (
    MADPO_TAU,
    effective_sample_size,
    madpo_coefficient,
    madpo_weight,
    margin_regions,
    trust_of_each,
    trusted_label,
    validate_madpo,
    validate_trust,
    weight_summary,
)

A = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": 2.0}
B = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": MADPO_TAU}
C = {"c_max": 4.0, "c_min": 0.25, "lam": 1.0, "tau": 7.0}
GOLDEN = [
    (A, {-8: 1, -3: 1, -1: 0.7569028941, -0.1: 0.9657025388, 0: 1, 0.1: 1.0310336262, 1: 1.0894304275,
         3: 0.9449883273, 5: 0.9422725963, 8: 0.9826038001, 15: 0.9994475411}),
    (B, {-5: 0.0377956027, -3: 0.0620135585, -1: 0.4464094258, 1: 1.2036545911, 3: 1.0466995951, 8: 0.9970724975}),
    (C, {-5: 0.0002230718, -3: 0.0002792275, -1: 0.0693391020, 1: 1.3423710111, 3: 1.0497731664, 8: 0.9896314535}),
]  # fmt: skip

valid = st.fixed_dictionaries(
    {
        "c_max": st.floats(1.01, 8),
        "c_min": st.floats(0, 0.99),
        "lam": st.floats(0.05, 5),
        "tau": st.floats(0.05, 12),
    }
)
margins = st.lists(st.floats(-50, 50), min_size=1, max_size=30)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("parameters", "table"), GOLDEN)
def test_golden_weights(parameters: dict[str, float], table: dict[float, float]) -> None:
    """Values from the reference code's formula in float64."""
    found = madpo_weight(tensor([float(h) for h in table]), **parameters)
    assert torch.allclose(found, tensor([float(w) for w in table.values()]), atol=1e-9)


def test_golden_coefficients() -> None:
    found = madpo_coefficient(tensor([0.0, 1.0, -1.0, 3.0, 5.0]), **A)
    assert torch.allclose(found, tensor([1.6804790632, 1.3641753271, 1.3641753271, 0.7330436052, 0.5364333465]))


@given(valid, margins)
def test_p1_coefficient_is_one_at_tau_and_falls(parameters: dict[str, float], values: list[float]) -> None:
    tau = parameters["tau"]
    assert float(madpo_coefficient(tensor([tau]), **parameters)) == pytest.approx(1.0, abs=1e-9)
    ordered = tensor(sorted(abs(value) for value in values))
    c = madpo_coefficient(ordered, **parameters)
    assert (c.diff() <= 1e-12).all()
    assert (c >= parameters["c_min"] - 1e-12).all() and (c <= parameters["c_max"]).all()
    if parameters["lam"] * tau < 30:  # beyond, 1 + exp(-lam tau) rounds to 1 in float64
        assert (c < parameters["c_max"]).all()


@given(valid, margins)
def test_p2_p3_weight_is_positive_and_bounded(parameters: dict[str, float], values: list[float]) -> None:
    w = madpo_weight(tensor(values), **parameters)
    x = torch.linspace(1e-6, 1, 20001, dtype=torch.float64)
    bound = float(((1 + x) / (1 + x ** parameters["c_max"])).max())
    assert (w > 0).all() and (w <= bound + 1e-6).all() and bound < 2


@given(valid, margins)
def test_p4_weights_of_the_two_labels_average_to_one(parameters: dict[str, float], values: list[float]) -> None:
    m = tensor(values)
    mean = torch.sigmoid(m) * madpo_weight(m, **parameters) + torch.sigmoid(-m) * madpo_weight(-m, **parameters)
    inside = m.abs() < parameters["tau"] - 1e-9
    assert torch.allclose(mean[inside], torch.ones_like(mean[inside]))
    assert (mean <= 1 + 1e-9).all()


@given(valid)
def test_p9_where_the_weight_is_one(parameters: dict[str, float]) -> None:
    tau = parameters["tau"]
    at = madpo_weight(tensor([0.0, tau, -tau, -tau - 1, -1e6]), **parameters)
    assert torch.allclose(at, torch.ones_like(at), atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_for_extreme_margins_with_gradient(dtype: torch.dtype) -> None:
    top = 6e4 if dtype == torch.float16 else 1e6
    m = torch.tensor([-top, -104.0, -7.0, 0.0, 7.0, 104.0, top], dtype=dtype, requires_grad=True)
    w = madpo_weight(m)
    (gradient,) = torch.autograd.grad(w.sum(), m)
    assert w.dtype == torch.float32 and torch.isfinite(w).all() and torch.isfinite(gradient).all()


def test_steepest_slope_is_the_published_one() -> None:
    """Right of -tau: sigmoid(tau) tau lam (c_max - 1)(1 - c_min) / (c_max - c_min) = 0.5872 for these parameters."""
    m = torch.linspace(-2 + 1e-9, 12, 200001, dtype=torch.float64)
    w = madpo_weight(m, **A)
    steepest = float((w.diff() / m.diff()).abs().max())
    assert steepest == pytest.approx(1 / (1 + math.exp(-2)) * 2 * 0.5 / 1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**A, "c_max": 1.0}, "c_max: found 1.0, expected a number above 1"),
        ({**A, "c_min": 1.0}, "c_min: found 1.0, expected a number in [0, 1)"),
        ({**A, "lam": 0.0}, "lam: found 0.0, expected a number above 0"),
        ({**A, "tau": float("nan")}, "tau: found nan, expected a number above 0"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match="madpo-parameters") as caught:
        validate_madpo(**parameters)
    assert message in str(caught.value)


def test_warns_with_numbers_if_the_target_is_not_monotone() -> None:
    assert validate_madpo(**A) == []
    (warning,) = validate_madpo(**B)
    assert "6.91" in warning and "above 3" in warning


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20))
def test_effective_sample_size_is_between_one_and_n(values: list[float]) -> None:
    ess = float(effective_sample_size(tensor(values)))
    assert 1 - 1e-9 <= ess <= len(values) + 1e-9
    assert float(effective_sample_size(torch.full((7,), 0.3))) == pytest.approx(7)


@given(margins)
def test_regions_are_a_partition(values: list[float]) -> None:
    assert sum(margin_regions(tensor(values), 2.0).values()) == pytest.approx(1.0)


share = st.floats(0, 1)


@given(valid, margins, st.floats(0, 5), share, share)
def test_trusted_label_is_the_mix_of_both_losses(
    parameters: dict[str, float], values: list[float], slope: float, trust: float, strength: float
) -> None:
    """weight * CE(target) equals (1 - t) w(g b m) CE(1) + t CE(sigmoid(b m)) at every policy."""
    m, x = tensor(values), torch.linspace(-4, 4, len(values), dtype=torch.float64)
    target, weight = trusted_label(m, slope=slope, trust=trust, strength=strength, **parameters)
    hard, soft = torch.nn.functional.softplus(-x), torch.nn.functional.softplus(x)
    p = torch.sigmoid(slope * m)
    label = madpo_weight(strength * slope * m, **parameters) * hard
    expected = (1 - trust) * label + trust * (p * hard + (1 - p) * soft)
    assert torch.allclose(weight * (target * hard + (1 - target) * soft), expected, rtol=1e-9, atol=1e-12)
    assert ((target >= 0) & (target <= 1)).all() and (weight > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("trust", "strength"), [(0.0, 0.0), (0.0, 1.0), (0.3, 0.5), (1.0, 1.0)])
def test_trusted_label_is_finite_for_extreme_margins(dtype: torch.dtype, trust: float, strength: float) -> None:
    top = 6e4 if dtype == torch.float16 else 1e6
    m = torch.tensor([-top, -104.0, -7.0, 0.0, 7.0, 104.0, top], dtype=dtype)
    for values in trusted_label(m, slope=2.0, trust=trust, strength=strength, tau=500.0):
        assert torch.isfinite(values).all()
        assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), share)
def test_trust_of_each_falls_with_the_error_and_keeps_its_mean(spread: list[float], trust: float) -> None:
    found = trust_of_each(tensor(sorted(spread)), trust)
    assert float(found.mean()) == pytest.approx(trust, abs=1e-9)
    assert (found.diff() <= 1e-12).all()
    assert ((found >= 0) & (found <= 1)).all()


def test_trust_of_each_against_the_formula() -> None:
    """Odds are inversely proportional to v + s^2 with v the mean of s^2; equal errors leave the trust as it was."""
    spread = tensor([0.5, 1.0, 3.0])
    found = trust_of_each(spread, 0.4)
    odds = found / (1 - found) * (spread.square().mean() + spread.square())
    assert torch.allclose(odds, odds[0].expand(3))
    assert torch.allclose(trust_of_each(tensor([2.0, 2.0]), 0.4), tensor([0.4, 0.4]))
    m = tensor([1.0, -1.0, 2.0])
    target, _ = trusted_label(m, slope=1.0, trust=found, strength=0.0)
    assert torch.allclose(target, (1 - found) + found * torch.sigmoid(m))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slope": -1.0, "trust": 0.5, "strength": 0.5}, "slope: found -1.0, expected a number of at least 0"),
        ({"slope": 1.0, "trust": 1.5, "strength": 0.5}, "trust: found 1.5, expected a number in [0, 1]"),
        ({"slope": 1.0, "trust": 0.5, "strength": float("nan")}, "strength: found nan, expected a number in [0, 1]"),
    ],
)
def test_bad_trust_is_named(parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match="loss-parameter") as caught:
        validate_trust(**parameters)
    assert message in str(caught.value)


def test_weight_summary_by_hand() -> None:
    """Weights 1, 1, 2, 4 of margins in each of the four regions: (sum)^2 / sum of squares = 64 / 22."""
    found = weight_summary(torch.tensor([1.0, 1.0, 2.0, 4.0]), torch.tensor([-3.0, -1.0, 1.0, 2.0]), 2.0)
    assert found == {
        "mean": 2.0,
        "min": 1.0,
        "max": 4.0,
        "ess": pytest.approx(64 / 22),
        "ess_share": pytest.approx(16 / 22),
        "disagreement": 0.5,
        "regions": {"m <= -tau": 0.25, "-tau < m < 0": 0.25, "0 <= m < tau": 0.25, "m >= tau": 0.25},
    }
