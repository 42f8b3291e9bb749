"""The methods of the study and their candidates on validation seeds: equally many for each, with the same betas.

Every method tries the same betas first. At the best of them it then tries three other values of its own parameter or
shape; a method without one tries three betas between the best and its neighbors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from align.losses.registry import resolve
from scripts.reproduce.exact_arena.training import Recipe

BETAS = tuple(float(f"{beta:.3g}") for beta in np.geomspace(0.02, 2.0, 12))
"""Candidates that every method tries first."""
BETWEEN = (-0.5, 0.25, 0.75)
"""Offsets from the best beta, in places of BETAS, of the betas tried next; at an edge they are reflected inward."""
CANDIDATES = len(BETAS) + len(BETWEEN)


@dataclass(frozen=True, slots=True)
class Method:
    """A loss, the labels it is trained on, and the parameters tried next to beta."""

    loss: str
    others: tuple[Mapping[str, float], ...] = ()
    """Parameters tried at the best beta; the betas are tried with the loss's defaults."""
    labels: Literal["given", "redrawn", "relabelled"] = "given"
    part: Literal["all", "amplify", "dampen"] = "all"

    def first(self) -> list[Recipe]:
        """One recipe per beta of ``BETAS``."""
        return [self._recipe({"beta": beta}) for beta in BETAS]

    def then(self, best: int) -> list[Recipe]:
        """The recipes tried after ``BETAS[best]`` was the best of the betas."""
        if self.others:
            return [self._recipe({"beta": BETAS[best], **other}) for other in self.others]
        last = len(BETAS) - 1
        places = [abs(last - abs(last - abs(best + step))) for step in BETWEEN]
        between = np.exp(np.interp(places, np.arange(len(BETAS)), np.log(BETAS)))
        return [self._recipe({"beta": float(f"{beta:.3g}")}) for beta in between]

    def _recipe(self, parameters: Mapping[str, Any]) -> Recipe:
        return Recipe(resolve(self.loss, dict(parameters)), self.labels, self.part)


SHAPES: tuple[dict[str, float], ...] = (
    {"c_max": 2.0, "c_min": 0.5, "tau": 2.0},
    {"c_max": 4.0, "c_min": 0.25, "tau": 2.0},
    {"c_max": 4.0, "c_min": 0.25, "tau": 7.0},
)
"""Shapes of MADPO's weight other than the paper's c_max 2, c_min 1/2, tau 6.9."""


def _values(name: str, *values: float) -> tuple[dict[str, float], ...]:
    return tuple({name: value} for value in values)


METHODS: dict[str, Method] = {
    "dpo": Method("dpo"),
    "ipo": Method("ipo"),
    "beta_dpo": Method("beta_dpo", _values("alpha", 0.1, 0.3, 1.0)),
    "odpo": Method("odpo", _values("alpha", 0.25, 0.5, 2.0)),
    "mmpo": Method("mmpo", _values("gamma", 0.25, 0.5, 2.0)),
    "rpo_sq": Method("rpo_sq", _values("eta", 0.25, 0.5, 2.0)),
    "madpo, published": Method("madpo"),
    "madpo, tuned": Method("madpo", SHAPES),
    "madpo, amplify only": Method("madpo", SHAPES, part="amplify"),
    "madpo, dampen only": Method("madpo", SHAPES, part="dampen"),
    "soft_madpo": Method("soft_madpo", SHAPES),
    "trust": Method("trust", _values("trust", 0.0, 0.25, 0.75)),
    "dpo, redrawn": Method("dpo", labels="redrawn"),
    "dpo, relabelled": Method("dpo", labels="relabelled"),
}
"""``madpo, published`` keeps the paper's c_max, c_min, lambda and tau and chooses beta alone."""
UNTUNED: dict[str, Recipe] = {
    "dpo": Recipe(resolve("dpo", {})),
    "ipo": Recipe(resolve("ipo", {})),
    "beta_dpo": Recipe(resolve("beta_dpo", {})),
    "madpo": Recipe(resolve("madpo", {})),
    "madpo, c 4": Recipe(resolve("madpo", {"c_max": 4.0, "c_min": 0.25, "tau": 7.0})),
    "soft_madpo": Recipe(resolve("soft_madpo", {})),
    "dpo, relabelled": Recipe(resolve("dpo", {}), "relabelled"),
}
"""The paper's protocol: one beta (0.1) for all, judged where training ends, whatever the KL."""
