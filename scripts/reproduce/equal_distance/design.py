"""The design: which policies are trained on which draws, where they are judged, how they are read. Fixed beforehand."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Twin = Literal["a", "b"]
"""Two label draws of one sample seed; where draw a takes the first response at u, draw b takes it at 1 - u."""
FIRST_SEED = 10
"""Sample seeds 0 to 9 belong to earlier studies and to the pilot."""
PILOT_SEED = 9
REWARD_MODELS = 3
"""Outside reward models on disjoint human-rated pairs; sample seed s uses number s modulo this."""
BLOCKS = 4
"""Disjoint blocks of test prompts; sample seed s uses number s modulo this."""
TARGET, OTHERS = 1.0, (0.3, 3.0)
"""KL to the reference, nats, at which policies are compared: the primary one, and the secondary ones."""
BASELINE = "dpo"


@dataclass(frozen=True, slots=True)
class Arm:
    """A method of the study.

    Attributes:
        loss: name in the registry of losses.
        seeds: number of sample seeds, from ``FIRST_SEED`` on.
        reads_labels: whether the label draw changes the training; then both twins of a seed are trained.
        paired: whether its difference to DPO is taken seed by seed; else its seeds are compared with all of DPO's.
    """

    loss: str
    seeds: int
    reads_labels: bool
    paired: bool


ARMS = {
    "dpo": Arm("dpo", 10, True, True),
    "madpo": Arm("madpo", 6, True, True),
    "trust": Arm("trust", 4, True, True),
    "odpo": Arm("odpo", 4, True, True),
    "mmpo": Arm("mmpo", 6, False, False),
    "relabelled": Arm("dpo", 6, False, False),
}
"""Method -> its cells. ``mmpo`` trains on soft labels of the margins, ``relabelled`` is DPO on pairs turned so that
every margin is at least 0: neither reads the label."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of pairs, prompts, steps and tokens."""

    train_prompts: int = 1024
    seen_prompts: int = 400
    """Prompts between the training and the test ones that earlier studies judged on: left out."""
    block: int = 256
    reward_pairs: int = 650
    marks: tuple[int, ...] = (16, 32, 64)
    """Steps after which the policy is kept and judged."""
    batch: int = 16
    learning_rate: float = 5e-4
    max_new_tokens: int = 24
    reference_samples: int = 4


@dataclass(frozen=True, slots=True)
class Place:
    """A policy's training: method, sample seed and label draw."""

    method: str
    seed: int
    twin: Twin

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.method}-{self.seed}{self.twin}"


def places(methods: tuple[str, ...] = tuple(ARMS), seeds: int | None = None) -> Iterator[Place]:
    """The cells, seed by seed, so that what is finished when a run stops is as balanced as can be.

    Args:
        methods: keys of ``ARMS``.
        seeds: at most so many seeds of each method; None: all.
    """
    most = max(arm.seeds for arm in ARMS.values())
    for number in range(most if seeds is None else min(most, seeds)):
        for method in methods:
            if number < ARMS[method].seeds:
                twins: tuple[Twin, ...] = ("a", "b") if ARMS[method].reads_labels else ("a",)
                yield from (Place(method, FIRST_SEED + number, twin) for twin in twins)
