"""Out-of-distribution score: Mahalanobis distance of a pair's features from the reward model's training pairs.

It follows Lee et al. (arXiv 1807.03888): one mean per class, one covariance for all, distance to the nearest mean. The
classes are the chosen and the rejected responses of the training pairs. The covariance is shrunk towards a multiple of
the identity by Ledoit and Wolf's optimal amount (2004), so it can be inverted with fewer pairs than dimensions.
"""

from dataclasses import dataclass

import numpy as np

from align.errors import DataError


@dataclass(frozen=True, slots=True)
class Mahalanobis:
    """Class means, and the whitening matrix of the shared covariance."""

    means: np.ndarray
    """[C, D]."""
    whitening: np.ndarray
    """[D, D], W with W W^T the inverse of the covariance."""

    @classmethod
    def fit(cls, features: np.ndarray, classes: np.ndarray) -> "Mahalanobis":
        """Fit to features [N, D] and the class [N] of each, 0 to C - 1.

        Raises:
            DataError: there are fewer than two rows, or all have the same features.
        """
        if len(features) < 2:
            raise DataError(f"found {len(features)} texts to fit distances to, expected 2 or more", code="filter-empty")
        means = np.stack([features[classes == k].mean(axis=0) for k in range(int(classes.max()) + 1)])
        covariance = ledoit_wolf(features - means[classes])
        values, vectors = np.linalg.eigh(covariance)
        if values[-1] <= 0:
            raise DataError(
                "found the same features for all texts to fit distances to, expected different ones",
                code="filter-empty",
            )
        floor = values[-1] * 1e-10
        return cls(means, vectors / np.sqrt(np.maximum(values, floor)))

    def squared(self, features: np.ndarray) -> np.ndarray:
        """Squared distance [N] of features [N, D] to the nearest class mean."""
        white, means = features @ self.whitening, self.means @ self.whitening
        return np.min([((white - mean) ** 2).sum(axis=1) for mean in means], axis=0)


def ledoit_wolf(centered: np.ndarray) -> np.ndarray:
    """Covariance [D, D] of centered rows [N, D], shrunk towards mu I by Ledoit and Wolf's optimal shrinkage."""
    count, size = centered.shape
    covariance = centered.T @ centered / count
    mu = np.trace(covariance) / size
    spread = ((covariance - mu * np.eye(size)) ** 2).sum()
    squares = centered**2
    noise = ((squares.T @ squares) / count - covariance**2).sum() / count
    shrinkage = 0.0 if spread == 0 else min(noise / spread, 1.0)
    return (1 - shrinkage) * covariance + shrinkage * mu * np.eye(size)
