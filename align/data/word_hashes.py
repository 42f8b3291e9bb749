"""Words and word n-grams of many texts as 64-bit hashes, without a Python object per word.

A word is a run of letters, marks, digits and underscores in lower case and Unicode's NFKC; each character of a script
that is written without spaces (Han, Kana, Thai) is a word. Equal words have equal hashes on every machine; two
different words collide with a probability of 5e-20.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

NOT_A_WORD = r"[^\pL\pM\pN_]+"
UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}])"
INVISIBLE = r"[\x{AD}\x{200B}-\x{200F}\x{2060}\x{FEFF}]+"
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that multiplying by it is a bijection modulo 2^64."""


@dataclass(frozen=True, slots=True)
class Hashes:
    """Hashes of N rows, concatenated."""

    values: np.ndarray
    """uint64 [T]."""
    offsets: np.ndarray
    """int64 [N + 1]: row n is values[offsets[n] : offsets[n + 1]]."""

    @property
    def counts(self) -> np.ndarray:
        """Number of hashes of each row, [N]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """The row of each hash, [T]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    def joined(self, size: int) -> "Hashes":
        """Join every ``size`` consecutive rows into one row."""
        return Hashes(self.values, self.offsets[::size])

    def row(self, number: int) -> np.ndarray:
        """Hashes of one row."""
        return self.values[self.offsets[number] : self.offsets[number + 1]]


def lowered(strings: pa.Array) -> pa.Array:
    """Texts in lower case and Unicode's NFKC, in which forms of one character are equal, without invisible ones."""
    return pc.utf8_lower(pc.utf8_normalize(pc.replace_substring_regex(strings, INVISIBLE, ""), form="NFKC"))


def hash_words(strings: pa.Array) -> Hashes:
    """Hashes of the words of N texts."""
    lower = lowered(strings)
    unspaced = pc.match_substring_regex(lower, UNSPACED)
    if pc.any(unspaced).as_py():
        lower = pc.if_else(unspaced, pc.replace_substring_regex(lower, UNSPACED, r" \1 "), lower)
    spaced = pc.replace_substring_regex(lower, NOT_A_WORD, " ")
    words = pc.split_pattern(spaced, " ")  # utf8_split_whitespace reads past the end (apache/arrow#37757)
    flat = words.flatten()
    counts = pc.list_value_length(words).to_numpy(zero_copy_only=False).astype(np.int64)
    codes = flat.dictionary_encode()
    known = pd.util.hash_array(codes.dictionary.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    hashed = known[codes.indices.to_numpy(zero_copy_only=False)] if len(flat) else np.empty(0, dtype=np.uint64)
    filled = ~pc.equal(flat, "").to_numpy(zero_copy_only=False)
    if not filled.all():
        rows = np.repeat(np.arange(len(counts)), counts)[filled]
        hashed, counts = hashed[filled], np.bincount(rows, minlength=len(counts))
    return Hashes(hashed, _offsets(counts))


def ngrams(words: Hashes, size: int, *, whole: bool = True) -> Hashes:
    """Hash of every n-gram of ``size`` words in order; with ``whole`` a shorter row is one n-gram of all its words."""
    counts = words.counts
    number = np.maximum(counts - size + 1, 0)
    rows = np.repeat(np.arange(len(counts)), number)
    offsets = _offsets(number)
    starts = words.offsets[:-1][rows] + np.arange(len(rows)) - offsets[:-1][rows]
    value = np.zeros(len(rows), dtype=np.uint64)
    for place in range(size):
        value = mixed(value * MULTIPLIER + words.values[starts + place])
    short = np.flatnonzero((counts > 0) & (counts < size)) if whole else np.empty(0, dtype=np.int64)
    if not len(short):
        return Hashes(value, offsets)
    number[short] = 1
    merged = Hashes(np.zeros(int(number.sum()), dtype=np.uint64), _offsets(number))
    longer = np.ones(len(merged.values), dtype=bool)
    longer[merged.offsets[short]] = False
    merged.values[longer] = value
    one = np.zeros(len(short), dtype=np.uint64)
    for place in range(size - 1):
        has = counts[short] > place
        one[has] = mixed(one[has] * MULTIPLIER + words.values[words.offsets[short[has]] + place])
    merged.values[merged.offsets[short]] = one
    return merged


def distinct(hashes: Hashes) -> np.ndarray:
    """Number of distinct hashes of each row, [N]; hashes of a row are compared by 40 bits."""
    rows = hashes.rows.astype(np.uint64)
    keys = np.sort((rows << np.uint64(40)) | (hashes.values >> np.uint64(24)))
    fresh = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    return np.bincount((fresh >> np.uint64(40)).astype(np.int64), minlength=len(hashes.offsets) - 1)


def mixed(values: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit values by a bijection (splitmix64's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def word_list(text: str) -> list[str]:
    """The words of one text, as ``hash_words`` splits it."""
    lower = pc.replace_substring_regex(lowered(pa.array([text], type=pa.string())), UNSPACED, r" \1 ")
    return pc.replace_substring_regex(lower, NOT_A_WORD, " ")[0].as_py().split()
