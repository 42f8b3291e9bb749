"""``with_checked_pairs``: pairs that a person has checked among the training pairs, with a share of the weight."""

from typing import Any

from datasets import Dataset

from align.data.checked_pairs import add_checked, valid_checked, without_checked
from align.data.in_memory import checked_table
from align.errors import ConfigError, python_words


def with_checked_pairs(pairs: Any, checked: Any, *, share: float | None = None) -> Dataset:
    """Put checked pairs among the others; ``PreferenceTrainer`` and ``RewardTrainer`` read the weights of the result.

    A checked pair replaces the same pair of the others, whichever label it has there; the log tells how many do.

    Args:
        pairs: training pairs, what ``pairs_from_dataset`` takes.
        checked: pairs whose label a person vouches for, likewise; without a column ``weight``.
        share: of the total weight that the checked pairs have together, in (0, 1). None: 0.1 for 50 of them, 0.25 for
            200 and more, in proportion between and below, never less than their share of the pairs.

    Returns:
        The other pairs and then the checked ones, with the columns ``weight`` and ``checked``.

    Raises:
        ConfigError: a share outside (0, 1).
        DataError: the tables cannot be used, do not go together, or one pair is checked with both labels.
    """
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
        raise ConfigError(f"share: found {share!r}, expected a number between 0 and 1", code="config-option")
    with python_words():
        table, own = checked_table(pairs, "pairs"), valid_checked(checked_table(checked, "checked"), "checked")
        return add_checked(without_checked(table, own, "checked").pairs, own, share, "checked")
