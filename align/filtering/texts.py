"""A pair's parts as plain text, whatever its format."""

import re
from typing import Any

WORD = re.compile(r"\w+", re.UNICODE)


def plain(part: Any) -> str:
    """Text of a prompt or response: a string, or a list of messages."""
    return part if isinstance(part, str) else "\n".join(str(turn["content"]) for turn in part)


def normal(part: Any) -> str:
    """Lower case, runs of white space as one space."""
    return " ".join(plain(part).lower().split())


def words(part: Any) -> list[str]:
    """Words in lower case, punctuation left out."""
    return WORD.findall(plain(part).lower())


def ngrams(tokens: list[str], size: int) -> set[tuple[str, ...]]:
    """All runs of ``size`` tokens."""
    return {tuple(tokens[k : k + size]) for k in range(len(tokens) - size + 1)}
