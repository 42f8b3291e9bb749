"""Which responses of a table the reference has to run over: each one of a prompt once, however many pairs it is in.

Legend: N pairs of the table, P passes; side 0 is the chosen and side 1 the rejected response.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import ID_COLUMNS, MASK_COLUMNS

ROWS = 1024
"""Rows of a table that are read at a time."""
KEY_BYTES = 16
"""Bytes of a key: two of 10^9 responses have the same one with probability 10^-21."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Pairs to run the reference over, and where each response of the table finds its log-prob among them."""

    places: np.ndarray
    """int64 [P, 2]: the two responses of each pass, both of one prompt, as 2 row + side. A response without another
    one is there twice, which costs one sequence in the layout ``shared_prefix``."""
    source: np.ndarray
    """int64 [N, 2]: index of each response of the table among the 2P of ``places``."""

    @property
    def repeats(self) -> bool:
        """Whether the passes are other pairs than those of the table."""
        return len(self.places) != len(self.source) or bool((self.places.ravel() != np.arange(self.places.size)).any())

    def example(self, dataset: Dataset, index: int) -> dict[str, Any]:
        """The example of one pass: token ids of its prompt and its two responses, and which of these tokens count."""
        (first, chosen), (second, rejected) = (divmod(int(place), 2) for place in self.places[index])
        row, other = dataset[first], dataset[second] if second != first else None
        prompt, *sides = ID_COLUMNS
        ids = row[prompt], row[sides[chosen]], (other or row)[sides[rejected]]
        example = dict(zip(ID_COLUMNS, ids, strict=True))
        if MASK_COLUMNS[0] in row:
            masks = row[MASK_COLUMNS[chosen]], (other or row)[MASK_COLUMNS[rejected]]
            example |= dict(zip(MASK_COLUMNS, masks, strict=True))
        return example

    def lengths(self, dataset: Dataset) -> list[int]:
        """Tokens of each pass, its prompt counted once, [P]."""
        prompt, *sides = (np.fromiter(map(len, dataset[name]), np.int64, len(dataset)) for name in ID_COLUMNS)
        responses = np.stack(sides, axis=1).ravel()
        found: list[int] = (prompt[self.places[:, 0] // 2] + responses[self.places].sum(axis=1)).tolist()
        return found


def distinct_passes(dataset: Dataset) -> Passes:
    """The passes that give the log-prob of every response of a table with ``ID_COLUMNS``.

    The different responses of a prompt make pairs in the order in which they come, so that its pairs stay as they are
    if no response is in two of them.
    """
    rows: dict[bytes, list[int]] = {}
    keys: list[tuple[bytes, bytes]] = []
    for row, (prompt, *responses) in enumerate(_keys(dataset)):
        rows.setdefault(prompt, []).append(row)
        keys.append((responses[0], responses[1]))
    places: list[tuple[int, int]] = []
    source = np.empty((len(keys), 2), dtype=np.int64)
    for own in rows.values():
        known: dict[bytes, int] = {}
        for row in own:
            for side, key in enumerate(keys[row]):
                known.setdefault(key, 2 * row + side)
        first = 2 * len(places)
        distinct = list(known.values())
        places += [(place, distinct[min(k + 1, len(distinct) - 1)]) for k, place in enumerate(distinct) if k % 2 == 0]
        at = {key: first + k for k, key in enumerate(known)}
        source[own] = [[at[key] for key in keys[row]] for row in own]
    return _in_order(np.array(places, dtype=np.int64).reshape(-1, 2), source)


def _in_order(places: np.ndarray, source: np.ndarray) -> Passes:
    """Passes in the order of their first responses, so that a table without repeats keeps its order."""
    order = places[:, 0].argsort(kind="stable")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Passes(places[order], 2 * back[source // 2] + source % 2)


def _keys(dataset: Dataset) -> Iterator[tuple[bytes, ...]]:
    """Keys of prompt, chosen and rejected response of every row; the tokens of a response that count are part of it."""
    masks = [name for name in MASK_COLUMNS if name in dataset.column_names]
    ids = dataset.select_columns([*ID_COLUMNS, *masks])
    for start in range(0, len(ids), ROWS):
        part = ids[start : start + ROWS]
        columns = [[_key(row) for row in part[name]] for name in ID_COLUMNS]
        for side, name in enumerate(masks, 1):
            columns[side] = [key + _key(mask) for key, mask in zip(columns[side], part[name], strict=True)]
        yield from zip(*columns, strict=True)


def _key(ids: list[int]) -> bytes:
    return hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=KEY_BYTES).digest()
