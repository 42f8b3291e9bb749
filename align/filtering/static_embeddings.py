"""An encoder without attention: one vector per token, distilled from a real encoder, weighted and averaged.

Far faster than the encoder and blind to word order; for sets that are too large to encode. The recipe is that of
model2vec (Tulkens and van Dongen, 2024) without its reduction of dimensions: each token of the vocabulary goes through
the encoder alone, the mean over the vocabulary is taken off, and a token counts with log(1 + rank), its place in a
vocabulary that is sorted by frequency, in place of its inverse frequency.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.filtering.embeddings import Encoder
from align.io.array_cache import cached_arrays

TOKENS_PER_PART = 2048
CUT = 4096
"""Characters of a text that are read."""


class StaticEncoder:
    """Vectors of texts from a table of token vectors.

    Args:
        model: encoder to distil, hub id or folder.
        file: keeps the table (.safetensors); valid for the same model.

    Raises:
        ModelError: the encoder cannot be loaded.
    """

    def __init__(self, model: str, file: Path) -> None:
        self.table = cached_arrays(file, lambda: {"table": distilled(Encoder(model))})["table"]
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)

    @property
    def size(self) -> int:
        """Numbers per vector."""
        return int(self.table.shape[1])

    def __call__(self, strings: Sequence[str]) -> np.ndarray:
        """Unit-length weighted means of the token vectors [N, D], float32; a text without a token is the first axis."""
        ids = self.tokenizer([text[:CUT] for text in strings], add_special_tokens=False)["input_ids"]
        counts = np.array([len(row) for row in ids])
        flat = np.fromiter((token for row in ids for token in row), dtype=np.int64, count=int(counts.sum()))
        sums = np.zeros((len(ids), self.size), dtype=np.float32)
        filled = np.flatnonzero(counts)
        if len(filled):
            starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]])
            sums[filled] = np.add.reduceat(self.table[flat], starts, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        sums[lengths[:, 0] == 0, 0] = 1.0
        made: np.ndarray = sums / np.where(lengths == 0, 1.0, lengths)
        return made


def distilled(encoder: Encoder) -> np.ndarray:
    """Weighted vector [V, D] of every token of the encoder's vocabulary, float32; 0 for special tokens."""
    count = len(encoder.tokenizer)
    found = encoder.tokens([[k] for k in range(count)], per_part=TOKENS_PER_PART)
    found = (found - found.mean(axis=0)) * np.log1p(np.arange(1, count + 1, dtype=np.float32))[:, None]
    found[encoder.tokenizer.all_special_ids] = 0.0
    made: np.ndarray = found.astype(np.float32)
    return made
