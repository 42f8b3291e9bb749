"""Batches under a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.models.batching import in_so_many, token_batches


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 120), st.booleans())
def test_every_index_once_within_the_budget(lengths: list[int], budget: int, padded: bool) -> None:
    batches = token_batches(lengths, budget, padded=padded)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[k] for k in batch]
        cost = len(sizes) * max(sizes) if padded else sum(sizes)
        assert len(batch) == 1 or cost <= budget
    assert [lengths[k] for batch in batches for k in batch] == sorted(lengths, reverse=True)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 120), st.data())
def test_as_many_batches_as_asked_for(lengths: list[int], budget: int, data: st.DataObject) -> None:
    batches = token_batches(lengths, budget)
    count = data.draw(st.integers(1, len(lengths)))
    found = in_so_many(batches, count)
    assert len(found) == max(count, len(batches)) and all(found)
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    with pytest.raises(ValueError, match="cannot make"):
        in_so_many(batches, len(lengths) + 1)
