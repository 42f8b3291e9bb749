"""Features of a reward model: the pooled hidden state that its head turns into the reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.errors import ModelError
from align.io.array_cache import cached_array
from align.io.console import progress
from align.io.hashing import digest
from align.models.batching import token_batches
from reward_models.score import REWARDS, RewardScorer
from reward_models.tokenization import reward_ids

CHUNK = 4096


def head_features(scorer: RewardScorer, texts: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Input of the one-logit head for each text, float64 [N, D].

    It is the hidden state of the last token of a decoder, and of the first or pooled token of an encoder.

    Args:
        scorer: a reward model; its head is not used.
        texts: at least one.
        cache: folder for the features of each ``CHUNK`` texts, so that a stopped pass resumes; valid for the same
            backbone only.

    Raises:
        ModelError: the model has neither a ``score`` nor a ``classifier`` head.
    """
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    return np.concatenate([_chunk(scorer, chunk, cache) for chunk in chunks])


def _chunk(scorer: RewardScorer, texts: Sequence[str], cache: Path | None) -> np.ndarray:
    file = cache / f"features-{digest([REWARDS, *texts])[:32]}.npy" if cache is not None else None
    return cached_array(file, lambda: _pass(scorer, texts))


def _pass(scorer: RewardScorer, texts: Sequence[str]) -> np.ndarray:
    """One forward pass over the texts, a batch at a time."""
    head = getattr(scorer.model, "score", None) or getattr(scorer.model, "classifier", None)
    if head is None:
        name = type(scorer.model).__name__
        raise ModelError(f"{name}: has no head called score or classifier", code="reward-labels")
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].detach())

    ids = reward_ids(texts, scorer.tokenizer, scorer.max_length)
    batches = token_batches([len(row) for row in ids], scorer.batch_tokens)
    made: dict[int, np.ndarray] = {}
    hook = head.register_forward_pre_hook(keep)
    try:
        for batch in progress(batches, what="features", total=len(batches), unit="batches"):
            seen.clear()
            _, places = scorer.forward([ids[k] for k in batch])
            states = seen[0]
            if states.ndim == 3:
                states = states[torch.arange(len(batch)), places]
            made.update(zip(batch, states.double().cpu().numpy(), strict=True))
    finally:
        hook.remove()
    return np.stack([made[k] for k in range(len(ids))])
