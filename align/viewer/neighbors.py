"""Pairs with nearly the same prompt: rows that share its rarest words, ordered by the share of words in common."""

from collections import Counter
from typing import Any

import numpy as np

from align.data.text import WORD
from align.viewer.texts import Texts

WORDS = 8
"""Rarest words of a prompt that candidates are found by."""
SAMPLE = 2_000
"""Rows that show how rare a word is."""
CANDIDATES, SHOWN = 200, 10
WHAT = (
    f"share of the different words that two prompts have in common (Jaccard), among the {CANDIDATES} prompts that "
    f"share most of the {WORDS} rarest words"
)


def word_set(text: str) -> set[str]:
    """Different words of a text, in lower case."""
    return {word.lower() for word in WORD.findall(text)}


def jaccard(first: set[str], second: set[str]) -> float:
    """Share of the words of both that are in both; 0 if there are none."""
    together = first | second
    return len(first & second) / len(together) if together else 0.0


def neighbors(texts: Texts, row: int) -> dict[str, Any]:
    """Rows whose prompts are nearest to that of ``row``, the nearest first, without those whose prompt is equal.

    Equal prompts are copies, which ``Texts.copies`` finds.
    """
    if not texts.ready:
        return {"neighbors": [], "what": WHAT, "why": "they are found once the text cache is built"}
    with texts.cursor() as cursor:
        found = cursor.execute("select prompt from texts where rowid = ?", [row]).fetchone()
        assert found is not None
        own = word_set(found[0])
        if not own:
            return {"neighbors": [], "what": WHAT, "why": "the prompt has no words"}
        chosen = _rarest(found[0], _frequencies(texts, cursor))
        parts = " + ".join("contains(prompt, ?)::integer" for _ in chosen)
        rows = cursor.execute(
            f"select rowid, prompt from (select rowid, prompt, {parts} as shared from texts where rowid <> ? and "
            f"prompt <> ?) where shared > 0 order by shared desc, rowid limit {CANDIDATES}",
            [*chosen, row, found[0]],
        ).fetchall()
    scored = sorted(((jaccard(own, word_set(text)), -number) for number, text in rows), reverse=True)
    near = [{"row": -number, "similarity": score} for score, number in scored[:SHOWN] if score > 0]
    return {"neighbors": near, "what": WHAT, "why": "" if near else "no other prompt shares a rare word"}


def _frequencies(texts: Texts, cursor: Any) -> Counter[str]:
    """Number of rows of a fixed sample whose prompt has each word."""
    if texts.frequencies is None:
        counted: Counter[str] = Counter()
        for start in np.unique(np.linspace(0, max(0, texts.table.count - 1), SAMPLE // 100).astype(int)):
            block = cursor.execute(
                "select prompt from texts where rowid >= ? and rowid < ?", [int(start), int(start) + 100]
            ).fetchall()
            for (text,) in block:
                counted.update(word_set(text))
        texts.frequencies = counted
    return texts.frequencies


def _rarest(prompt: str, counted: Counter[str]) -> list[str]:
    """The rarest words of a prompt, as they are written there; those met at most once in the sample come last.

    A word that only this prompt has finds nothing.
    """
    written = {word.lower(): word for word in WORD.findall(prompt)}
    order = sorted(written, key=lambda word: (counted[word] < 2, counted[word], -len(word), word))
    return [written[word] for word in order[:WORDS]]
