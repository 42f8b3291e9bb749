"""How hard each pair pulls under an objective: |d loss / d z| as a function of its margin z (general pair weighting).

Every loss of two rewards acts on the rewards by this number alone (Wang et al., arXiv 1904.06627), so two objectives
that weigh all margins alike are the same objective.
"""

import numpy as np
import torch

from reward_models.registry import BoundObjective


def gradient_weights(objective: BoundObjective, gaps: np.ndarray, *, teacher: float = 1.0) -> np.ndarray:
    """|d loss / d z| [N] of pairs with margins [N], each alone in its batch.

    A pair alone is a bag of its own whose vote share is 1, and is compared with its own rejected response only.

    Args:
        objective: any of the registry.
        gaps: z.
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


def share_on_misranked(weights: np.ndarray, gaps: np.ndarray) -> float:
    """Share of the weights [N] that lies on pairs ranked against their label, z < 0."""
    total = float(weights.sum())
    return float(weights[gaps < 0].sum()) / total if total > 0 else 0.0
