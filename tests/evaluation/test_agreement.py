"""Agreement of judges: kappa by hand, its bounds, and intervals over prompts."""

import numpy as np
import pytest

from align.evaluation.agreement import agreements, cohens_kappa


def test_kappa_by_hand() -> None:
    """Cohen's formula on a table of 20, 5, 10 and 15 verdicts: (0.7 - 0.5) / (1 - 0.5) = 0.4."""
    first = np.repeat([1.0, 1.0, -1.0, -1.0], [20, 5, 10, 15])
    second = np.repeat([1.0, -1.0, 1.0, -1.0], [20, 5, 10, 15])
    found = cohens_kappa(first, second, np.arange(50))
    assert found is not None and found["value"] == pytest.approx(0.4)
    assert 0.1 < found["low"] < 0.4 < found["high"] < 0.7


def test_a_judge_agrees_with_itself_and_not_with_its_opposite() -> None:
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=(2, 60))
    (same, *_, opposite) = agreements({"a": advantage, "b": 3 * advantage**3, "c": -advantage})
    assert same["kappa"]["value"] == same["same_verdict"]["value"] == 1
    assert same["rank_correlation"]["value"] == pytest.approx(1)
    assert opposite["a"] == "b" and opposite["kappa"]["value"] < -0.9
    assert opposite["rank_correlation"]["value"] == pytest.approx(-1)


def test_independent_judges_agree_by_chance_over_prompts() -> None:
    """Two policies that write the same are no further prompts: the interval is that of one policy."""
    rng = np.random.default_rng(1)
    one, other = np.sign(rng.normal(size=(2, 300)))
    (alone,) = agreements({"a": one[None], "b": other[None]})
    (twice,) = agreements({"a": np.stack([one, one]), "b": np.stack([other, other])})
    for key in ("kappa", "rank_correlation"):
        assert alone[key]["low"] < 0 < alone[key]["high"]
        assert twice[key]["low"] == pytest.approx(alone[key]["low"], abs=1e-9)
    assert twice["same_verdict"]["units"] == 300


def test_verdicts_that_never_vary() -> None:
    (found,) = agreements({"a": np.ones((1, 9)), "b": np.ones((1, 9))})
    assert found["kappa"] is None and found["rank_correlation"] is None and found["same_verdict"]["value"] == 1
    (ties,) = agreements({"a": np.zeros((1, 9)), "b": np.arange(9.0)[None]})
    assert ties["kappa"]["value"] == pytest.approx(0) and ties["rank_correlation"] is None
