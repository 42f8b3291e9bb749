"""Which pairs to check next: a stratified sample, and the lowest margins; the rate of wrong labels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.next_to_check import flip_rates, random_order, reading_order


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 60))
def test_every_beginning_holds_each_source_in_proportion(sources: list[str], count: int) -> None:
    """Within one pair for each source."""
    order = random_order([f"{k}" for k in range(len(sources))], sources)
    assert sorted(order) == list(range(len(sources)))
    beginning = [sources[row] for row in order[:count]]
    for name in set(sources):
        fair = len(beginning) * sources.count(name) / len(sources)
        assert abs(beginning.count(name) - fair) <= len(set(sources)) - 1


def test_the_order_does_not_depend_on_the_rows() -> None:
    ids = [f"pair {k}" for k in range(40)]
    places = np.random.default_rng(0).permutation(40)
    first = [ids[row] for row in random_order(ids)]
    shuffled = [ids[k] for k in places]
    assert [shuffled[row] for row in random_order(shuffled)] == first
    assert first != sorted(ids)


def test_a_rate_from_the_beginning_is_that_of_the_table() -> None:
    """A table whose second half, another source, is all wrong: 20 of 400 tell it within three standard errors."""
    sources = ["right"] * 300 + ["wrong"] * 100
    order = random_order([f"{k}" for k in range(400)], sources)[:20]
    found = flip_rates([sources[row] == "wrong" for row in order], [sources[row] for row in order])
    assert found["all"]["value"] == pytest.approx(0.25)
    assert found["sources"]["wrong"]["value"] == 1.0
    assert found["sources"]["right"]["high"] > 0
    assert flip_rates([]) == {"all": None, "sources": {}}


def test_reading_begins_with_the_lowest_margin() -> None:
    assert reading_order(np.array([1.0, np.nan, -2.0, 0.0, -2.0])).tolist() == [2, 4, 3, 0, 1]
