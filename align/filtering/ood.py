"""How far a pair lies from what the reward model was trained on: Mahalanobis distance of its features.

After Lee et al. (arXiv 1807.03888): one mean per class, one covariance for all, distance to the nearest mean. The
classes are the chosen and the rejected responses of the training pairs. The covariance is shrunk towards a multiple of
the identity by Ledoit and Wolf's optimal amount (2004), so it can be inverted with fewer pairs than dimensions.
"""

from dataclasses import dataclass

import numpy as np

from align.errors import DataError


@dataclass(frozen=True, slots=True)
class Mahalanobis:
    """Class means and the shared covariance's whitening."""

    means: np.ndarray
    """[C, D]."""
    whitening: np.ndarray
    """[D, D], W with W W^T the inverse of the covariance."""

    @classmethod
    def fit(cls, features: np.ndarray, classes: np.ndarray) -> "Mahalanobis":
        """From features [N, D] and the class [N] of each, 0 to C - 1.

        Raises:
            DataError: fewer than two rows, or all of them the same.
        """
        if len(features) < 2:
            raise DataError(f"{len(features)} texts to fit distances on, at least 2 are needed", code="filter-empty")
        means = np.stack([features[classes == k].mean(axis=0) for k in range(int(classes.max()) + 1)])
        covariance = ledoit_wolf(features - means[classes])
        values, vectors = np.linalg.eigh(covariance)
        if values[-1] <= 0:
            raise DataError("the texts to fit distances on all have the same features", code="filter-empty")
        floor = values[-1] * 1e-10
        return cls(means, vectors / np.sqrt(np.maximum(values, floor)))

    def squared(self, features: np.ndarray) -> np.ndarray:
        """Squared distance [N] of features [N, D] to the nearest class mean."""
        white, means = features @ self.whitening, self.means @ self.whitening
        return np.min([((white - mean) ** 2).sum(axis=1) for mean in means], axis=0)


def ledoit_wolf(centred: np.ndarray) -> np.ndarray:
    """Covariance [D, D] of centred rows [N, D], shrunk towards mu I by Ledoit and Wolf's estimate of the best share."""
    count, size = centred.shape
    covariance = centred.T @ centred / count
    mu = np.trace(covariance) / size
    spread = ((covariance - mu * np.eye(size)) ** 2).sum()
    squares = centred**2
    noise = ((squares.T @ squares) / count - covariance**2).sum() / count
    share = 0.0 if spread == 0 else min(noise / spread, 1.0)
    return (1 - share) * covariance + share * mu * np.eye(size)
