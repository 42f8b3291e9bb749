"""Readability of a text without a model: garbled and looping responses score low."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.data.word_hashes import Hashes, distinct, hash_words, ngrams

NGRAM = 3
UNREADABLE = r"[\p{Pc}\p{Pd}\p{Po}\p{Pi}\p{Pf}\p{Sm}\p{Sc}\p{Sk}]{4,}|[^\pL\pM\pN\pP\pZ\s\p{Sm}\p{Sc}\p{Sk}]"
"""Runs of four or more punctuation marks and operators, brackets aside; control, replacement and picture characters."""


def readability(strings: pa.Array, words: Hashes | None = None) -> np.ndarray:
    """Share of readable characters, times share of distinct among the word trigrams.

    Letters, digits, white space, brackets, and up to three punctuation marks or operators in a row are readable, so
    that code and mathematics are.

    Args:
        strings: N texts.
        words: hashes of their words; None: they are computed here.

    Returns:
        [N] in [0, 1]; 0 for an empty text.
    """
    length = _length(strings)
    readable = _length(pc.replace_substring_regex(strings, UNREADABLE, "")) / np.maximum(length, 1)
    trigrams = ngrams(words or hash_words(strings), NGRAM, whole=False)
    unique = np.where(trigrams.counts > 0, distinct(trigrams) / np.maximum(trigrams.counts, 1), 1.0)
    return np.where(length > 0, readable * unique, 0.0)


def _length(strings: pa.Array) -> np.ndarray:
    return pc.utf8_length(strings).to_numpy(zero_copy_only=False).astype(np.float64)
