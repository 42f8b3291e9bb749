"""Prompts that some policy cannot complete, left out of an evaluation for all of its policies."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.errors import DataError
from align.io.console import log

NAMED = 20
"""Prompts that are named."""
SHOWN = 80
"""Characters of a prompt that name it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The prompts of an evaluation that every policy completed."""

    rows: list[int]
    """Their numbers, in order."""
    left_out: dict[str, Any]
    """For a report: ``count`` of ``of`` prompts that are left out, ``by_policy`` the policies that could not complete
    some, with the number of them, and ``prompts``, the first ones as ``<number>: <text>``. Empty if none is."""


def completed_by_all(prompts: Sequence[Any], completed: Mapping[str, Sequence[bool]]) -> Kept:
    """The prompts that all policies completed; the others are logged, so that all are measured on the same prompts.

    Args:
        prompts: N prompts, text or messages.
        completed: policy -> whether it completed each prompt, N values.

    Raises:
        DataError: there is no prompt that every policy completed.
    """
    rows = [k for k in range(len(prompts)) if all(of_policy[k] for of_policy in completed.values())]
    if len(rows) == len(prompts):
        return Kept(rows, {})
    lacking = {name: sum(not done for done in of_policy) for name, of_policy in completed.items()}
    by_policy = {name: count for name, count in lacking.items() if count}
    counts = ", ".join(f"{name} {count}" for name, count in by_policy.items())
    if not rows:
        raise DataError(
            f"none of {len(prompts)} prompts was completed by every policy (not completed: {counts})",
            code="prompt-refused",
            hint="see the messages above; shorten the prompts",
        )
    missing = sorted(set(range(len(prompts))) - set(rows))
    named = [f"{k}: {_name(prompts[k])}" for k in missing[:NAMED]]
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    log.warning("%d of %d prompts are left out for every policy, since some could not complete them (%s): %s%s",
                len(missing), len(prompts), counts, "; ".join(named), more)  # fmt: skip
    return Kept(rows, {"count": len(missing), "of": len(prompts), "by_policy": by_policy, "prompts": named})


def _name(prompt: Any) -> str:
    """The beginning of a prompt, on one line."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return " ".join(text[: 2 * SHOWN].split())[:SHOWN]
