"""The gold reward of the arena, and policies judged by it at equal KL.

Shapes: P prompts, R = 6 responses, D = 20 features, M policies. The policy is softmax(x theta) over the responses of a
prompt, the reference is uniform.
"""

from collections.abc import Sequence

import numpy as np

SIZE, RESPONSES, GOLD_SPREAD = 20, 6, 2.0
"""D, R, standard deviation of the gold margin of two responses."""
PROMPTS = 500
STEPS, CLOSE = 8, 1e-5
"""Maximum of Newton steps to a KL, relative error at which they stop."""


def draw_gold(rng: np.random.Generator) -> np.ndarray:
    """Direction [D] of the gold reward x gold; margins have standard deviation ``GOLD_SPREAD``."""
    gold: np.ndarray = rng.normal(size=SIZE)
    gold *= GOLD_SPREAD / np.sqrt(2) / np.linalg.norm(gold)
    return gold


def gold_reward(theta: np.ndarray, gold: np.ndarray, rng: np.random.Generator, kls: Sequence[float]) -> np.ndarray:
    """Exact gold reward [KLs, M] of the directions theta [D, M], each scaled to every KL."""
    x, reward = draw_prompts(gold, rng)
    u = x @ (theta / np.maximum(np.linalg.norm(theta, axis=0), 1e-12))
    u -= u.mean(axis=0)
    found = []
    for kl in kls:
        scale = np.full(theta.shape[1], np.sqrt(2 * kl))
        for _ in range(STEPS):
            p, at = softmax(scale * u)
            if (np.abs(at - kl) < CLOSE * kl).all():
                break
            first = p * u
            spread = (first * u).sum(axis=0) - np.square(first.sum(axis=0))
            scale -= (at - kl) / np.maximum(scale * spread.mean(axis=0), 1e-9)
            scale = np.maximum(scale, 1e-6)
        found.append(gained(softmax(scale * u)[0], reward))
    return np.array(found)


def reward_and_kl(theta: np.ndarray, gold: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Exact gold reward [M] and KL [M] of the policies theta [D, M] as they are."""
    x, reward = draw_prompts(gold, rng)
    p, kl = softmax(x @ theta)
    return gained(p, reward), kl


def draw_prompts(gold: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features [R, P, D] and gold rewards [R, P] of the responses to new prompts."""
    x = np.ascontiguousarray(rng.normal(size=(PROMPTS, RESPONSES, SIZE)).swapaxes(0, 1))
    return x, x @ gold


def gained(p: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Mean reward [M] under p [R, P, M], minus that of the reference."""
    return np.einsum("rpm,rp->m", p, reward) / reward.shape[1] - reward.mean()


def softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [R, P, M] and mean KL [M] to the uniform reference."""
    shifted = logits - logits.max(axis=0)
    p = np.exp(shifted)
    total = p.sum(axis=0)
    p /= total
    kl = (p * shifted).sum(axis=0) - np.log(total) + np.log(RESPONSES)
    return p, kl.mean(axis=0)
