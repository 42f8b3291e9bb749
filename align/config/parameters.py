"""Checks of the parameters that YAML gives to a named function: unknown, of the wrong type, out of range."""

import math
from collections.abc import Mapping
from typing import Any

from align.config import nearest

Range = tuple[float, float]
"""Open interval."""
ANY: Range = (-math.inf, math.inf)
POSITIVE: Range = (0.0, math.inf)


def parameter_problems(
    owner: str, given: Mapping[str, Any], defaults: Mapping[str, float | bool], ranges: Mapping[str, Range]
) -> list[str]:
    """Every problem of the ``given`` parameters, one line each; empty if there are none.

    Args:
        owner: name of the function, for the messages.
        given: name -> value.
        defaults: every known name -> its default; a value must have the type of the default.
        ranges: name -> open interval of a number; a name without an entry may have any value.
    """
    problems = []
    for key, value in given.items():
        if key not in defaults:
            problems.append(f"{key}: not a parameter of {owner}{nearest(key, list(defaults))}")
        elif isinstance(defaults[key], bool) != isinstance(value, bool) or not isinstance(value, int | float):
            expected = "true or false" if isinstance(defaults[key], bool) else "a number"
            problems.append(f"{key}: found {value!r}, expected {expected}")
        elif not isinstance(value, bool) and key in ranges:
            low, high = ranges[key]
            if not low < value < high:
                problems.append(f"{key}: found {value}, expected a number above {low:g} and below {high:g}")
    return problems
