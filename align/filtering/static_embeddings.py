"""Static embeddings: one vector per token, distilled from an encoder, weighted and averaged.

They are far faster than the encoder and blind to word order, for sets that are too large to encode. The recipe is
model2vec's (Tulkens and van Dongen, 2024) without its PCA: each token of the vocabulary passes the encoder alone, the
mean over the vocabulary is subtracted, and a token is weighted by log(1 + rank) instead of its inverse frequency, rank
being its place in a vocabulary sorted by frequency.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.filtering.embeddings import Encoder
from align.io.array_cache import cached_arrays
from align.models.hub import cache_if_away

TOKENS_PER_PART = 2048
MAX_CHARACTERS = 4096
"""A longer text is truncated."""


class StaticEncoder:
    """Embeds texts with a table of token vectors.

    Args:
        model: encoder to distill, hub id or folder.
        file: caches the table (.safetensors); valid for the same model.

    Raises:
        ModelError: the encoder cannot be loaded.
    """

    def __init__(self, model: str, file: Path) -> None:
        self.table = cached_arrays(file, lambda: {"table": distill(Encoder(model))})["table"]
        from transformers import AutoTokenizer

        with cache_if_away(model):
            self.tokenizer = AutoTokenizer.from_pretrained(model)

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return int(self.table.shape[1])

    def __call__(self, strings: Sequence[str]) -> np.ndarray:
        """Unit-length weighted means of token vectors [N, D], float32; the first axis for a text without a token."""
        ids = self.tokenizer([text[:MAX_CHARACTERS] for text in strings], add_special_tokens=False)["input_ids"]
        counts = np.array([len(row) for row in ids])
        flat = np.fromiter((token for row in ids for token in row), dtype=np.int64, count=int(counts.sum()))
        sums = np.zeros((len(ids), self.size), dtype=np.float32)
        filled = np.flatnonzero(counts)
        if len(filled):
            starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]])
            sums[filled] = np.add.reduceat(self.table[flat], starts, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        sums[lengths[:, 0] == 0, 0] = 1.0
        vectors: np.ndarray = sums / np.where(lengths == 0, 1.0, lengths)
        return vectors


def distill(encoder: Encoder) -> np.ndarray:
    """Weighted vectors [V, D] of all tokens of the encoder's vocabulary, float32; 0 for special tokens."""
    count = len(encoder.tokenizer)
    vectors = encoder.embed_ids([[k] for k in range(count)], per_part=TOKENS_PER_PART)
    vectors = (vectors - vectors.mean(axis=0)) * np.log1p(np.arange(1, count + 1, dtype=np.float32))[:, None]
    vectors[encoder.tokenizer.all_special_ids] = 0.0
    table: np.ndarray = vectors.astype(np.float32)
    return table
