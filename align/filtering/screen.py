"""How much a text reads like text, without a model: garbled and looping responses score low."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from align.filtering.word_hashes import Hashes, distinct, runs, tokenise

RUN = 3
READABLE = r"[\pL\pM\s]+"


def screen(strings: pa.Array, words: Hashes | None = None) -> np.ndarray:
    """Share of characters that are letters or white space, times share of three-word runs that are not repeated.

    Args:
        strings: N texts.
        words: their words, where they have been found already.

    Returns:
        [N] in [0, 1]; 0 for an empty text.
    """
    length = _length(strings)
    letters = 1.0 - _length(pc.replace_substring_regex(strings, READABLE, "")) / np.maximum(length, 1)
    found = runs(words or tokenise(strings), RUN, whole=False)
    fresh = np.where(found.counts > 0, distinct(found) / np.maximum(found.counts, 1), 1.0)
    return np.where(length > 0, letters * fresh, 0.0)


def _length(strings: pa.Array) -> np.ndarray:
    return pc.utf8_length(strings).to_numpy(zero_copy_only=False).astype(np.float64)
