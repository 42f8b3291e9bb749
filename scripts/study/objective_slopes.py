"""Plot |d loss / d z| of every reward-model objective against the margin z.

    python -m scripts.study.objective_slopes --output docs/objectives.svg

Prints, for margins drawn from a normal distribution around 1 with standard deviation 2, the share of the total gradient
weight that goes to misranked pairs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from align.config import ObjectiveSection
from reward_models.registry import BoundObjective, resolve_objective
from scripts.figures import pyplot, save

GRID = np.linspace(-6, 6, 241)
MEAN, SPREAD, DRAWS = 1.0, 2.0, 2000
PANELS: dict[str, dict[str, tuple[str, dict[str, float | bool]]]] = {
    "comp_sum": {
        "bradley_terry (tau 1)": ("bradley_terry", {}),
        "tau 0": ("comp_sum", {"tau": 0.0}),
        "tau 0.5": ("comp_sum", {"tau": 0.5}),
        "tau 1.3": ("comp_sum", {"tau": 1.3}),
        "tau 1.7": ("comp_sum", {"tau": 1.7}),
        "tau 2": ("comp_sum", {"tau": 2.0}),
    },
    "margins and softness": {
        "bradley_terry": ("bradley_terry", {}),
        "bradley_terry_margin, margin 1": ("bradley_terry_margin", {}),
        "ldr_kl, lam 0.3": ("ldr_kl", {"lam": 0.3}),
        "ldr_kl, lam 3": ("ldr_kl", {"lam": 3.0}),
        "ldr_kl, adaptive": ("ldr_kl", {"adaptive": True}),
        "auc, temperature 0.5": ("auc", {"temperature": 0.5}),
    },
    "targets": {
        "bradley_terry": ("bradley_terry", {}),
        "margin_mse, teacher's margin 1": ("margin_mse", {}),
        "aggregated, share 1": ("aggregated", {}),
    },
}
HIGHEST = 2.0


def main() -> None:
    """Draw the figure, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/objectives.svg"))
    arguments = parser.parse_args()
    plt = pyplot("objectives")
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.8), sharey=True)
    gaps = np.random.default_rng(0).normal(MEAN, SPREAD, DRAWS)
    for axis, (title, lines) in zip(axes, PANELS.items(), strict=True):
        for label, (name, parameters) in lines.items():
            objective = resolve_objective(ObjectiveSection(name=name, parameters=parameters))
            axis.plot(GRID, margin_slopes(objective, GRID), label=label)
            share = share_on_misranked(margin_slopes(objective, gaps), gaps)
            print(f"{share:6.1%} of the gradient weight on misranked pairs: {label} ({title})")
        axis.set(title=title, xlabel="margin z", ylim=(0, HIGHEST))
        axis.axvline(0, color="#6e7781", lw=0.6)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("|d loss / d z|")
    figure.tight_layout()
    save(figure, arguments.output)


def margin_slopes(objective: BoundObjective, gaps: np.ndarray, *, teacher: float = 1.0) -> np.ndarray:
    """|d loss / d z| [N] of pairs with margins z [N], each alone in its batch.

    A loss of two rewards acts on them by this number alone (Wang et al., arXiv 1904.06627). A pair that is alone is its
    own bag with the vote share 1, and is compared with its own rejected response only.

    Args:
        objective: any objective of the registry.
        gaps: margins z.
        teacher: the teacher's margin of every pair, where the objective reads one.
    """
    found = []
    for gap in gaps.tolist():
        chosen = torch.tensor([gap], dtype=torch.float64, requires_grad=True)
        columns = {
            "teacher_margin": torch.tensor([teacher], dtype=torch.float64),
            "vote_share": torch.ones(1, dtype=torch.float64),
            "bag": torch.zeros(1, dtype=torch.int64),
            "group": torch.zeros(1, dtype=torch.int64),
        }
        loss = objective(chosen, torch.zeros(1, dtype=torch.float64), columns)
        (slope,) = torch.autograd.grad(loss.sum(), chosen)
        found.append(abs(float(slope)))
    return np.array(found)


def share_on_misranked(slopes: np.ndarray, gaps: np.ndarray) -> float:
    """Share of the slopes [N] that belongs to pairs ranked against their label, z < 0."""
    total = float(slopes.sum())
    return float(slopes[gaps < 0].sum()) / total if total > 0 else 0.0


if __name__ == "__main__":
    main()
