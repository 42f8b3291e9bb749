"""The column ``weight`` of a pair table, as the training of a reward model reads it."""

import numpy as np
from datasets import Dataset

from align.config.columns import WEIGHT
from align.errors import DataError


def pair_weights(pairs: Dataset) -> np.ndarray | None:
    """Factor of each pair's loss, [N]; None if the table has no such column or every weight is 1.

    Raises:
        DataError: a pair has no weight, a negative one or one that is not finite, or all are 0.
    """
    if WEIGHT not in pairs.column_names:
        return None
    given = np.array([np.nan if value is None else value for value in pairs[WEIGHT]], dtype=np.float64)
    wrong = ~np.isfinite(given) | (given < 0)
    if wrong.any() or not given.any():
        row = int(wrong.argmax()) if wrong.any() else 0
        name = pairs["id"][row] if "id" in pairs.column_names else row
        raise DataError(
            f"weight: found {given[row]:g} in pair {name}{'' if wrong.any() else ' and all others'}, expected numbers "
            "from 0 up, some of them above 0",
            code="weights-column",
            hint="give every pair a weight, or leave the column out",
        )
    return None if (given == 1).all() else given
