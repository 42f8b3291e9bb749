"""Win rates of several policies: those of every two, their mean over prompts, and no order of the pairs matters."""

from itertools import combinations

import numpy as np
import pytest

from align.evaluation.win_table import win_table
from align.stats import share_interval


def test_rates_are_means_over_prompts_of_means_over_policies() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    verdicts = {pair: rng.choice([0.0, 0.5, 1.0], 40, p=[0.2, 0.1, 0.7]) for pair in combinations(names, 2)}
    table = win_table(verdicts)
    assert sorted(row["policy"] for row in table) == names
    assert [row["rate"]["value"] for row in table] == sorted((row["rate"]["value"] for row in table), reverse=True)
    assert sum(row["rate"]["value"] for row in table) == pytest.approx(len(names) / 2)
    for row in table:
        one = row["policy"]
        own = {
            other: verdicts[one, other] if (one, other) in verdicts else 1 - verdicts[other, one]
            for other in names
            if other != one
        }
        assert row["against"] == {other: share_interval(values).to_dict() for other, values in own.items()}
        assert row["rate"] == share_interval(np.mean(list(own.values()), axis=0)).to_dict()


def test_the_order_in_which_two_policies_were_compared_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    ab, ac, bc = rng.random((3, 30))
    one = win_table({("a", "b"): ab, ("a", "c"): ac, ("b", "c"): bc})
    other = win_table({("c", "b"): 1 - bc, ("b", "a"): 1 - ab, ("a", "c"): ac})
    for row, same in zip(one, other, strict=True):
        assert row["policy"] == same["policy"] and row["rate"]["value"] == pytest.approx(same["rate"]["value"])
        assert row["rate"]["low"] == pytest.approx(same["rate"]["low"])


def test_two_policies_that_were_not_compared_are_named() -> None:
    with pytest.raises(ValueError, match="b and c were not compared"):
        win_table({("a", "b"): np.ones(3), ("a", "c"): np.ones(3)})
