"""Overlap of pairs with an evaluation set: equal pairs, prompts and responses of any length, and runs of words.

What many pairs have in common says nothing about an overlap: an instruction, a system prompt in the text, a short
answer. It is left out by how often the pairs have it; system turns are never compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from align.config.columns import TEXT as PARTS
from align.data.text import plain, texts_of, without_system
from align.data.word_hashes import Hashes, hash_words, ngrams, word_list
from align.filtering.equal_keys import combined_key, isin_sorted
from align.filtering.text_survey import OVERLAP, Survey, content_hashes, overlap_hashes
from align.io.console import log

COMMON = 4
"""What at most this many pairs or prompts have is never common."""
COMMON_SHARE = 0.1
"""A run of words is common if a larger share of the different prompts has it, ..."""
COMMON_PAIRS = 0.5
"""... and a prompt or a run if a larger share of the pairs has it."""
BLOCK = 8_192
"""Pairs whose texts are in memory at a time."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Keys of an evaluation set; uint64, sorted, each key once."""

    pairs: np.ndarray
    """Keys of prompt and responses, in both orders."""
    prompts: np.ndarray
    responses: np.ndarray
    runs: np.ndarray
    """Hashes of the runs of ``OVERLAP`` words of the prompts."""

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "HeldOut":
        """Keys of some pairs; a row may lack responses.

        Args:
            rows: pairs with ``prompt``, ``chosen`` and ``rejected``.
        """
        prompts = [plain(without_system(row["prompt"])) for row in rows]
        sides = [(plain(row["chosen"]), plain(row["rejected"])) for row in rows if "chosen" in row]
        responses = [text for side in sides for text in side]
        prompt, response = _hashes(prompts), _hashes(responses).reshape(-1, 2)
        triples = np.column_stack([prompt, response]) if len(sides) == len(rows) else np.empty((0, 3), np.uint64)
        both = [combined_key(triples, columns) for columns in ((0, 1, 2), (0, 2, 1))]
        filled = (_hashes([text for text in texts if text.strip()]) for texts in (prompts, responses))
        known_prompts, known_responses = map(np.unique, filled)
        return cls(np.unique(np.concatenate(both)), known_prompts, known_responses, overlap_hashes(prompts))


def overlaps(pairs: Dataset, survey: Survey, held_out: HeldOut, remaining: np.ndarray) -> dict[int, str]:
    """What each of the remaining pairs has in common with an evaluation set: {place: finding}.

    Args:
        pairs: N pairs.
        survey: their survey, taken with the runs of ``held_out``.
        held_out: keys of the evaluation set.
        remaining: bool [N].
    """
    content = np.column_stack([survey.asked, survey.content[:, 1:]])
    findings: dict[int, str] = {}
    left_out = {"runs of words": 0}
    if survey.overlap.any():
        runs = _distinctive_runs(pairs, survey, held_out.runs)
        left_out["runs of words"] = len(held_out.runs) - len(runs)
        findings |= _shared_runs(pairs, np.flatnonzero(remaining & (survey.overlap > 0)), runs)
    for column in (2, 1):
        shared, common = _distinctive(content[:, column], held_out.responses, survey.asked)
        left_out["responses"] = max(left_out.get("responses", 0), common)
        finding = f"{PARTS[column]} is a response of the evaluation set"
        findings |= dict.fromkeys(np.flatnonzero(remaining & shared).tolist(), finding)
    shared, left_out["prompts"] = _distinctive(survey.asked, held_out.prompts, None)
    findings |= dict.fromkeys(np.flatnonzero(remaining & shared).tolist(), "prompt is one of the evaluation set")
    shared = isin_sorted(combined_key(content, (0, 1, 2)), held_out.pairs)
    findings |= dict.fromkeys(np.flatnonzero(remaining & shared).tolist(), "the pair is in the evaluation set")
    counts = ", ".join(f"{number} {what}" for what, number in left_out.items() if number)
    if counts:
        log.warning("held_out: left out %s of the evaluation set that many pairs have in common", counts)
    return findings


def _distinctive(keys: np.ndarray, held_out: np.ndarray, prompts: np.ndarray | None) -> tuple[np.ndarray, int]:
    """bool [N]: the key is one of the evaluation set and not common; and the number of common keys.

    Args:
        keys: [N].
        held_out: sorted.
        prompts: keys [N] of the prompts, if a key that many prompts have is common; None: only one that most pairs
            have.
    """
    places = np.flatnonzero(isin_sorted(keys, held_out))
    found, which, pairs = np.unique(keys[places], return_inverse=True, return_counts=True)
    common = pairs > max(COMMON, COMMON_PAIRS * len(keys))
    if prompts is not None:
        different = np.unique(np.column_stack([which.astype(np.uint64), prompts[places]]), axis=0)
        common |= np.bincount(different[:, 0].astype(np.int64), minlength=len(found)) > COMMON
    shared = np.zeros(len(keys), dtype=bool)
    shared[places[~common[which]]] = True
    return shared, int(common.sum())


def _distinctive_runs(pairs: Dataset, survey: Survey, runs: np.ndarray) -> np.ndarray:
    """The runs of the evaluation set that are not common among the pairs, sorted."""
    places = np.flatnonzero(survey.overlap > 0)
    _, first = np.unique(survey.asked, return_index=True)
    is_first = np.zeros(len(pairs), dtype=bool)
    is_first[first] = True
    of_pairs, of_prompts = np.zeros(len(runs), dtype=np.int64), np.zeros(len(runs), dtype=np.int64)
    for block, grams in _blocks(pairs, places):
        which, hit = _matches(grams, runs)
        each = np.unique(np.column_stack([which, grams.rows[hit] // len(PARTS)]), axis=0)
        of_pairs += np.bincount(each[:, 0], minlength=len(runs))
        of_prompts += np.bincount(each[is_first[block[each[:, 1]]], 0], minlength=len(runs))
    common = of_prompts > max(COMMON, COMMON_SHARE * len(first))
    common |= of_pairs > max(COMMON, COMMON_PAIRS * len(pairs))
    return runs[~common]


def _shared_runs(pairs: Dataset, places: np.ndarray, runs: np.ndarray) -> dict[int, str]:
    """For each of the places with a run of the evaluation set the first such run, in words."""
    findings: dict[int, str] = {}
    if not len(runs):
        return findings
    for block, grams in _blocks(pairs, places):
        _, hit = _matches(grams, runs)
        texts, at = np.unique(grams.rows[hit], return_index=True)
        for text, place in zip(texts[::-1].tolist(), at[::-1].tolist(), strict=True):
            row, part = divmod(text, len(PARTS))
            start = int(np.flatnonzero(hit)[place] - grams.offsets[text])
            k, name = int(block[row]), PARTS[part]
            run = " ".join(word_list(plain(without_system(pairs[k][name])))[start:][:OVERLAP])
            findings[k] = f"{name} shares with the evaluation set: {run}"
    return findings


def _blocks(pairs: Dataset, places: np.ndarray) -> Iterator[tuple[np.ndarray, Hashes]]:
    """Yield some of the places and the runs of words of their 3 n texts."""
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        yield block, ngrams(hash_words(texts_of(pairs, block.tolist(), system=False)), OVERLAP, whole=False)


def _matches(grams: Hashes, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place in ``runs`` of each run of words that is one of them, and bool [T]: it is one of them."""
    hit = isin_sorted(grams.values, runs)
    return np.searchsorted(runs, grams.values[hit]), hit


def _hashes(strings: list[str]) -> np.ndarray:
    return content_hashes(pa.array(strings, type=pa.string()))
