"""Slopes of the objectives of a reward model are their closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config import ObjectiveSection
from reward_models.registry import resolve_objective
from scripts.study.objective_slopes import margin_slopes, share_on_misranked


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=5), st.floats(0, 3))
def test_slopes_are_the_closed_forms(gaps: list[float], tau: float) -> None:
    z = np.array(gaps)
    plain, power = resolve_objective(ObjectiveSection()), {"tau": tau}
    assert margin_slopes(plain, z) == pytest.approx(1 / (1 + np.exp(z)))
    family = resolve_objective(ObjectiveSection(name="comp_sum", parameters=power))
    assert margin_slopes(family, z) == pytest.approx((1 + np.exp(-z)) ** (1 - tau) / (1 + np.exp(z)), rel=1e-6)
    mse = resolve_objective(ObjectiveSection(name="margin_mse"))
    assert margin_slopes(mse, z, teacher=2.0) == pytest.approx(np.abs(2 * (z - 2)), abs=1e-12)
    share = share_on_misranked(np.ones(len(z)), z)
    assert share == pytest.approx(np.mean(z < 0)) and share_on_misranked(np.zeros(len(z)), z) == 0
