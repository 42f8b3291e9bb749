"""Win rates of several policies against each other, from the preferences of one judge. Pure."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from align.stats import share_interval


def win_table(preferences: Mapping[tuple[str, str], np.ndarray]) -> list[dict[str, Any]]:
    """Each policy's win rate against each other one and against all of them together, best first.

    The rate against all is, for each prompt, the mean preference over the other policies; its interval is over prompts,
    so that a prompt counts once however many policies there are. A rate depends on who else is in the table.

    Args:
        preferences: (a, b) -> preference for a over b on each of N prompts, [N], in [0, 1], a tie 0.5; every two of
            the K policies once, in one of the two orders.

    Returns:
        A row per policy: ``policy``, ``rate`` against all others, ``against`` (other policy -> rate). Rates are
        estimates with 95% intervals as JSON values.

    Raises:
        ValueError: two policies were not compared.
    """
    names = list(dict.fromkeys(name for pair in preferences for name in pair))
    rows = []
    for one in names:
        outcomes = {}
        for other in names:
            if other == one:
                continue
            if (one, other) in preferences:
                outcomes[other] = np.asarray(preferences[one, other], dtype=np.float64)
            elif (other, one) in preferences:
                outcomes[other] = 1 - np.asarray(preferences[other, one], dtype=np.float64)
            else:
                raise ValueError(f"{one} and {other} were not compared")
        rows.append(
            {
                "policy": one,
                "rate": share_interval(np.mean(list(outcomes.values()), axis=0)).to_dict(),
                "against": {other: share_interval(values).to_dict() for other, values in outcomes.items()},
            }
        )
    return sorted(rows, key=lambda row: -row["rate"]["value"])
