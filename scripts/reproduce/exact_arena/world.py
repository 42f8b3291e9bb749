"""Worlds: prompts with responses, labeled pairs of them, margins of a reward model that errs in a known way.

Shapes: S seeds, N pairs, R responses per prompt, D features. Every pair comes from its own prompt; its preferred
response stands first, the other second. ``draw_world`` draws the worlds of the arena's cells, with 6 responses per
prompt; cells that differ only in flips or errors share prompts and responses. ``draw_pairs`` draws the world of one
seed with 2 responses per prompt.

Errors of the margins are named in ``ERRORS``; a number may follow: ``independent 4`` and ``shared 4`` have standard
deviation 4 in place of ``NOISE``. ``out-of-fold 10`` are the margins of a logistic reward model that sees 10 random
directions of the features, cross-fitted on the same labels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import expit

from align.trust.linear_proxy import scaled
from scripts.reproduce.exact_arena.gold import GOLD_SPREAD, RESPONSES, SIZE, draw_gold
from scripts.reproduce.exact_arena.heads import FOLDS, out_of_fold_margins

ERRORS = ("none", "independent", "shared", "out-of-domain", "in-sample", "cross-fitted")
NOISE = 2.0
"""Standard deviation of an independent or shared error of the margin; that of the gold margin is 2, too."""
FOREIGN = 0.5
"""Share of pairs outside the domain of the out-of-domain reward model."""
MEMORY = 3.0
"""Prior variance, in squared log-odds, of what the in-sample reward model remembers of each single pair."""
RIDGE = 1.0
NEWTON_STEPS = 12


@dataclass(frozen=True, slots=True)
class Cell:
    """One condition of the study."""

    pairs: int
    flips: float
    """Share of labels flipped after Bradley-Terry has drawn them."""
    spread: str
    """Which pair of a prompt is labeled: ``even``: any; ``few easy``: the closest of three in gold; ``many easy``: the
    furthest apart of three."""
    error: str

    @property
    def name(self) -> str:
        """Name in files and tables."""
        return f"{self.pairs} pairs, {self.flips:.0%} flipped, {self.spread}, {self.error}"

    def to_dict(self) -> dict[str, float | str]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class World:
    """Pairs of several seeds; float64."""

    features: np.ndarray
    """[S, N, R, D]: the preferred response, the other one, the remaining responses of the prompt."""
    margin: np.ndarray
    """[S, N], the reward model's reward of the preferred response minus that of the other."""
    gold_margin: np.ndarray
    """[S, N]."""
    gold: np.ndarray
    """[S, D]."""

    @property
    def difference(self) -> np.ndarray:
        """Features [S, N, D] of the preferred response minus those of the other."""
        return self.features[:, :, 0] - self.features[:, :, 1]


def draw_world(cell: Cell, seeds: Sequence[int]) -> World:
    """The worlds of the given seeds."""
    drawn = [_draw_cell(cell, np.random.default_rng([seed, cell.pairs])) for seed in seeds]
    features, gold = (np.stack(values) for values in zip(*drawn, strict=True))
    rngs = [np.random.default_rng([seed, cell.pairs, ERRORS.index(cell.error)]) for seed in seeds]
    return world_of(features, gold, cell.error, rngs)


def draw_pairs(pairs: int, flips: float, error: str, rng: np.random.Generator) -> World:
    """The world of one seed [S = 1] with 2 responses per prompt, all of it drawn from ``rng``."""
    gold = draw_gold(rng)
    features = draw_labeled(gold, pairs, flips, rng)
    return world_of(features[None], gold[None], error, [rng])


def draw_labeled(gold: np.ndarray, pairs: int, flips: float, rng: np.random.Generator) -> np.ndarray:
    """Features [N, 2, D] of the responses of new prompts, the preferred one first, for the gold direction [D]."""
    x = np.stack([rng.normal(size=(pairs, SIZE)) for _ in range(2)], axis=1)
    prefer(x, expit((x[:, 0] - x[:, 1]) @ gold), flips, rng)
    return x


def world_of(features: np.ndarray, gold: np.ndarray, error: str, rngs: Sequence[np.random.Generator]) -> World:
    """The world of features [S, N, R, D], preferred responses first, and gold directions [S, D].

    Args:
        features: of the responses.
        gold: directions of the gold rewards.
        error: kind of the reward model's error, see the module.
        rngs: each seed's source of that error; it must not repeat the draws of ``gold``.
    """
    difference = features[:, :, 0] - features[:, :, 1]
    return World(features, _margins(error, difference, gold, rngs), np.einsum("snd,sd->sn", difference, gold), gold)


def prefer(x: np.ndarray, belief: np.ndarray, flips: float, rng: np.random.Generator) -> None:
    """Put the preferred one of the first two responses of x [N, R, D] first, in place.

    Args:
        x: features.
        belief: probability [N] that the first is preferred.
        flips: share of the labels flipped afterwards.
        rng: generator of both draws.
    """
    preferred = rng.random(len(x)) < belief
    preferred ^= rng.random(len(x)) < flips
    x[~preferred, :2] = x[~preferred, 1::-1]


def _draw_cell(cell: Cell, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One seed's features [N, R, D] with the preferred response first, and its gold direction [D]."""
    gold = draw_gold(rng)
    x = rng.normal(size=(cell.pairs, RESPONSES, SIZE))
    rewards = x @ gold
    gaps = np.abs(rewards[:, 0::2] - rewards[:, 1::2])
    chosen = {"even": np.zeros(cell.pairs, int), "few easy": gaps.argmin(axis=1), "many easy": gaps.argmax(axis=1)}
    start = 2 * chosen[cell.spread][:, None]
    x = np.take_along_axis(x, ((start + np.arange(RESPONSES)) % RESPONSES)[..., None], axis=1)
    prefer(x, expit((x[:, 0] - x[:, 1]) @ gold), cell.flips, rng)
    return x, gold


def _margins(error: str, x: np.ndarray, gold: np.ndarray, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """Margins [S, N] of a reward model with the kind of error called ``error``; x [S, N, D], gold [S, D]."""
    kind, _, number = error.partition(" ")
    if kind == "out-of-fold":
        directions = [np.linalg.qr(rng.normal(size=(SIZE, int(number))))[0] for rng in rngs]
        seen = zip(x, directions, rngs, strict=True)
        return np.stack([out_of_fold_margins(scaled(one @ known), rng) for one, known, rng in seen])
    if error == "in-sample":
        return memorized_margins(x, MEMORY)
    if error == "cross-fitted":
        folds = np.arange(x.shape[1]) % FOLDS
        margin = np.empty(x.shape[:2])
        for fold in range(FOLDS):
            test = folds == fold
            margin[:, test] = np.einsum("snd,sd->sn", x[:, test], reward_model(x[:, ~test], 0.0))
        return margin
    right = np.einsum("snd,sd->sn", x, gold)
    if error == "none":
        return right
    noise = float(number) if number else NOISE
    if kind == "independent":
        return right + noise * np.stack([rng.normal(size=x.shape[1]) for rng in rngs])
    wrong = np.stack([rng.normal(size=SIZE) for rng in rngs])
    wrong /= np.linalg.norm(wrong, axis=1, keepdims=True)
    if kind == "shared":
        return right + noise / np.sqrt(2) * np.einsum("snd,sd->sn", x, wrong)
    foreign = np.stack([rng.random(x.shape[1]) < FOREIGN for rng in rngs])
    return np.where(foreign, GOLD_SPREAD / np.sqrt(2) * np.einsum("snd,sd->sn", x, wrong), right)


def memorized_margins(x: np.ndarray, memory: float) -> np.ndarray:
    """Margins [S, N] of a reward model on its own training pairs x [S, N, D].

    The model's margin m_i of pair i is x_i theta + b_i: what it has learned and what it remembers of this pair. The b_i
    that maximizes the penalized likelihood is memory * sigmoid(-m_i), so m solves m = x theta + memory * sigmoid(-m).
    """
    return _remembered(np.einsum("snd,sd->sn", x, reward_model(x, memory)), memory)


def reward_model(x: np.ndarray, memory: float) -> np.ndarray:
    """theta [S, D] that minimizes sum_i min_b [softplus(-(x_i theta + b)) + b^2 / (2 memory)] + RIDGE |theta|^2 / 2."""
    theta = np.zeros((x.shape[0], x.shape[2]))
    for _ in range(NEWTON_STEPS):
        margin = _remembered(np.einsum("snd,sd->sn", x, theta), memory)
        wrong = expit(-margin)
        slope = wrong * (1 - wrong)
        curvature = slope / (1 + memory * slope)
        gradient = RIDGE * theta - np.einsum("snd,sn->sd", x, wrong)
        hessian = np.swapaxes(x * curvature[..., None], 1, 2) @ x + RIDGE * np.eye(x.shape[2])
        theta = theta - np.linalg.solve(hessian, gradient[..., None])[..., 0]
    return theta


def _remembered(z: np.ndarray, memory: float) -> np.ndarray:
    """Solve m = z + memory * sigmoid(-m) elementwise by bisection: the left minus the right side increases in m."""
    low, high = z, z + memory
    if memory == 0:
        return z
    for _ in range(40):
        middle = (low + high) / 2
        above = middle > z + memory * expit(-middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2
