"""Words and n-grams as hashes, and duplicate keys, against Python's own sets."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.data.word_hashes import distinct, hash_words, ngrams, word_list
from align.filtering import equal_keys as keys
from align.filtering.text_survey import content_hashes

WORDS = st.lists(st.sampled_from(["a", "bee", "Cat", "dog,", "élan", "猫", "x_1"]), max_size=12)


@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 5))
def test_words_and_ngrams_are_those_of_python(rows: list[list[str]], size: int) -> None:
    """Equal words have equal hashes, n-grams never cross a row, short rows are one n-gram."""
    strings = pa.array([" ".join(row) for row in rows], type=pa.string())
    words, found = hash_words(strings), ngrams(hash_words(strings), size)
    expected = [word_list(" ".join(row)) for row in rows]
    assert words.counts.tolist() == [len(row) for row in expected]
    truth = [
        [tuple(row[k : k + size]) for k in range(len(row) - size + 1)] or ([tuple(row)] if row else [])
        for row in expected
    ]
    assert found.counts.tolist() == [len(row) for row in truth]
    flat = [run for row in truth for run in row]
    same = {(a, b) for a in range(len(flat)) for b in range(len(flat)) if flat[a] == flat[b]}
    assert same == {(a, b) for a in range(len(flat)) for b in range(len(flat)) if found.values[a] == found.values[b]}
    assert distinct(found).tolist() == [len(set(row)) for row in truth]


def test_words_do_not_depend_on_the_memory_after_the_text() -> None:
    """Arrow's ``utf8_split_whitespace`` reads past texts that end in white space and fill a block of 64 bytes."""
    for _ in range(100):
        words = hash_words(pa.array(["x" * 31 + ".", "x" * 31 + "."]))
        assert words.counts.tolist() == [1, 1] and len(set(words.values)) == 1


def test_words_of_several_scripts() -> None:
    assert word_list("Don't STOP, l'été_2 — नमस्ते") == ["don", "t", "stop", "l", "été_2", "नमस्ते"]
    assert word_list("東京は夜") == ["東", "京", "は", "夜"] and word_list(" .,; ") == []


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 9), max_size=5), st.integers(1, 7))
def test_equal_keys(values: list[int], wanted: list[int], block: int) -> None:
    """Against counting, for any block size."""
    array = np.array(values, dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "BLOCK", block)
        assert keys.duplicated(array).tolist() == [values.count(value) > 1 for value in values]
        sought = np.unique(np.array(wanted, dtype=np.uint64))
        assert keys.isin_sorted(array, sought).tolist() == [value in wanted for value in values]
        two = np.stack([array, array[::-1]], axis=1)
        assert np.array_equal(keys.combined_key(two, (0, 1)), keys.combined_key(two[:, ::-1], (1, 0)))
        assert len(np.unique(keys.combined_key(two, (0, 1)))) == len({tuple(row) for row in two.tolist()})


def test_unicode_forms_of_one_text_are_equal() -> None:
    """Composed or not, in full width, with ligatures or invisible characters: words and contents are the same."""
    forms = [
        "Ein K\u00f6ln \ufb01lm",
        "Ein Ko\u0308ln film",
        "\uff25in K\u00f6ln\u00a0film ",
        "Ein K\u00f6ln fi\u00adlm\u200b",
    ]
    texts = pa.array(forms)
    assert len(set(content_hashes(texts).tolist())) == 1
    words = hash_words(texts)
    assert all(np.array_equal(words.row(k), words.row(0)) for k in range(4))
    assert [word_list(text) for text in forms] == [["ein", "k\u00f6ln", "film"]] * 4
    assert content_hashes(pa.array(["a b"]))[0] != content_hashes(pa.array(["ab"]))[0]
