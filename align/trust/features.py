"""Frozen features of pairs: mean last hidden states of the reference over each response, chosen minus rejected.

Legend: N pairs, B pairs of a batch, T padded tokens, H hidden size, D directions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.linalg import eigh
from torch import Tensor

from align.config.columns import ID_COLUMNS
from align.errors import ModelError
from align.io.console import log, progress
from align.models import attention
from align.models.batching import token_batches
from align.models.fingerprint import reference_key
from align.models.layout import base_model, choose_layout, longest_sequence
from align.models.loading import load_policy, load_tokenizer, place
from align.models.logps import Layout
from align.models.packing import pack
from align.models.tokenization import collate, tokenize_pairs
from align.models.turns import Turns

DIRECTIONS = 64
BATCH_TOKENS = 8192
FLUSH_EVERY = 16
SAMPLE = 64
REVISION = 2
"""Part of the cache key: raise it when the same model and pairs give other features."""


def pair_features(
    pairs: Dataset,
    model: str,
    cache: Path,
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    turns: Turns = "assistant",
    loading: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """Differences of mean hidden states [N, H], float32, cached in ``cache``; a stopped pass resumes.

    Args:
        pairs: pair table.
        model: reference, hub id or folder.
        cache: folder of .npy files, one for each (weights, token ids, truncation).
        max_length: tokens of prompt and response together; None: all.
        truncation: ``keep_start`` or ``keep_end``, as in trl.DPOConfig.
        turns: whose words count in responses of several messages.
        loading: arguments of ``from_pretrained``, as in training; an adapter's base is loaded as its folder says.

    Raises:
        ModelError: the model cannot be loaded, or its tokenizer has ids without an embedding, or no chat template.
        DataError: truncation to ``max_length`` leaves nothing of a response.
    """
    options = {"dtype": "float32"} | dict(loading or {})
    tokenizer = load_tokenizer(model, trust_remote_code=bool(options.get("trust_remote_code", False)))
    if not isinstance(pairs[0]["prompt"], str) and tokenizer.chat_template is None:
        raise ModelError(
            f"{model}: found no chat template in its tokenizer, expected one, since the pairs are conversations",
            code="no-chat-template",
            hint="give a model that has one, or pairs of plain text",
        )
    tokens = tokenize_pairs(pairs, tokenizer, max_length=max_length, truncation=truncation, turns=turns)
    reference = load_policy(model, **options).eval()
    key = reference_key(reference, tokens, ("mean hidden states", REVISION, max_length, truncation), with_adapter=True)
    file = cache / f"{key[:32]}.npy"
    if file.exists():
        log.info("features: found in %s", file)
        cached: np.ndarray = np.load(file, allow_pickle=False)
        return cached
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place(reference, device)
    cut: dict[str, Any] = {"max_length": max_length, "truncation": truncation}
    sample = collate([tokens[k] for k in range(min(SAMPLE, len(tokens)))], tokenizer.pad_token_id, **cut)
    layout = choose_layout(reference, sample, "auto", longest=longest_sequence(tokens, max_length))
    partial = file.with_suffix(".partial.npy")
    values = _open(partial, (len(tokens), base_model(reference).config.get_text_config().hidden_size))
    lengths = [sum(map(len, columns)) for columns in zip(*(tokens[name] for name in ID_COLUMNS), strict=True)]
    missing = [k for k in range(len(tokens)) if np.isnan(values[k]).any()]
    batches = [[missing[k] for k in batch] for batch in token_batches([lengths[k] for k in missing], BATCH_TOKENS)]
    for count, rows in enumerate(progress(batches, what="features", total=len(batches), unit="batches"), 1):
        batch = collate([tokens[k] for k in rows], tokenizer.pad_token_id, **cut)
        batch = {name: value.to(device) for name, value in batch.items()}
        values[rows] = mean_difference(reference, batch, layout).cpu().numpy()
        if count % FLUSH_EVERY == 0:
            values.flush()
    values.flush()
    partial.replace(file)
    return np.array(values)


@torch.no_grad()
def mean_difference(model: torch.nn.Module, batch: dict[str, Any], layout: Layout) -> Tensor:
    """Mean last hidden state of the chosen minus that of the rejected response, [B, H], float32.

    Padding is on the right, where no token of a causal model attends to it, so there is no padding mask. (With one, a
    sliding window that lies in the padding alone yields NaN.)

    Args:
        model: causal language model, after ``choose_layout``.
        batch: right-padded, in trl's layout, chosen rows first.
        layout: what ``choose_layout`` returned.
    """
    base = base_model(model)
    mask = batch["completion_mask"]
    if layout == "shared_prefix":
        packed = pack(batch)
        row = base.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=attention.no_mask(mask.device),
            packed_pairs=packed,
            use_cache=False,
        ).last_hidden_state[0]
        hidden = row[packed.source]
    else:
        hidden = base.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    sums = hidden.float().masked_fill(~mask.bool()[..., None], 0).sum(dim=1)
    chosen, rejected = (sums / mask.sum(dim=1, keepdim=True).clamp_min(1)).chunk(2)
    return chosen - rejected


def uncentered_pca(differences: np.ndarray, directions: int = DIRECTIONS) -> np.ndarray:
    """Project the differences [N, H] on their first ``directions`` principal components, [N, D].

    They are not centered: a difference has a sign, and the mean difference of chosen and rejected counts.
    """
    values = np.asarray(differences, dtype=np.float64)
    size = values.shape[1]
    kept = min(directions, size, len(values))
    vectors = eigh(values.T @ values, subset_by_index=(size - kept, size - 1))[1]
    projected: np.ndarray = values @ vectors[:, ::-1]
    return projected


def _open(partial: Path, shape: tuple[int, int]) -> np.memmap:
    if partial.exists():
        return np.lib.format.open_memmap(partial, mode="r+")
    partial.parent.mkdir(parents=True, exist_ok=True)
    values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    values[:] = np.nan
    values.flush()
    return values
