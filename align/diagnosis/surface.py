"""Features of a response that say nothing of what it means: length, format, first words, refusals."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

Features = Callable[[str], list[float]]
REFUSALS = re.compile(
    r"\b(?:i(?:'|\u2019)?m sorry|i am sorry|i apologi[sz]e|i can(?:'|\u2019)?t|i cannot|i can not"
    r"|i(?:'|\u2019)?m (?:unable|not able)"
    r"|as an ai|as a language model|i won(?:'|\u2019)?t)\b",
    re.IGNORECASE,
)
MARKS = {
    "bullets": re.compile(r"^\s*[-*+\u2022]\s", re.MULTILINE),
    "numbers": re.compile(r"^\s*\d+[.)]\s", re.MULTILINE),
    "headings": re.compile(r"^\s*#{1,6}\s", re.MULTILINE),
    "code": re.compile(r"```|^ {4}\S", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*]+\*\*"),
    "tables": re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE),
    "links": re.compile(r"https?://|\]\("),
    "lines": re.compile(r"\n"),
}
"""What is counted for the shortcut ``format``."""
FIRST_WORDS = 40
"""Most common first words, and first pairs of words, that are told apart."""
END = re.compile(r"[.!?\u3002\uff01\uff1f)\"'`]\s*$")


def length(text: str) -> list[float]:
    """Characters and words, each also on a logarithmic scale."""
    characters, words = len(text), len(text.split())
    return [characters, words, float(np.log1p(characters)), float(np.log1p(words))]


def text_format(text: str) -> list[float]:
    """Whether and how often each of ``MARKS`` occurs (logarithm of 1 + count)."""
    counts = [len(mark.findall(text)) for mark in MARKS.values()]
    return [*(float(count > 0) for count in counts), *(float(np.log1p(count)) for count in counts)]


def ending(text: str) -> list[float]:
    """Whether the text ends like a sentence, in white space, or without any of these."""
    return [float(END.search(text) is not None), float(text != text.rstrip())]


def beginning(text: str) -> list[float]:
    """Whether the text begins with white space, a capital letter, a digit."""
    start = text.lstrip()[:1]
    return [float(text[:1].isspace()), float(start.isupper()), float(start.isdigit())]


def refusal(text: str) -> list[float]:
    """Whether the text refuses or apologizes in a common phrase."""
    return [float(REFUSALS.search(text) is not None)]


SHORTCUTS: dict[str, Features] = {
    "length": length, "format": text_format, "beginning": beginning, "ending": ending, "refusals": refusal,
}  # fmt: skip
"""Name of a shortcut -> features of one response; ``first words`` and columns are added by the caller."""


def indicators(chosen: Sequence[str], rejected: Sequence[str], most: int = FIRST_WORDS) -> np.ndarray:
    """Difference of indicators of the most common names, chosen minus rejected, [N, most or fewer].

    Args:
        chosen: N names.
        rejected: N names.
        most: names that are told apart.
    """
    counts = Counter([*chosen, *rejected])
    known = {name: k for k, (name, times) in enumerate(counts.most_common(most)) if times > 1}
    found = np.zeros((len(chosen), max(len(known), 1)))
    for sign, names in ((1.0, chosen), (-1.0, rejected)):
        for row, name in enumerate(names):
            if name in known:
                found[row, known[name]] += sign
    return found


def first_words(text: str, count: int) -> str:
    """The first words in lower case."""
    return " ".join(text.lower().split()[:count])
