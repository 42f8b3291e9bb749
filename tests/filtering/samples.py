"""Pairs and vectors that the tests of the filter share."""

from typing import Any

import numpy as np


def pair(prompt: str, chosen: str, rejected: str, name: str = "x") -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def unit(count: int, size: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int) -> np.ndarray:
    centers = unit(60, 32)
    noise = np.random.default_rng(1).normal(scale=0.08, size=(count, 32))
    vectors = centers[np.arange(count) % 60] + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
