"""Embeddings of the prompts: unit vectors from an encoder or from a file."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from align.errors import DataError, ModelError
from align.io.console import progress
from align.models.batching import token_batches
from align.models.folders import check_model_folder
from align.models.hub import cache_if_away

PART = 4096
PROBE = "a"


class Encoder:
    """A loaded text encoder (mean pooling), from safetensors only.

    Args:
        model: hub id or folder.
        batch_tokens: padded tokens of one forward pass.
        max_length: tokens per text; longer texts are truncated.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, model: str, *, batch_tokens: int = 8192, max_length: int = 256) -> None:
        from transformers import AutoModel, AutoTokenizer

        check_model_folder(model)
        try:
            with cache_if_away(model):
                self.tokenizer = AutoTokenizer.from_pretrained(model)
                encoder = AutoModel.from_pretrained(model, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ModelError(
                f"{model}: cannot be loaded as an encoder ({reason})",
                code="model-load",
                hint="give a hub id or a folder with --embedding-model, or vectors with --embeddings",
            ) from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = encoder.to(self.device)
        self.batch_tokens = batch_tokens
        self.max_length = max_length

    @property
    def size(self) -> int:
        """Dimension of the vectors."""
        return int(self.model.config.hidden_size)

    def __call__(self, strings: Sequence[str]) -> np.ndarray:
        """Unit-length mean-pooled last hidden states [N, D], float32."""
        ids = self.tokenizer(list(strings), truncation=True, max_length=self.max_length)["input_ids"]
        return self._mean_pooled(ids)

    def embed_ids(self, ids: Sequence[list[int]], per_part: int = PART) -> np.ndarray:
        """Embed rows of token ids, each between the special tokens that the encoder puts around a text; [N, D]."""
        starts = range(0, len(ids), per_part)
        whole, bare = self.tokenizer(PROBE)["input_ids"], self.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        place = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
        before, after = whole[:place], whole[place + len(bare) :]
        parts = [
            self._mean_pooled([[*before, *row, *after] for row in ids[start : start + per_part]])
            for start in progress(starts, what="token vectors", total=len(starts), unit="parts")
        ]
        return np.concatenate(parts)

    def _mean_pooled(self, ids: Sequence[list[int]]) -> np.ndarray:
        vectors = np.empty((len(ids), self.size), dtype=np.float32)
        with torch.inference_mode():
            for batch in token_batches([len(row) for row in ids], self.batch_tokens):
                padded = self.tokenizer.pad({"input_ids": [ids[k] for k in batch]}, return_tensors="pt").to(self.device)
                states = self.model(**padded).last_hidden_state
                mask = padded["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
                vectors[batch] = torch.nn.functional.normalize(mean.float(), dim=-1).cpu().numpy()
        return vectors


def embed(strings: Sequence[str], model: str) -> np.ndarray:
    """Embed N texts in memory: unit vectors [N, D], float32."""
    encoder = Encoder(model)
    starts = range(0, len(strings), PART)
    parts = [
        encoder(strings[start : start + PART])
        for start in progress(starts, what="embedding", total=len(starts), unit="parts")
    ]
    return np.concatenate(parts) if parts else np.empty((0, encoder.size), dtype=np.float32)


class TextEncoder(Protocol):
    """Anything that turns texts into unit vectors."""

    @property
    def size(self) -> int:
        """Dimension of the vectors."""

    def __call__(self, strings: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, size], float32."""


def read_embeddings(file: str, count: int) -> np.ndarray:
    """Read the user's vectors [count, D], memory-mapped, and check that they have unit length.

    Raises:
        DataError: not a .npy file of ``count`` unit vectors.
    """
    try:
        vectors: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a .npy file of vectors ({error})", code="filter-embeddings") from None
    if vectors.ndim != 2 or len(vectors) != count or vectors.dtype != np.float32:
        raise DataError(
            f"{file}: found {vectors.dtype} of shape {vectors.shape}, expected float32 of ({count}, D), a row per pair",
            code="filter-embeddings",
        )
    for start in range(0, count, PART):
        off = np.flatnonzero(~(np.abs(np.linalg.norm(vectors[start : start + PART], axis=1) - 1) <= 1e-3))
        if len(off):
            row = start + int(off[0])
            length = float(np.linalg.norm(vectors[row]))
            raise DataError(
                f"{file}:row {row + 1}: found a vector of length {length:.4g}, expected length 1",
                code="filter-embeddings",
            )
    return vectors
