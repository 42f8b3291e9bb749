"""Clusters of pairs that share texts, and held-out splits, folds and bootstrap samples that keep clusters together."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from align.config.columns import RESPONSES, SPLIT_GROUP
from align.data.text import is_long, plain, text_key, without_system
from align.io.console import log

ROUNDING = 1e-9
"""Rounding error that remains of 1 - 10 * 0.1."""


def split_by_prompt(pairs: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): about ``fraction`` of the pairs held out, no cluster on both sides; see ``clusters_of``.

    Of the parts of that size, the one whose size is nearest to ``fraction`` is held out.
    """
    if fraction == 0:
        return pairs, pairs.select([])
    share = max(fraction, 1 / max(len(pairs), 1))
    parts = int(1 / share + ROUNDING)
    rest = 1 - parts * share
    dealt = _dealt(clusters_of(pairs), [share] * parts + ([rest] if rest > ROUNDING else []), seed, "held-out part")
    sizes = np.bincount(dealt, minlength=parts)[:parts]
    away = np.where(sizes > 0, np.abs(sizes - share * len(pairs)), np.inf)
    held_out = dealt == int(away.argmin())
    return pairs.select(np.flatnonzero(~held_out)), pairs.select(np.flatnonzero(held_out))


def folds_by_prompt(pairs: Dataset, folds: int, seed: int) -> np.ndarray:
    """Fold of every pair, int64 [N] in 0..folds-1: no cluster of ``clusters_of`` lies in two folds.

    Folds have nearly equal size, unless a cluster is larger than a fold (which is logged); with fewer clusters than
    folds, some folds are empty.
    """
    return folds_of_clusters(clusters_of(pairs), folds, seed)


def folds_of_clusters(clusters: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """``folds_by_prompt`` from the cluster of every pair, int64 [N]."""
    return _dealt(clusters, [1 / folds] * folds, seed, "fold")


def _dealt(clusters: np.ndarray, shares: list[float], seed: int, part: str) -> np.ndarray:
    """Part of every pair, [N]: clusters dealt out, the largest first, to parts that hold these shares of the pairs."""
    counts = np.unique(clusters, return_counts=True)[1]
    which = np.unique(clusters, return_inverse=True)[1]
    wanted = len(clusters) * shares[0]
    if counts.size and counts.max() > max(1.0, np.ceil(wanted)):
        log.warning(
            "splits: %d of %d pairs belong together (the same prompt, response or pair) and are not divided, but a %s "
            "of equal size has %d: parts differ in size, and intervals count these pairs as one",
            counts.max(), len(clusters), part, round(wanted),
        )  # fmt: skip
    shared = np.array(shares)
    order = np.random.default_rng(seed).permutation(counts.size)
    part_of = np.zeros(counts.size, dtype=np.int64)
    sizes = np.zeros(len(shares), dtype=np.int64)
    for unit in order[np.argsort(-counts[order], kind="stable")]:
        smallest = int((sizes / shared).argmin())
        part_of[unit] = smallest
        sizes[smallest] += counts[unit]
    dealt: np.ndarray = part_of[which]
    return dealt


def draw_clusters(pairs: Dataset, seed: int) -> np.ndarray:
    """Rows of a bootstrap sample of the clusters of ``clusters_of``: as many clusters as there are, with repetition."""
    clusters = clusters_of(pairs)
    order = np.argsort(clusters, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(clusters))[:-1])
    drawn = np.random.default_rng(seed).integers(0, len(members), len(members))
    return np.sort(np.concatenate([members[k] for k in drawn]))


def clusters_of(pairs: Dataset) -> np.ndarray:
    """Cluster of every pair, int64 [N] from 0: connected components of pairs that share texts.

    Pairs are connected if they share a prompt, or a response to one prompt, or a response of ``LONG`` characters to any
    prompt; equal pairs share all three. A prompt of this length is the same under another system message. Texts that
    differ in case, white space or Unicode form are equal (``bare``). Such pairs are correlated, so splits keep clusters
    together and statistics resample clusters. A prompt of more than half of the pairs is an instruction common to the
    dataset and connects none; its pairs are connected by their responses. Pairs of one ``split_group`` are connected.
    """
    count = len(pairs)
    asked = [_prompt_keys(prompt) for prompt in pairs["prompt"]]
    times = Counter(key for keys in asked for key in keys)
    common = {key for key, found in times.items() if found > max(2, count / 2)}
    sides = [[plain(text) for text in pairs[name]] for name in RESPONSES if name in pairs.column_names]
    nodes: dict[bytes, int] = {}
    links: list[tuple[int, int]] = []
    named = pairs[SPLIT_GROUP] if SPLIT_GROUP in pairs.column_names else [None] * count
    for k, (keys, name, *responses) in enumerate(zip(asked, named, *sides, strict=True)):
        shared = [key for key in keys if key not in common] + ([text_key(name) + b"named"] if name else [])
        for response in responses:
            answer = text_key(response)
            shared += [key + answer for key in keys] + ([answer] if is_long(response) else [])
        links += [(k, count + nodes.setdefault(node, len(nodes))) for node in shared]
    found = components(links, count + len(nodes))[:count]
    clusters: np.ndarray = np.unique(found, return_inverse=True)[1].astype(np.int64)
    return clusters


def components(links: Sequence[tuple[int, int]], size: int) -> np.ndarray:
    """Connected component of each of ``size`` nodes, int [size] from 0; each link connects two nodes."""
    edges = np.array(links, dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), (size, size))
    found: np.ndarray = connected_components(graph, directed=False)[1]
    return found


def _prompt_keys(prompt: Any) -> set[bytes]:
    """Keys of a prompt: of the whole, and of what remains of it without system messages if that is long."""
    whole, rest = plain(prompt), plain(without_system(prompt))
    return {text_key(text) for text in (whole, rest) if text == whole or is_long(rest)}
