"""Hard rules: a pair that breaks one is dropped with the rule's name, whatever its scores. Each can be switched off.

A rule looks at the pairs that no rule before it has dropped and returns {place: what was found}. Of pairs that are the
same the one with the smallest id is kept, so the result does not depend on the order of the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from align.config.columns import TEXT as PARTS
from align.data.text import cells, plain, texts_of
from align.filtering.equal_keys import among, one_key, repeated
from align.filtering.minhash import BANDS, near_duplicates
from align.filtering.text_survey import (
    OVERLAP,
    PERSONAL,
    Survey,
    language_code,
    language_number,
    overlap_hashes,
    shingles,
)
from align.filtering.word_hashes import Hashes, runs, tokenise, word_list

NEAR = 0.9
SAID, OPPOSITE = (0, 1, 2), (0, 2, 1)
"""Prompt, chosen and rejected as they are, and turned round."""
Found = dict[int, str]
"""Place of a pair that broke a rule -> what was found."""


@dataclass(frozen=True, slots=True)
class Table:
    """What the rules look at."""

    pairs: Dataset
    order: np.ndarray
    """[N] of ``place_type``: places of the pairs, smallest id first."""
    survey: Survey
    longest: int = 2048
    """Most words of a response."""
    language: str | None = None
    """ISO 639 code that both responses must be in; None: any."""
    held_out: Sequence[str] = ()
    """Texts of an evaluation set."""
    ood: np.ndarray | None = None
    """[N], see ``columns.distances``."""
    ood_limit: float = np.inf
    doubtful: np.ndarray | None = None
    """bool [N], see ``scores.doubtful``."""

    def by_id(self, alive: np.ndarray) -> np.ndarray:
        """Places still alive, smallest id first."""
        return self.order[alive[self.order]]

    def like(self, places: np.ndarray, others: np.ndarray, said: str) -> Found:
        """Of each place, what is said of it and the id of the pair that it is like."""
        ids = self.pairs.select_columns(["id"])[others]["id"] if len(others) else []
        return {int(place): f"{said} {name}" for place, name in zip(places, ids, strict=True)}


def place_type(count: int) -> type[np.signedinteger[Any]]:
    """The smaller type that holds the places of ``count`` pairs."""
    return np.int32 if count < 2**31 else np.int64


def by_id(pairs: Dataset) -> np.ndarray:
    """Places [N] of the pairs, smallest id first."""
    return pc.sort_indices(cells(pairs, "id")).to_numpy().astype(place_type(len(pairs)))


Rule = Callable[[Table, np.ndarray], Found]


def same_text(table: Table, alive: np.ndarray) -> Found:
    """Chosen and rejected are the same but for case and white space."""
    same = alive & (table.survey.content[:, 1] == table.survey.content[:, 2])
    return dict.fromkeys(_places(same), "chosen and rejected differ in case or white space only")


def contradiction(table: Table, alive: np.ndarray) -> Found:
    """Another pair says the opposite of the same two responses; both go."""
    said, opposite = (one_key(table.survey.content, columns) for columns in (SAID, OPPOSITE))
    order = table.by_id(alive & among(opposite, np.sort(said[alive])))
    said, opposite = said[order], opposite[order]
    sort = np.argsort(said, kind="stable")
    other = sort[np.minimum(np.searchsorted(said[sort], opposite), max(len(order) - 1, 0))]
    hit = np.flatnonzero((said[other] == opposite) & (other != np.arange(len(order))))
    return table.like(order[hit], order[other[hit]], "the opposite of")


def length(table: Table, alive: np.ndarray) -> Found:
    """A response has no word, or more than ``longest``."""
    found: Found = {}
    for side in (2, 1):
        count = table.survey.words[:, side]
        for k in _places(alive & ((count < 1) | (count > table.longest))):
            found[k] = f"{PARTS[side]} has {count[k]} words, allowed are 1 to {table.longest}"
    return found


def language(table: Table, alive: np.ndarray) -> Found:
    """A response is clearly in another language than the one asked for."""
    found: Found = {}
    if table.language is None:
        return found
    for side in (1, 0):
        code = table.survey.language[:, side]
        for k in _places(alive & (code != 0) & (code != language_number(table.language))):
            found[k] = f"{PARTS[side + 1]} reads as '{language_code(code[k])}', wanted is '{table.language}'"
    return found


def pii(table: Table, alive: np.ndarray) -> Found:
    """A string that looks like personal data."""
    found: Found = {}
    for k in _places(alive & (table.survey.personal > 0)):
        seen = [name for bit, name in enumerate(PERSONAL) if table.survey.personal[k] >> bit & 1]
        found[k] = f"looks like it holds: {', '.join(seen)}"
    return found


def contamination(table: Table, alive: np.ndarray) -> Found:
    """Shares a run of eight words with a text of an evaluation set."""
    places = _places(alive & (table.survey.overlap > 0))
    held_out = overlap_hashes(table.held_out)
    found: Found = {}
    for k in places:
        part = PARTS[int(table.survey.overlap[k]) - 1]
        found[k] = f"{part} shares with the evaluation set: {_shared(plain(table.pairs[k][part]), held_out)}"
    return found


def duplicate(table: Table, alive: np.ndarray) -> Found:
    """Prompt and responses are those of another pair."""
    said = one_key(table.survey.content, SAID)
    order = table.by_id(_repeated(said, alive))
    _, first, which = np.unique(said[order], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(order)))
    return table.like(order[later], order[first[which[later]]], "same as")


def near_duplicate(table: Table, alive: np.ndarray) -> Found:
    """Jaccard similarity of its five-word runs with those of another pair of at least ``NEAR``."""
    shared = np.zeros(len(alive), dtype=bool)
    for band in range(BANDS):
        shared |= _repeated(table.survey.bands[:, band], alive)
    order = table.by_id(shared)

    def shingles_of(rows: np.ndarray) -> Hashes:
        return shingles(texts_of(table.pairs, order[rows].tolist()))

    bands = (table.survey.bands[order, band] for band in range(BANDS))
    found = near_duplicates(bands, shingles_of, NEAR)
    later, earlier = (np.array(list(side), dtype=np.int64) for side in (found.keys(), found.values()))
    return table.like(order[later], order[earlier], "nearly the same as")


def out_of_distribution(table: Table, alive: np.ndarray) -> Found:
    """Farther from the reward model's training pairs than nearly all of those are from one another."""
    if table.ood is None:
        return {}
    return {
        k: f"distance {table.ood[k]:.1f} to the reward model's training pairs, limit {table.ood_limit:.1f}"
        for k in _places(alive & (table.ood > table.ood_limit))
    }


def label_noise(table: Table, alive: np.ndarray) -> Found:
    """The out-of-fold margin contradicts the label strongly."""
    if table.doubtful is None:
        return {}
    return dict.fromkeys(_places(alive & table.doubtful), "the margin contradicts the label strongly")


RULES: dict[str, Rule] = {
    "same_text": same_text,
    "contradiction": contradiction,
    "length": length,
    "language": language,
    "pii": pii,
    "contamination": contamination,
    "label_noise": label_noise,
    "out_of_distribution": out_of_distribution,
    "duplicate": duplicate,
    "near_duplicate": near_duplicate,
}


def apply_rules(table: Table, skip: Sequence[str] = ()) -> dict[int, tuple[str, str]]:
    """{place: (rule, what was found)} of the pairs to drop, by the first rule that each breaks.

    Args:
        table: the pairs and what is known of them.
        skip: names of rules to leave out.
    """
    alive = np.ones(len(table.order), dtype=bool)
    dropped: dict[int, tuple[str, str]] = {}
    for name, rule in RULES.items():
        if name in skip:
            continue
        found = rule(table, alive)
        dropped.update({k: (name, said) for k, said in found.items()})
        alive[list(found)] = False
    return dropped


def length_bias(words: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Share of pairs whose chosen response has more words, among those that differ; 0.5 where length says nothing.

    Args:
        words: [N, 3] of the survey.
        rows: the pairs to look at; all where absent.
    """
    longer = (words[:, 1] - words[:, 2])[slice(None) if rows is None else rows]
    decided = longer[longer != 0] > 0
    return float(decided.mean()) if len(decided) else 0.5


def _places(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def _repeated(keys: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """bool [N]: alive, and another that is alive has the same key."""
    found = np.zeros(len(alive), dtype=bool)
    found[alive] = repeated(keys[alive])
    return found


def _shared(text: str, held_out: np.ndarray) -> str:
    """The first run of a text that the evaluation set has too, in words."""
    strings = pa.array([text], type=pa.string())
    hit = np.isin(runs(tokenise(strings), OVERLAP, whole=False).values, held_out)
    return " ".join(word_list(text)[int(hit.argmax()) :][:OVERLAP])
