"""Hard rules: a pair that breaks one is dropped with the rule's name, whatever its scores. Each can be switched off.

A rule takes the rows and returns {row number: what was found}. Of pairs that are the same the one with the smallest id
is kept, so the result does not depend on the order of the file.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from align.errors import EnvironmentProblem
from align.filtering.texts import ngrams, normal, plain, words

Row = dict[str, Any]
Rule = Callable[[Sequence[Row]], dict[int, str]]
SHINGLE, PERMUTATIONS, NEAR = 5, 128, 0.9
OVERLAP = 8
PII = {
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[a-zA-Z]{2,}"),
    "card number": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "phone number": re.compile(r"(?<!\d)(?:\+\d{1,3}[ -]?)?(?:\(\d{2,4}\)[ -]?|\d{3}[ -])\d{3}[ -]\d{3,4}(?!\d)"),
    "social security number": re.compile(r"\b\d{3}-\d{2}-\d{4}\b"),
}


def same_text(rows: Sequence[Row]) -> dict[int, str]:
    """Chosen and rejected are the same but for case and white space."""
    return {
        k: "chosen and rejected differ in case or white space only"
        for k, row in enumerate(rows)
        if normal(row["chosen"]) == normal(row["rejected"])
    }


def duplicate(rows: Sequence[Row]) -> dict[int, str]:
    """Prompt and responses are those of another pair."""
    first: dict[tuple[str, ...], str] = {}
    found = {}
    for k in _by_id(rows):
        same = first.setdefault(_content(rows[k]), str(rows[k]["id"]))
        if same != str(rows[k]["id"]):
            found[k] = f"same as {same}"
    return found


def contradiction(rows: Sequence[Row]) -> dict[int, str]:
    """Another pair says the opposite of the same two responses; both go."""
    places: dict[tuple[str, ...], int] = {}
    for k, row in enumerate(rows):
        places.setdefault(_content(row), k)
    found = {}
    for k, row in enumerate(rows):
        prompt, chosen, rejected = _content(row)
        other = places.get((prompt, rejected, chosen))
        if other is not None and other != k:
            found[k] = f"the opposite of {rows[other]['id']}"
    return found


def near_duplicate(rows: Sequence[Row], threshold: float = NEAR) -> dict[int, str]:
    """Shares most of its five-word runs with another pair (MinHash, Jaccard similarity of at least ``threshold``).

    Raises:
        EnvironmentProblem: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise EnvironmentProblem(
            "near-duplicate search needs datasketch",
            code="package-missing",
            hint="pip install 'margin-align[filter]', or --skip near_duplicate",
        ) from None
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    found: dict[int, str] = {}
    for k in _by_id(rows):
        tokens = words(rows[k]["prompt"]) + words(rows[k]["chosen"]) + words(rows[k]["rejected"])
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([" ".join(run).encode() for run in ngrams(tokens, min(SHINGLE, max(len(tokens), 1)))])
        alike = sorted(index.query(sketch))
        if alike:
            found[k] = f"nearly the same as {alike[0]}"
        else:
            index.insert(str(rows[k]["id"]), sketch)
    return found


def length(rows: Sequence[Row], shortest: int = 1, longest: int = 2048) -> dict[int, str]:
    """A response has fewer than ``shortest`` or more than ``longest`` words."""
    found = {}
    for k, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            count = len(words(row[side]))
            if not shortest <= count <= longest:
                found[k] = f"{side} has {count} words, allowed are {shortest} to {longest}"
    return found


def pii(rows: Sequence[Row]) -> dict[int, str]:
    """A string that looks like personal data."""
    found = {}
    for k, row in enumerate(rows):
        text = "\n".join(plain(row[part]) for part in ("prompt", "chosen", "rejected"))
        seen = [name for name, pattern in PII.items() if pattern.search(text)]
        if seen:
            found[k] = f"looks like it holds: {', '.join(seen)}"
    return found


def contamination(rows: Sequence[Row], held_out: Sequence[str] = ()) -> dict[int, str]:
    """Shares a run of eight words with a text of an evaluation set."""
    runs: set[tuple[str, ...]] = set()
    for text in held_out:
        runs |= ngrams(words(text), OVERLAP)
    found = {}
    for k, row in enumerate(rows):
        for part in ("prompt", "chosen", "rejected"):
            shared = ngrams(words(row[part]), OVERLAP) & runs
            if shared:
                found[k] = f"{part} shares with the evaluation set: {' '.join(min(shared))}"
    return found


RULES: dict[str, Rule] = {
    "same_text": same_text,
    "duplicate": duplicate,
    "contradiction": contradiction,
    "near_duplicate": near_duplicate,
    "length": length,
    "pii": pii,
}


def apply_rules(
    rows: Sequence[Row], *, skip: Sequence[str] = (), held_out: Sequence[str] = (), longest: int = 2048
) -> dict[int, tuple[str, str]]:
    """{row number: (rule, what was found)} of the pairs to drop, by the first rule that each breaks.

    Args:
        rows: pair table as dictionaries.
        skip: names of rules to leave out.
        held_out: texts of an evaluation set; with any, ``contamination`` is a rule too.
        longest: words of a response.
    """
    rules = {name: rule for name, rule in RULES.items() if name not in skip}
    if "length" in rules:
        rules["length"] = partial(length, longest=longest)
    if held_out and "contamination" not in skip:
        rules["contamination"] = partial(contamination, held_out=held_out)
    dropped: dict[int, tuple[str, str]] = {}
    for name, rule in rules.items():
        for k, found in rule(rows).items():
            dropped.setdefault(k, (name, found))
    return dropped


def length_bias(rows: Sequence[Row]) -> float:
    """Share of pairs whose chosen response has more words, among those that differ; 0.5 where length says nothing."""
    longer = [len(words(row["chosen"])) - len(words(row["rejected"])) for row in rows]
    decided = [difference > 0 for difference in longer if difference != 0]
    return float(np.mean(decided)) if decided else 0.5


def _content(row: Row) -> tuple[str, str, str]:
    return normal(row["prompt"]), normal(row["chosen"]), normal(row["rejected"])


def _by_id(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda k: str(rows[k]["id"]))
