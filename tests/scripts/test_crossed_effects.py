"""Intervals over seeds and prompts cover what they say, and are Student's where only one of the two varies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from scripts.bootstrap import Estimate, bootstrap_mean
from scripts.reproduce.crossed_effects import crossed_gain_per_root_kl, crossed_mean, crossed_p


@pytest.mark.parametrize("spreads", [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (1.0, 0.2, 0.2), (0.0, 0.0, 1.0)])
def test_an_interval_over_seeds_and_prompts_covers_new_ones(spreads: tuple[float, float, float]) -> None:
    """Of the mean over all seeds and prompts there could be; one over prompts alone does not where seeds differ."""
    rng = np.random.default_rng(0)
    of_seed, of_prompt, of_rest = spreads
    inside = prompts_only = 0
    for number in range(400):
        table = 0.3 + of_seed * rng.normal(size=(3, 1)) + of_prompt * rng.normal(size=(1, 80))
        table = table + of_rest * rng.normal(size=(3, 80))
        found, narrow = crossed_mean(table), bootstrap_mean(table.mean(axis=0), seed=number, resamples=200)
        inside += found.low <= 0.3 <= found.high
        prompts_only += narrow.low <= 0.3 <= narrow.high
        assert found.value == pytest.approx(table.mean()) and found.n == 240
    assert inside >= 360
    assert prompts_only < 250 or of_seed == 0


def test_an_interval_over_seeds_and_prompts_of_known_cases() -> None:
    """No variance, no width; one that only seeds have is Student's over their means."""
    assert crossed_mean(np.full((3, 5), 0.5)) == Estimate(0.5, 0.5, 0.5, 15)
    means = np.array([1.0, 2.0, 4.0])
    found = crossed_mean(np.repeat(means[:, None], 50, axis=1))
    low, high = student.interval(0.95, 2, loc=means.mean(), scale=means.std(ddof=1) / np.sqrt(3))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert crossed_p(np.repeat(means[:, None], 50, axis=1)) == pytest.approx(ttest_1samp(means, 0).pvalue)
    assert crossed_p(np.full((3, 5), 0.5)) == 0 and crossed_p(np.zeros((3, 5))) == 1
    for wrong in (np.zeros((1, 5)), np.zeros((5, 1)), np.zeros(5)):
        with pytest.raises(ValueError, match="two seeds and two prompts"):
            crossed_mean(wrong)


def two_way(rng: np.random.Generator, seeds: int, prompts: int, variances: tuple[float, float, float]) -> np.ndarray:
    """A table [seeds, prompts] of mean 0 with these variances over seeds, over prompts and of the rest."""
    of_seed, of_prompt, of_rest = np.sqrt(variances)
    table = of_seed * rng.normal(size=(seeds, 1)) + of_prompt * rng.normal(size=(1, prompts))
    return np.asarray(table + of_rest * rng.normal(size=(seeds, prompts)))


@pytest.mark.parametrize("of_seed", [0.0, 0.003, 0.007])
def test_seeds_that_agree_by_chance_make_no_narrow_interval(of_seed: float) -> None:
    """Three seeds of 256 prompts with the variances of a difference of two policies: also where the seeds' mean square
    is below the residual one, the interval covers the truth; there it once took their variance for known to be 0."""
    rng, inside, agreeing, inside_agreeing = np.random.default_rng(1), 0, 0, 0
    for _ in range(1500):
        table = two_way(rng, 3, 256, (of_seed, 0.06, 1.2))
        found = crossed_mean(table)
        covers = found.low <= 0 <= found.high
        inside += covers
        if 256 * table.mean(axis=1).var(ddof=1) < 1.2:
            agreeing += 1
            inside_agreeing += covers
    assert inside >= 0.94 * 1500
    assert agreeing > 200 and inside_agreeing >= 0.94 * agreeing


def test_an_interval_is_no_narrower_for_seeds_that_agree_more() -> None:
    """Means over seeds drawn together until they are equal: the width falls to that of the noise and not below."""
    table = two_way(np.random.default_rng(2), 3, 100, (0.2, 0.1, 1.0))
    of_seed = table.mean(axis=1, keepdims=True) - table.mean()
    widths = [
        found.high - found.low
        for found in (crossed_mean(table - (1 - share) * of_seed) for share in (1.0, 0.5, 0.2, 0.05, 0.0))
    ]
    assert widths == sorted(widths, reverse=True) and widths[-1] == pytest.approx(widths[-2])
    alone = crossed_mean(table[:, :1] * 0 + np.random.default_rng(3).normal(size=(3, 100)))
    assert alone.high - alone.low > 2 * 1.96 / np.sqrt(300)


def test_gain_per_root_kl_over_seeds_and_prompts_covers_new_ones() -> None:
    """The linearized interval covers the ratio of the true means in at least 93% of tables; no KL, no ratio."""
    rng, inside = np.random.default_rng(4), 0
    for _ in range(400):
        gain = 0.4 + two_way(rng, 4, 80, (0.02, 0.3, 1.0))
        kl = 1.0 + 0.3 * (gain - 0.4) + two_way(rng, 4, 80, (0.01, 0.1, 0.5))
        found = crossed_gain_per_root_kl(gain, kl)
        assert found is not None and found.value == pytest.approx(gain.mean() / np.sqrt(2 * kl.mean()))
        inside += found.low <= 0.4 / np.sqrt(2) <= found.high
    assert inside >= 372
    assert crossed_gain_per_root_kl(gain, kl - kl.mean()) is None


@given(st.integers(0, 2**32 - 1), st.floats(-1, 1))
@settings(deadline=None)
def test_p_over_seeds_and_prompts_is_where_the_interval_ends_at_nothing(seed: int, mean: float) -> None:
    rng = np.random.default_rng(seed)
    table = mean + rng.normal(size=(3, 1)) + rng.normal(size=(3, 20))
    p = crossed_p(table)
    if p < 1e-6:  # below this, 1 - p has too few digits left to say where its interval ends
        certain = crossed_mean(table, confidence=1 - 1e-6)
        assert certain.low > 0 or certain.high < 0
        return
    found = crossed_mean(table, confidence=1 - p)
    assert min(abs(found.low), abs(found.high)) == pytest.approx(0, abs=1e-6)
