"""Reference log-probs of a table of pairs: computed once by all processes, kept on disk, resumed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from align.config.columns import TOKEN_IDS
from align.io.console import progress
from align.io.files import atomic_write
from align.models.batching import token_batches


def reference_logps(
    dataset: Dataset,
    compute: Callable[[list[dict[str, Any]]], Tensor],
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    file: Path | None,
    in_step: bool = False,
) -> np.ndarray:
    """Log-probs (nats) of every pair's chosen and rejected response under the reference, float64 [N, 2].

    Args:
        dataset: table with ``TOKEN_IDS``.
        compute: examples of b pairs -> [b, 2].
        accelerator: its processes share the work; each returns the whole.
        batch_tokens: tokens of a batch, prompts counted once.
        file: a .npy file to keep the result in, or None; found whole it is only read. While computing, a memory-mapped
            file beside it holds NaN where nothing is known yet, and a stopped run goes on from there.
        in_step: the model is sharded over the processes, so that each has to compute whenever one does.
    """
    if file is not None and file.exists():
        return np.load(file, mmap_mode="r", allow_pickle=False)
    partial = None if file is None else file.with_suffix(".partial.npy")
    values = _open(partial, len(dataset), create=accelerator.is_main_process)
    lengths = [sum(map(len, columns)) for columns in zip(*(dataset[name] for name in TOKEN_IDS), strict=True)]
    batches = [batch for batch in token_batches(lengths, batch_tokens, padded=False) if np.isnan(values[batch]).any()]
    accelerator.wait_for_everyone()
    world, rank = accelerator.num_processes, accelerator.process_index
    rounds = range(0, math.ceil(len(batches) / world) * world, world)
    for start in progress(rounds, what="reference log-probs", total=len(rounds), unit="batches"):
        own = batches[start + rank : start + rank + 1]
        found = [(batch, compute([dataset[k] for k in batch]).double().cpu().numpy()) for batch in own]
        if in_step and not own:
            compute([dataset[k] for k in batches[start]])
        for batch, rows in gather_object(found) if world > 1 else found:
            if accelerator.is_main_process or file is None:
                values[batch] = rows
        if isinstance(values, np.memmap):
            values.flush()
    accelerator.wait_for_everyone()
    if file is None or partial is None:
        return values
    if accelerator.is_main_process:
        partial.replace(file)
    accelerator.wait_for_everyone()
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _open(partial: Path | None, rows: int, *, create: bool) -> np.ndarray:
    if partial is None:
        return np.full((rows, 2), np.nan)
    if partial.exists():
        return np.lib.format.open_memmap(partial, mode="r+")
    if not create:
        return np.full((rows, 2), np.nan)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(partial) as temporary, temporary.open("wb") as stream:
        np.save(stream, np.full((rows, 2), np.nan), allow_pickle=False)
    return np.lib.format.open_memmap(partial, mode="r+")
