"""MinHash bands and near-duplicates, against exact sets and datasketch."""

from collections import Counter

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.minhash import BANDS, ROWS, band_keys, candidates, jaccard, near_duplicates
from align.data.word_hashes import Hashes


def test_signatures_agree_as_often_as_sets_are_similar() -> None:
    """The share of equal minima estimates the Jaccard similarity; datasketch estimates the same number."""
    rng = np.random.default_rng(0)
    for shared in (20, 60, 90):
        first = rng.integers(0, 2**63, size=100, dtype=np.uint64)
        second = np.concatenate([first[:shared], rng.integers(0, 2**63, size=100 - shared, dtype=np.uint64)])
        truth = shared / (200 - shared)
        assert jaccard(np.unique(first), np.unique(second)) == pytest.approx(truth)
        sketches = []
        for values in (first, second):
            sketch = MinHash(num_perm=256)
            sketch.update_batch([value.tobytes() for value in values])
            sketches.append(sketch)
        assert sketches[0].jaccard(sketches[1]) == pytest.approx(truth, abs=0.12)
        collided = []
        for _ in range(60):
            salt = np.uint64(rng.integers(0, 2**63)) | np.uint64(1)
            values = np.concatenate([first, second]) * salt
            keys = band_keys(Hashes(values, np.array([0, 100, 200])))
            collided.append((keys[0] == keys[1]).mean())
        assert np.mean(collided) == pytest.approx(truth**ROWS, abs=0.05)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 99))
def test_candidates_are_the_pairs_with_a_shared_band(values: list[int], seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 15, size=(len(values), 2)).astype(np.uint64)
    found = {tuple(row) for row in candidates(keys.T).tolist()}
    truth = {(a, b) for b in range(len(values)) for a in range(b) if (keys[a] == keys[b]).any()}
    assert found <= truth
    if max(Counter(keys[:, 0].tolist()).values()) <= 8 and max(Counter(keys[:, 1].tolist()).values()) <= 8:
        assert found == truth


def test_near_duplicates_are_compared_with_kept_rows() -> None:
    """A chain a ~ b ~ c in which a and c differ: b is dropped, so c is compared with a alone and stays."""
    base = np.arange(1, 109, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sets = [base[:100], base[4:104], base[8:108]]
    hashes = Hashes(np.concatenate(sets), np.cumsum([0, *map(len, sets)]))
    keys = np.zeros((3, BANDS), dtype=np.uint64)

    def of(rows: np.ndarray) -> list[Hashes]:
        assert rows.tolist() == [0, 1, 2]
        return [hashes]

    a, b, c = map(np.unique, sets)
    assert jaccard(a, b) > 0.9 and jaccard(b, c) > 0.9 > jaccard(a, c)
    assert near_duplicates(keys.T, of, 0.9) == {1: 0}
