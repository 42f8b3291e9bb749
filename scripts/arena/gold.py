"""The gold reward of the arena, and policies judged by it at equal KL.

Shapes: P prompts, R = 6 responses, D = 20 features, M policies. The policy is softmax(x theta) over the responses of a
prompt, the reference chooses between them evenly.
"""

from collections.abc import Sequence

import numpy as np

SIZE, RESPONSES, GOLD_SPREAD = 20, 6, 2.0
"""D, R, standard deviation of the gold margin of two responses."""
PROMPTS = 500
STEPS = 8


def draw_gold(rng: np.random.Generator) -> np.ndarray:
    """Direction [D] of the gold reward x gold; margins have standard deviation ``GOLD_SPREAD``."""
    gold: np.ndarray = rng.normal(size=SIZE)
    gold *= GOLD_SPREAD / np.sqrt(2) / np.linalg.norm(gold)
    return gold


def gold_reward(theta: np.ndarray, gold: np.ndarray, rng: np.random.Generator, kls: Sequence[float]) -> np.ndarray:
    """Exact gold reward [KLS, M] of the directions theta [D, M], each at the temperature with that KL."""
    x = rng.normal(size=(PROMPTS, RESPONSES, SIZE))
    reward = x @ gold
    u = x @ (theta / np.maximum(np.linalg.norm(theta, axis=0), 1e-12))
    u -= u.mean(axis=1, keepdims=True)
    found = []
    for kl in kls:
        scale = np.full(theta.shape[1], np.sqrt(2 * kl))
        for _ in range(STEPS):
            p, at = softmax(scale * u)
            spread = (p * np.square(u)).sum(axis=1) - np.square((p * u).sum(axis=1))
            scale -= (at - kl) / np.maximum(scale * spread.mean(axis=0), 1e-9)
            scale = np.maximum(scale, 1e-6)
        p, _ = softmax(scale * u)
        found.append((p * reward[..., None]).sum(axis=1).mean(axis=0) - reward.mean())
    return np.array(found)


def softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [P, R, M] and mean KL to the even reference [M]."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p, (p * np.log(np.maximum(p * RESPONSES, 1e-300))).sum(axis=1).mean(axis=0)
