"""The scores of a pair, each a column that a user can look at and reuse. Higher is better in all of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.batching import token_batches
from align.console import progress
from align.errors import ModelError
from align.filtering.neighbours import Neighbours
from align.filtering.texts import plain, words

DUPLICATE_DISTANCE = 1e-3
"""Distances below this count as this: two equal prompts are near, not infinitely near."""
RUN = 3


def quality(row: dict[str, Any]) -> float:
    """How much the worse of the two responses reads like text, in [0, 1], without a model.

    Share of characters that are letters or spaces, times the share of three-word runs that are not repeated.
    """
    return min(_readable(row["chosen"]), _readable(row["rejected"]))


def _readable(part: Any) -> float:
    text, tokens = plain(part), words(part)
    letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
    runs = Counter(tuple(tokens[k : k + RUN]) for k in range(len(tokens) - RUN + 1))
    fresh = len(runs) / max(sum(runs.values()), 1) if runs else 1.0
    return letters * fresh


def diversity(neighbours: Neighbours) -> np.ndarray:
    """[N], log of the distance to the k-th neighbour: a pair's part in the k-NN entropy of the set.

    H ~ D / N sum_i log ||e_i - e_i^(k)|| + constants (Kozachenko and Leonenko; FiFA, arXiv 2410.10166).
    """
    return np.log(np.maximum(neighbours.distance, DUPLICATE_DISTANCE))


def embed(texts: list[str], model: str, *, batch_tokens: int = 8192, max_length: int = 256) -> np.ndarray:
    """Unit-length mean-pooled last hidden states [N, D], float32.

    Args:
        texts: N texts.
        model: encoder, hub id or folder.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text; longer ones are cut.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{model}: cannot be loaded as an encoder ({reason})",
            code="model-load",
            hint="give a hub id or a folder with --embedding-model",
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    found = np.empty((len(texts), encoder.config.hidden_size), dtype=np.float32)
    batches = token_batches([len(row) for row in ids], batch_tokens)
    with torch.inference_mode():
        for batch in progress(batches, what="embedding", total=len(batches), unit="batches"):
            padded = tokenizer.pad({"input_ids": [ids[k] for k in batch]}, return_tensors="pt").to(device)
            states = encoder(**padded).last_hidden_state
            mask = padded["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
            found[batch] = torch.nn.functional.normalize(mean.float(), dim=-1).cpu().numpy()
    return found


def cached_embedding(texts: list[str], model: str, file: Path) -> np.ndarray:
    """``embed``, kept in ``file`` (.npy)."""
    if file.exists():
        found: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        return found
    vectors = embed(texts, model)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp.npy")
    np.save(temporary, vectors, allow_pickle=False)
    temporary.replace(file)
    return vectors
