"""Pairs whose texts are near-copies of each other, so that splits can keep them together. Only on request."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset

from align.config.columns import RESPONSES, SPLIT_GROUP
from align.data.minhash import CHECKED, band_keys, candidates, jaccard
from align.data.splits import components
from align.data.text import is_long, plain
from align.data.word_hashes import Hashes, hash_words, ngrams
from align.io.arrow_tables import as_dataset
from align.io.console import log

SHINGLE = 3
"""Words in a row that are compared as one."""
NEAR = 0.5
"""Least Jaccard similarity of the shingles of near-copies: two of 20 words exchanged give 0.5."""
BANDS, ROWS = 20, 3
"""Two texts of similarity 0.5 are compared with a probability of 0.93, of 0.6 with 0.99, of 0.7 with 0.9998."""


def with_near_copies(pairs: Dataset) -> Dataset:
    """The pairs with the column ``split_group``: pairs of one name are near-copies, and splits do not divide them.

    Two pairs are near-copies if their prompts are, or if two of their responses of at least ``align.data.text.LONG``
    characters are: their shingles of ``SHINGLE`` words have a Jaccard similarity of at least ``NEAR``. Shingles in more
    than half of the different prompts (of the different responses) belong to an instruction common to them and do not
    count. Found by MinHash; the work grows with the number of texts and with the pairs of texts that are compared.

    Equal texts are left to ``align.data.splits.clusters_of``, which always connects them.

    A ``split_group`` that the pairs have already is kept: pairs of one name stay connected.

    Args:
        pairs: pair table [N].
    """
    count = len(pairs)
    links = _links([[plain(prompt)] for prompt in pairs["prompt"]])
    sides = [[plain(text) for text in pairs[name]] for name in RESPONSES]
    links += _links([[text for text in texts if is_long(text)] for texts in zip(*sides, strict=True)])
    given = pairs[SPLIT_GROUP] if SPLIT_GROUP in pairs.column_names else [None] * count
    first: dict[str, int] = {}
    links += [(k, first.setdefault(name, k)) for k, name in enumerate(given) if name is not None]
    found = components(links, count)
    sizes = np.bincount(found, minlength=1)
    together = sizes[found] > 1
    log.info("near-copies: %d of %d pairs are in %d groups, which splits do not divide", int(together.sum()), count,
             int((sizes > 1).sum()))  # fmt: skip
    first_of = {group: k for k, group in reversed(list(enumerate(found.tolist())))}
    ids = pairs["id"]
    names = [f"near {ids[first_of[group]]}" if more else None for group, more in zip(found, together, strict=True)]
    kept = pairs.remove_columns([SPLIT_GROUP]) if SPLIT_GROUP in pairs.column_names else pairs
    table = kept.with_format("arrow")[:].append_column(SPLIT_GROUP, pa.array(names, type=pa.string()))
    return as_dataset(table)


def _links(texts_of: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Links between rows that hold near-copies of each other; of rows with equal texts, only the first is linked.

    Args:
        texts_of: the texts of each row.
    """
    rows: dict[str, list[int]] = {}
    for k, texts in enumerate(texts_of):
        for text in texts:
            rows.setdefault(text, []).append(k)
    unique = list(rows)
    if not unique:
        return []
    near = _near(_own(ngrams(hash_words(pa.array(unique, type=pa.string())), SHINGLE)))
    return [(rows[unique[a]][0], rows[unique[b]][0]) for a, b in near]


def _own(shingles: Hashes) -> Hashes:
    """The distinct shingles of each text that at most half of the texts have, sorted."""
    count = len(shingles.counts)
    order = np.lexsort((shingles.values, shingles.rows))
    rows, values = shingles.rows[order], shingles.values[order]
    fresh = np.ones(len(values), dtype=bool)
    fresh[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    rows, values = rows[fresh], values[fresh]
    _, which, times = np.unique(values, return_inverse=True, return_counts=True)
    own = times[which] <= max(2, count / 2)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows[own], minlength=count))]).astype(np.int64)
    return Hashes(values[own], offsets)


def _near(sets: Hashes) -> list[tuple[int, int]]:
    """Pairs of texts with a similarity of at least ``NEAR``."""
    keys = band_keys(sets, BANDS, ROWS)
    compared = candidates(keys[:, band] for band in range(BANDS))
    found = []
    for start in range(0, len(compared), CHECKED):
        for a, b in compared[start : start + CHECKED].tolist():
            if jaccard(sets.row(a), sets.row(b)) >= NEAR:
                found.append((a, b))
    return found
