"""Readability of a text without a model: garbled and looping responses score low."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.filtering.word_hashes import Hashes, distinct, hash_words, ngrams

NGRAM = 3
READABLE = r"[\pL\pM\s]+"


def readability(strings: pa.Array, words: Hashes | None = None) -> np.ndarray:
    """Share of characters that are letters or white space, times share of distinct among the word trigrams.

    Args:
        strings: N texts.
        words: hashes of their words; None: they are computed here.

    Returns:
        [N] in [0, 1]; 0 for an empty text.
    """
    length = _length(strings)
    letters = 1.0 - _length(pc.replace_substring_regex(strings, READABLE, "")) / np.maximum(length, 1)
    trigrams = ngrams(words or hash_words(strings), NGRAM, whole=False)
    unique = np.where(trigrams.counts > 0, distinct(trigrams) / np.maximum(trigrams.counts, 1), 1.0)
    return np.where(length > 0, letters * unique, 0.0)


def _length(strings: pa.Array) -> np.ndarray:
    return pc.utf8_length(strings).to_numpy(zero_copy_only=False).astype(np.float64)
