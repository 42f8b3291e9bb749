"""Pools of labeled pairs to choose from, with the scores that a filter chooses by.

Shapes: S seeds, N pairs, R responses per prompt, D features. sound: every pair comes from its own prompt. repeated:
most prompts are near-copies of a few, each with a new label. junk: a part of the pairs has wide features and a label
drawn by a fair coin, which the quality score knows with some error; in the other pools quality is noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from align.filtering.knn.search import kth_distance
from align.filtering.scores import diversity
from align.filtering.selection import greedy, importance, top_k
from scripts.reproduce.exact_arena.gold import RESPONSES, SIZE, draw_gold
from scripts.reproduce.exact_arena.world import ERRORS, World, prefer, world_of

KINDS = ("sound", "repeated", "junk")
REPEATED, FEW, JITTER = 0.8, 40, 0.1
"""Share of the prompts that are near-copies, number of originals, standard deviation between copy and original."""
JUNK, WIDER, KNOWN = 0.2, 1.5, 1.5
"""Share of the pairs that is junk, factor on the spread of its features, by how many standard deviations its quality
score is lower."""
NEIGHBOURS = 5
WEIGHTS: dict[str, dict[str, float]] = {
    "filtered": {"margin": 1.0, "quality": 0.5, "diversity": 0.5},
    "margin": {"margin": 1.0},
    "quality": {"quality": 1.0},
    "diversity": {"diversity": 1.0},
}
RANDOM, GREEDY, SOFT = "random", "greedy", "random, soft labels"
ARMS = (RANDOM, SOFT, *WEIGHTS, GREEDY)
"""Ways to choose a subset; ``SOFT`` is the random one, trained with soft labels."""
KEEPS = (0.05, 0.1, 0.2, 0.4)
ALL, ALL_SOFT = "all pairs", "all pairs, soft labels"


@dataclass(frozen=True, slots=True)
class PoolCell:
    """One condition: number of pairs, share of labels flipped, kind of pool, error of the margins."""

    pairs: int
    flips: float
    kind: str
    error: str

    @property
    def name(self) -> str:
        """Name in files and logs."""
        return f"{self.pairs} pairs, {self.flips:.0%} flipped, {self.kind}, {self.error}"


@dataclass(frozen=True, slots=True)
class Pool:
    """The pairs of several seeds and their scores."""

    world: World
    quality: np.ndarray
    """[S, N]."""
    vectors: np.ndarray
    """[S, N, D] float32, unit length: sum of both responses' features, whichever is preferred."""
    diversity: np.ndarray
    """[S, N]."""

    def rows(self, seed: int, arm: str, count: int) -> np.ndarray:
        """Rows [count] that an arm keeps of the pairs of one seed, an index into S."""
        names = np.arange(self.quality.shape[1])
        if arm == RANDOM:
            return np.sort(np.random.default_rng(seed).choice(names, count, replace=False))
        columns = {
            "margin": self.world.margin[seed], "quality": self.quality[seed], "diversity": self.diversity[seed],
        }  # fmt: skip
        if arm == GREEDY:
            weights = WEIGHTS["filtered"]
            alone = {name: weight for name, weight in weights.items() if name != "diversity"}
            base = importance(columns, alone)
            return greedy(base, self.vectors[seed], names, count, weight=weights["diversity"])
        return top_k(importance(columns, WEIGHTS[arm]), names, count)

    def subset(self, arm: str, count: int) -> World:
        """The pairs that an arm keeps, for every seed."""
        world = self.world
        rows = [self.rows(seed, arm, count) for seed in range(len(world.gold))]
        features, margin, gold_margin = (
            np.stack([one[kept] for one, kept in zip(values, rows, strict=True)])
            for values in (world.features, world.margin, world.gold_margin)
        )
        return World(features, margin, gold_margin, world.gold)


def draw_pool(cell: PoolCell, seeds: Sequence[int]) -> Pool:
    """The pools of the given seeds; cells that differ only in flips or errors share the responses."""
    drawn = [_draw(cell, np.random.default_rng([seed, cell.pairs, KINDS.index(cell.kind)])) for seed in seeds]
    features, quality, gold = (np.stack(values) for values in zip(*drawn, strict=True))
    rngs = [np.random.default_rng([seed, cell.pairs, len(KINDS) + ERRORS.index(cell.error)]) for seed in seeds]
    both = features[:, :, 0] + features[:, :, 1]
    vectors = (both / np.linalg.norm(both, axis=2, keepdims=True)).astype(np.float32)
    far = np.stack([diversity(kth_distance(one, NEIGHBOURS, seed=0).distance) for one in vectors])
    return Pool(world_of(features, gold, cell.error, rngs), quality, vectors, far)


def _draw(cell: PoolCell, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One seed's features [N, R, D] with the preferred response first, quality [N] and gold direction [D]."""
    gold = draw_gold(rng)
    x = rng.normal(size=(cell.pairs, RESPONSES, SIZE))
    quality = rng.normal(size=cell.pairs)
    junk = np.zeros(cell.pairs, dtype=bool)
    if cell.kind == "repeated":
        copies = rng.random(cell.pairs) < REPEATED
        few, of = rng.normal(size=(FEW, RESPONSES, SIZE)), rng.integers(FEW, size=cell.pairs)
        x[copies] = few[of[copies]] + JITTER * x[copies]
    if cell.kind == "junk":
        junk = rng.random(cell.pairs) < JUNK
        x[junk] *= WIDER
        quality -= KNOWN * junk
    prefer(x, np.where(junk, 0.5, expit((x[:, 0] - x[:, 1]) @ gold)), cell.flips, rng)
    return x, quality, gold
