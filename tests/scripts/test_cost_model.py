"""Costs of stages: the fit recovers an exact sum, and plans follow from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench.cost_model import Measured, fitted
from scripts.bench.cost_plan import PAIRS, Plan, sizes, stages


@given(st.floats(1e-6, 1e-2), st.floats(1e-12, 1e-8), st.floats(0.5, 2))
def test_a_sum_of_terms_is_found_and_its_error_said(fixed: float, rate: float, off: float) -> None:
    """Three sizes that follow the sum exactly; a fourth that takes ``off`` times as long as predicted."""
    sizes_of = [(10.0, 1e7), (10.0, 4e7), (30.0, 1e9), (20.0, 5e9)]
    found = [Measured(terms, float(np.dot(terms, (fixed, rate))), 7.0, 3.0) for terms in sizes_of]
    last = found.pop()
    made = fitted([*found, Measured(last.terms, last.seconds * off, 7.0, 3.0)])
    assert made["predicted"] == pytest.approx(last.seconds, rel=1e-6)
    assert made["error"] == pytest.approx(1 / off - 1, abs=1e-6)
    assert (made["bytes_sent"], made["bytes_returned"]) == (7.0, 3.0)


def test_plans_follow_from_what_was_measured() -> None:
    """Twice the work of a token takes twice the time, twice the GPUs half of it; one process is no faster for them."""
    stage = {"coefficients": [0.0, 1e-10], "bytes_sent": 2**30 / PAIRS[0], "bytes_returned": 0.0}
    names = ("texts", "embedding", "scoring", "completions", "entanglement", "training", "neighbours")
    cost = {"through_one_process": 3.6e-4, "visit_through_one_process": 3.6e-5, "stages": dict.fromkeys(names, stage)}
    cost["stages"]["entanglement"] = stage | {"coefficients": [0.0, 2e-10]}  # type: ignore[index]
    hours = stages(Plan(cost, 1e15))
    for name, of in hours.items():
        ratio = 1 if name.startswith("one ") else 2
        assert of(1e8, 8) == pytest.approx(ratio * of(1e8, 16)), name
    assert hours["one process: shards sent to score and taken back"](1e7, 8) == pytest.approx(1.0)
    assert hours["scores of a 70B reward model"](1e7, 8) == pytest.approx(1e7 * 1000 * 70e9 * 2 / 1e15 / 8 / 3600)
    scored = hours["scores of a 70B reward model"](1e7, 8) * 8 / 70
    assert hours["gradient products of an 8B policy"](1e7, 8) == pytest.approx(2 * scored)
    sent = hours["one process: vectors sent to the shares, at most"]
    assert sent(1e7, 8) == pytest.approx(8 * 3.6e-5 * 1e7 / 3600)
    assert sent(1e5, 8) == pytest.approx(3.6e-5 * 1e5 / 3600), "one share holds them all"
    loaded = hours["one after the other: shares of the vectors"]
    assert loaded(1e9, 8) == pytest.approx(1e9 * 4 * 384 / 2**28 * loaded(1e5, 8), rel=1e-3)
    assert "| 10,000,000 | 1 GiB | 14 GiB | 34 GiB | 0 GiB | 114 GiB | 19,531 |" in sizes(Plan(cost, 1e15))
