"""Intervals: coverage against known truths, golden values, and what may be claimed from how much."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t

from align.evaluation.ranking import auc_interval
from align.evaluation.rewards import gain_per_root_kl
from align.evaluation.winrate import length_control
from align.stats import (
    FEWEST_UNITS,
    Estimate,
    correlation,
    disjoint,
    ends,
    excludes,
    influence_interval,
    interval,
    jackknife_interval,
    mean_interval,
    number,
    share_among,
    share_interval,
)  # fmt: skip
from scripts.study.coverage import CASES, MARK, covered, markdown
from scripts.tables import insert

DRAWS = 400
ERROR = 3 * np.sqrt(0.95 * 0.05 / DRAWS)
"""Three standard errors of a simulated coverage of 95%."""


@pytest.mark.parametrize("name", CASES)
def test_coverage(name: str) -> None:
    """Between 93 and 97%, but for simulation error, at each size from 5 units on; the share of 0.1 of 5 is discrete."""
    case = CASES[name]
    for size in (5, 8, 20, 60):
        found = covered(case, size, DRAWS, seed=size)
        if found is not None:
            assert case.least - ERROR <= found <= 1.0, (size, found)


def test_without_skewness_it_is_student_s_interval() -> None:
    values = np.array([-2.0, -1.0, 0.0, 1.0, 2.0]) + 3
    found = mean_interval(values)
    half = t.ppf(0.975, 4) * values.std(ddof=1) / np.sqrt(5)
    assert (found.value, found.low, found.high, found.n) == (3.0, pytest.approx(3 - half), pytest.approx(3 + half), 5)


def test_a_skewed_sample_reaches_further_on_its_long_side() -> None:
    found = mean_interval([0.0, 0.1, 0.2, 0.3, 0.4, 5.0])
    assert found.low is not None and found.high is not None and found.high - found.value > 2 * (found.value - found.low)
    mirrored = mean_interval([0.0, -0.1, -0.2, -0.3, -0.4, -5.0])
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_shares_of_independent_observations_are_wilson_s() -> None:
    for right, count in ((3, 10), (0, 20), (20, 20), (7, 9)):
        exact = binomtest(right, count).proportion_ci(0.95, method="wilson")
        found = share_interval([1.0] * right + [0.0] * (count - right))
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_repeated_observations_are_worth_one() -> None:
    """Each of 12 answers counted 10 times: as wide as the 12, and not narrower where all agree."""
    answers = np.array([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0])
    once, repeated = (
        share_interval(answers),
        share_interval(np.repeat(answers, 10), clusters=np.repeat(np.arange(12), 10)),
    )
    assert repeated.units == 12 and once.low is not None and repeated.low is not None
    assert repeated.low <= once.low + 0.01 and repeated.low > once.low - 0.06
    every = share_interval(np.ones(120), clusters=np.repeat(np.arange(12), 10))
    assert every.low is not None and share_interval(np.ones(120)).low > every.low > 0.6
    values = np.random.default_rng(0).normal(size=12)
    single, many = mean_interval(values), mean_interval(np.repeat(values, 10), clusters=np.repeat(np.arange(12), 10))
    assert (many.value, many.low, many.high) == pytest.approx((single.value, single.low, single.high))


def test_a_share_of_a_part_keeps_its_clusters() -> None:
    rng = np.random.default_rng(3)
    clusters, right = np.repeat(np.arange(15), 6), rng.integers(0, 2, 90).astype(float)
    part = rng.random(90) < 0.6
    assert share_among(right, part, clusters=clusters) == share_interval(right[part], clusters=clusters[part]).to_dict()
    assert share_among(right, np.zeros(90, dtype=bool)) is None


def test_what_does_not_vary_has_no_interval() -> None:
    ties = share_interval([0.5] * 30)
    assert (ties.low, ties.high) == (None, None) and not excludes(ties, 0.5) and "all equal" in interval(ties.to_dict())
    same = mean_interval([2.0] * 30)
    assert same.low is None and excludes(same, 0.0) and not excludes(same, 2.0)
    assert mean_interval([1.0]).low is None and "single value" in interval(mean_interval([1.0]).to_dict())
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_nothing_is_claimed_from_few_units() -> None:
    far = np.linspace(9.9, 10.1, FEWEST_UNITS)
    assert excludes(mean_interval(far), 0.0) and not excludes(mean_interval(far[1:]), 0.0)
    clustered = mean_interval(np.repeat(far[1:], 50), clusters=np.repeat(np.arange(FEWEST_UNITS - 1), 50))
    assert not excludes(clustered, 0.0) and not excludes(clustered.to_dict(), 0.0)
    high, low = Estimate(1.0, 0.9, 1.1, 20).to_dict(), Estimate(0.0, -0.1, 0.1, 20).to_dict()
    assert disjoint(high, low) and not disjoint(low, high) and not disjoint(high, low | {"units": 3})
    assert disjoint(high, low | {"n": FEWEST_UNITS}) and not disjoint(high | {"n": FEWEST_UNITS - 1}, low)
    assert not disjoint(high, low | {"high": 0.9}), "ends that touch are not apart"


def test_correlation_of_normal_values_is_near_fisher_s() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=4000)
    found = correlation(x, y)
    assert found is not None
    z = np.arctanh(found["value"]) + np.array([-1.96, 1.96]) / np.sqrt(3997)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.tanh(z)), abs=0.004)
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]) is None
    four = correlation([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 2.0, 4.0])
    assert four is not None and four["value"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2, 4])[0, 1])
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None and correlation([1.0] * 9, range(9)) is None


@pytest.mark.parametrize("sizes", [[1] * 12, [3] * 12, [1, 1, 2, 5, 1, 3, 1, 1, 2, 4, 1, 2]])
def test_correlation_leaves_out_one_cluster_after_the_other(sizes: list[int]) -> None:
    """Against numpy's correlation of what is left; far from 0 and with unequal means, where sums would not do."""
    rng = np.random.default_rng(3)
    x = rng.normal(5.0, 1.0, sum(sizes)) ** 2
    y = -0.7 * x + rng.normal(-9.0, 4.0, sum(sizes))
    clusters = np.repeat(np.arange(12), sizes)
    left = [np.arctanh(np.corrcoef(x[clusters != k], y[clusters != k])[0, 1]) for k in range(12)]
    r = np.corrcoef(x, y)[0, 1]
    expected = jackknife_interval(float(np.arctanh(r)), left, n=sum(sizes), sizes=sizes)
    found = correlation(x, y, clusters=clusters)
    assert found is not None and expected.low is not None and expected.high is not None
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (r, np.tanh(expected.low), np.tanh(expected.high)), abs=1e-9
    )
    assert (found["n"], found.get("units") or found["n"]) == (sum(sizes), 12)


def test_copies_do_not_narrow_a_correlation() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(2, 20))
    once, often = correlation(x, y), correlation(np.repeat(x, 5), np.repeat(y, 5), clusters=np.repeat(np.arange(20), 5))
    assert once is not None and often is not None
    assert [often[key] for key in ("value", "low", "high")] == pytest.approx(
        [once[key] for key in ("value", "low", "high")]
    )
    assert (often["n"], often["units"]) == (100, 20)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_correlations_without_an_interval(sign: float) -> None:
    """A line has none, nor have values of which one alone differs: without it there is no correlation."""
    line = correlation(np.arange(6.0), sign * np.arange(6.0))
    assert line is not None and line["value"] == pytest.approx(sign) and line["low"] is None and line["n"] == 6
    one = correlation([0.0, 0.0, 0.0, 0.0, 1.0], sign * np.array([0.1, 0.3, 0.2, 0.0, 5.0]))
    assert one is not None and one["low"] is None and one["high"] is None and one["n"] == 5
    assert one["value"] == pytest.approx(sign * np.corrcoef([0, 0, 0, 0, 1], [0.1, 0.3, 0.2, 0.0, 5.0])[0, 1])


def test_numbers_have_two_digits_of_their_spread() -> None:
    assert [number(1234.5678), number(0.123456), number(0.5, 0.0)] == ["1.23e+03", "0.123", "0.5"]
    assert [number(1.23456, spread) for spread in (30.0, 3.0, 0.3, 0.03, 0.0003)] == [
        "1", "1.2", "1.23", "1.235", "1.2346",
    ]  # fmt: skip
    assert number(1234.56, 30.0) == "1235" and number(1.5, 1.0) == "1.5"


def test_intervals_in_words() -> None:
    found = Estimate(0.8249, 0.7, 0.95, 30).to_dict()
    assert interval(found) == "0.82 (0.70 to 0.95)"
    assert interval(Estimate(0.5, None, None, 2).to_dict()) == "0.5 (all equal)"
    assert interval(Estimate(0.5, None, None, 1).to_dict()) == "0.5 (a single value)"
    assert interval(Estimate(0.5, None, None, 40, 1).to_dict()) == "0.5 (a single value)"
    assert ends(found) == (0.7, 0.8249, 0.95) and ends(Estimate(0.5, None, None, 2).to_dict()) == (0.5, 0.5, 0.5)


def test_influence_of_linear_estimates() -> None:
    """An estimate that is a mean has the interval of the mean, whichever function it comes from."""
    rng = np.random.default_rng(1)
    gain, kl = rng.normal(1.0, 1.0, 40), np.full(40, 2.0)
    ratio = gain_per_root_kl(gain, kl)
    plain = mean_interval(gain / 2.0)
    assert ratio is not None and (ratio.value, ratio.low, ratio.high) == pytest.approx(
        (plain.value, plain.low, plain.high)
    )
    assert influence_interval(0.0, gain - gain.mean(), n=40).low == pytest.approx(mean_interval(gain).low - gain.mean())


def test_equal_lengths_leave_the_plain_win_rate() -> None:
    outcome = np.random.default_rng(2).choice([0.0, 0.5, 1.0], 200)
    found = length_control(outcome, np.zeros(200))
    plain = share_interval(outcome)
    assert found is not None and found.rate.low is not None
    assert (found.rate.low, found.rate.high) == pytest.approx((plain.low, plain.high), abs=0.01)


def test_a_perfect_ranking_is_not_certain() -> None:
    found = auc_interval(np.arange(10.0) + 100, np.arange(10.0))
    assert found.value == 1.0 and found.low is not None and found.low < 0.8


def test_the_page_shows_the_kept_coverage() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = json.loads((root / "studies" / "coverage.json").read_text())
    assert insert(page, markdown(found), MARK) == page and found["coverage"].keys() == CASES.keys()
