"""The methods of the study and what each may choose from on validation seeds: as many candidates for every method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from align.loss_registry import resolve
from arena.training import Recipe

CANDIDATES = 12
BETAS = tuple(float(f"{beta:.3g}") for beta in np.geomspace(0.02, 2.0, CANDIDATES))
"""Where beta is all there is to choose."""
FOUR = BETAS[1::3]
"""Where three values of another parameter are tried as well."""
THREE = (BETAS[2], BETAS[5], BETAS[8])
"""Where four values, or shapes of MADPO's weight, are tried."""
SHAPES: tuple[dict[str, float], ...] = (
    {"c_max": 2.0, "c_min": 0.5, "tau": 2.0},
    {"c_max": 2.0, "c_min": 0.5, "tau": 6.9068},
    {"c_max": 4.0, "c_min": 0.25, "tau": 2.0},
    {"c_max": 4.0, "c_min": 0.25, "tau": 7.0},
)


def _grid(loss: str, betas: Sequence[float], rest: Sequence[Mapping[str, Any]]) -> list[Recipe]:
    return [Recipe(resolve(loss, {"beta": beta, **more})) for beta, more in product(betas, rest)]


NOTHING: tuple[dict[str, float], ...] = ({},)
DPO, TUNED = _grid("dpo", BETAS, NOTHING), _grid("madpo", THREE, SHAPES)
METHODS: dict[str, list[Recipe]] = {
    "dpo": DPO,
    "ipo": _grid("ipo", BETAS, NOTHING),
    "beta_dpo": _grid("beta_dpo", FOUR, [{"alpha": alpha} for alpha in (0.2, 0.6, 1.0)]),
    "odpo": _grid("odpo", FOUR, [{"alpha": alpha} for alpha in (0.25, 0.5, 1.0)]),
    "mmpo": _grid("mmpo", FOUR, [{"gamma": gamma} for gamma in (0.5, 1.0, 2.0)]),
    "rpo_sq": _grid("rpo_sq", FOUR, [{"eta": eta} for eta in (0.5, 1.0, 2.0)]),
    "madpo, published": _grid("madpo", BETAS, NOTHING),
    "madpo, tuned": TUNED,
    "madpo, amplify only": [replace(recipe, part="amplify") for recipe in TUNED],
    "madpo, dampen only": [replace(recipe, part="dampen") for recipe in TUNED],
    "soft_madpo": _grid("soft_madpo", THREE, SHAPES),
    "trust": _grid("trust", THREE, [{"trust": trust} for trust in (0.0, 0.25, 0.5, 0.75)]),
    "dpo, redrawn": [replace(recipe, labels="redrawn") for recipe in DPO],
    "dpo, relabelled": [replace(recipe, labels="relabelled") for recipe in DPO],
}
"""Name -> candidates. ``madpo, published`` keeps the paper's c_max, c_min, lambda and tau and sweeps beta alone."""
UNTUNED: dict[str, Recipe] = {
    "dpo": Recipe(resolve("dpo", {})),
    "ipo": Recipe(resolve("ipo", {})),
    "beta_dpo": Recipe(resolve("beta_dpo", {})),
    "madpo": Recipe(resolve("madpo", {})),
    "madpo, c 4": Recipe(resolve("madpo", {"c_max": 4.0, "c_min": 0.25, "tau": 7.0})),
    "soft_madpo": Recipe(resolve("soft_madpo", {})),
    "dpo, relabelled": Recipe(resolve("dpo", {}), "relabelled"),
}
"""The paper's way: one beta (0.1) for all, judged where training ends, whatever the KL."""
