"""Held-out splits, folds and clusters that keep pairs of one prompt together."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from align.config.columns import TEXT

ROUNDING = 1e-9
"""Rounding error that remains of 1 - 10 * 0.1."""


def split_by_prompt(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): about ``fraction`` of the pairs held out, no prompt on both sides; see ``folds_by_prompt``."""
    if fraction == 0:
        return pairs, pairs.select([])
    share = max(fraction, 1 / max(len(pairs), 1))
    parts = int(1 / share + ROUNDING)
    rest = 1 - parts * share
    held_out = _dealt(pairs, [share] * parts + ([rest] if rest > ROUNDING else []), seed) == 0
    return pairs.select(np.flatnonzero(~held_out)), pairs.select(np.flatnonzero(held_out))


def folds_by_prompt(pairs: Dataset, folds: int, seed: int) -> np.ndarray:
    """Fold of every pair, int64 [N] in 0..folds-1; pairs of one prompt share a fold, folds have nearly equal size.

    A prompt of more than 1 in 2 ``folds`` pairs (an instruction common to the dataset) does not say which pairs belong
    together, so its pairs are assigned one by one.
    """
    return _dealt(pairs, [1 / folds] * folds, seed)


def _dealt(pairs: Dataset, shares: list[float], seed: int) -> np.ndarray:
    """``folds_by_prompt`` for folds that hold these shares of the pairs."""
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
    """Cluster of every pair, int64 [N]: pairs that share a prompt are correlated, so statistics resample clusters.

    A prompt of more than 1 in 10 pairs (an instruction common to the dataset) does not say which pairs belong together;
    its pairs form a cluster if they share a response.
    """
    count = len(pairs)
    texts = {name: [_name(text) for text in pairs[name]] for name in TEXT}
    pairs_of = Counter(texts["prompt"])
    nodes: dict[bytes, int] = {}
    links: list[tuple[int, int]] = []
    for k, (prompt, *responses) in enumerate(zip(*texts.values(), strict=True)):
        shared = [prompt + response for response in responses]
        if pairs_of[prompt] <= max(2, count // 10):
            shared.append(prompt)
        links += [(k, count + nodes.setdefault(name, len(nodes))) for name in shared]
    size = count + len(nodes)
    graph = coo_matrix((np.ones(len(links)), tuple(np.array(links, dtype=np.int64).reshape(-1, 2).T)), (size, size))
    clusters: np.ndarray = connected_components(graph, directed=False)[1][:count].astype(np.int64)
    return clusters


def _name(text: Any) -> bytes:
    """Digest of a text or of messages."""
    return hashlib.blake2b(json.dumps(text, sort_keys=True).encode(), digest_size=16).digest()
