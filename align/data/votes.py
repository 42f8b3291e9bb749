"""The votes of raters in a pair table: soft labels, and pairs whose chosen response is not the preferred one."""

import numpy as np
from datasets import Dataset

from align.config.columns import VOTES
from align.errors import DataError, listed
from align.io.console import log


def refuse_without_majority(pairs: Dataset, why: str, hint: str) -> None:
    """Refuse pairs of which not most raters preferred the chosen response, where it is trained as the better one.

    Args:
        pairs: pair table; without the columns ``VOTES``, or without votes in a row, nothing is known and refused.
        why: what treats ``chosen`` as the better response, for the message.
        hint: what reads votes.

    Raises:
        DataError: names the pairs (the first 20 and a count).
    """
    if not {VOTES[0], VOTES[1]} <= set(pairs.column_names):
        return
    chosen, rejected = (np.asarray(pairs[name], dtype=np.float64) for name in VOTES[:2])
    wrong = np.flatnonzero(chosen <= rejected)
    if not len(wrong):
        return
    ids = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
    found = [f"pair {ids[int(k)]}: {chosen[k]:g} votes for chosen, {rejected[k]:g} for rejected" for k in wrong]
    raise DataError(
        f"votes_chosen: {len(wrong)} of {len(pairs)} pairs have no majority for chosen, and {why}:\n{listed(found)}",
        code="votes",
        hint=f"use {hint}, or leave these pairs out",
    )


def label_shares(pairs: Dataset, reader: str) -> np.ndarray:
    """Share of the votes for the chosen response of each pair, float64 [N], in which a tie is half a vote.

    Args:
        pairs: pair table with the columns ``VOTES``, or ``vote_share`` in place of them.
        reader: setting that reads them, for messages.

    Raises:
        DataError: the columns are missing, or a pair has no votes or a share outside [0, 1].
    """
    columns = set(pairs.column_names)
    if set(VOTES) <= columns:
        counts = np.array([np.asarray(pairs[name], dtype=np.float64) for name in VOTES])
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (counts[0] + counts[2] / 2) / counts.sum(axis=0)
        wrong = np.flatnonzero(~np.isfinite(shares) | (counts < 0).any(axis=0))
    elif "vote_share" in columns:
        shares = np.asarray(pairs["vote_share"], dtype=np.float64)
        wrong = np.flatnonzero(~((shares >= 0) & (shares <= 1)))
    else:
        raise DataError(
            f"{', '.join(VOTES)}: found none of these columns, nor vote_share, expected them for `{reader}`",
            code="votes",
            hint="make pairs with votes: `align pairs from TABLE --view votes`",
        )
    if len(wrong):
        first = int(wrong[0])
        name = pairs["id"][first] if "id" in columns else first
        raise DataError(
            f"pair {name}: found no votes, or a share outside [0, 1], in {len(wrong)} of {len(pairs)} pairs, expected "
            f"votes for each, for `{reader}`",
            code="votes",
            hint="leave these pairs out",
        )
    return shares


def with_majority(pairs: Dataset, what: str) -> Dataset:
    """The pairs whose chosen response is the better one; logs how many others are left out.

    Args:
        pairs: pair table; all of it without the columns ``VOTES``.
        what: what is computed, for the message.

    Raises:
        DataError: none is left.
    """
    if not {VOTES[0], VOTES[1]} <= set(pairs.column_names):
        return pairs
    chosen, rejected = (np.asarray(pairs[name], dtype=np.float64) for name in VOTES[:2])
    kept = np.flatnonzero(~(chosen <= rejected))
    if len(kept) < len(pairs):
        log.info("%s: %d of %d pairs are left out, because no majority prefers their chosen response", what,
                 len(pairs) - len(kept), len(pairs))  # fmt: skip
    if not len(kept):
        raise DataError(
            f"{what}: found no majority for chosen in any of {len(pairs)} pairs, expected it in some",
            code="votes",
            hint="give pairs whose raters agree more",
        )
    return pairs if len(kept) == len(pairs) else pairs.select(kept)
