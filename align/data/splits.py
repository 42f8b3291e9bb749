"""Held-out splits and folds that keep pairs of one prompt together."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from align.config.columns import TEXT
from align.data.pairs import ROUNDING


def split_by_prompt(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): about ``fraction`` held out, no prompt on both sides (see ``folds_by_prompt``)."""
    if fraction == 0:
        return pairs, pairs.select([])
    share = max(fraction, 1 / max(len(pairs), 1))
    parts = int(1 / share + ROUNDING)
    rest = 1 - parts * share
    held_out = _dealt(pairs, [share] * parts + ([rest] if rest > ROUNDING else []), seed) == 0
    return pairs.select(np.flatnonzero(~held_out)), pairs.select(np.flatnonzero(held_out))


def folds_by_prompt(pairs: Dataset, folds: int, seed: int) -> np.ndarray:
    """Fold [N] in 0..folds-1 of every pair; the pairs of one prompt stay together, folds are of nearly equal size.

    A prompt that more than one pair in 2 ``folds`` shares (an instruction common to a whole dataset) says nothing
    about which pairs belong together: its pairs are dealt out one by one.
    """
    return _dealt(pairs, [1 / folds] * folds, seed)


def _dealt(pairs: Dataset, shares: list[float], seed: int) -> np.ndarray:
    """``folds_by_prompt`` for folds of these shares of the pairs."""
    folds, shared = len(shares), np.array(shares)
    keys = [json.dumps(prompt, sort_keys=True) for prompt in pairs["prompt"]]
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    largest = max(1, len(keys) // (2 * folds))
    units: list[list[int]] = []
    for members in groups.values():
        units += [members] if len(members) <= largest else [[member] for member in members]
    order = np.random.default_rng(seed).permutation(len(units))
    fold = np.empty(len(keys), dtype=np.int64)
    sizes = np.zeros(folds, dtype=np.int64)
    for unit in sorted((units[k] for k in order), key=len, reverse=True):
        smallest = int((sizes / shared).argmin())
        fold[unit] = smallest
        sizes[smallest] += len(unit)
    return fold


def clusters_of(pairs: Dataset) -> np.ndarray:
    """Number of the cluster of every pair, int64 [N]: pairs of one prompt are no independent draws.

    A prompt that more than one pair in ten shares (an instruction common to a whole dataset) says nothing about which
    pairs belong together: of its pairs those do that share a response.
    """
    count = len(pairs)
    texts = {name: [_name(text) for text in pairs[name]] for name in TEXT}
    often = Counter(texts["prompt"])
    places: dict[bytes, int] = {}
    links: list[tuple[int, int]] = []
    for k, (prompt, *responses) in enumerate(zip(*texts.values(), strict=True)):
        shared = [prompt + response for response in responses]
        if often[prompt] <= max(2, count // 10):
            shared.append(prompt)
        links += [(k, count + places.setdefault(name, len(places))) for name in shared]
    size = count + len(places)
    graph = coo_matrix((np.ones(len(links)), tuple(np.array(links, dtype=np.int64).reshape(-1, 2).T)), (size, size))
    clusters: np.ndarray = connected_components(graph, directed=False)[1][:count].astype(np.int64)
    return clusters


def _name(text: Any) -> bytes:
    """Digest of a text or messages."""
    return hashlib.blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=16).digest()
