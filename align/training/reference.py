"""The reference of a training: which model it is, and its log-probs of a table of pairs, cached on disk."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from align.config.columns import REFERENCE_COLUMNS
from align.distributed import from_main_process
from align.errors import ConfigError
from align.io.console import progress
from align.io.files import atomic_write
from align.models.adapter_folders import FIRST_ADAPTER
from align.models.adapters import starts_from_adapter
from align.models.batching import token_batches
from align.models.fingerprint import reference_key
from align.models.layout import has_adapter
from align.training.distinct_responses import distinct_passes

REFERENCE_TOKENS = 8192
"""Tokens of a batch of reference log-probs if no budget is set."""
REFERENCE_FILE = "reference.safetensors"
"""File of a checkpoint with a reference that follows the policy."""
PARTIAL, DISTINCT_PARTIAL = ".partial.npy", ".distinct.partial.npy"
"""Endings of the file of an unfinished computation: its rows are the pairs of the table, or pairs of its responses."""
REVISION = 2
"""Part of the cache key: raise it when the same reference and pairs give other log-probs."""


@contextmanager
def reference_model(
    policy: nn.Module, ref_model: nn.Module | None, accelerator: Accelerator, checkpointing: dict[str, Any] | None
) -> Iterator[nn.Module]:
    """Yield the reference for forward passes without gradient.

    It is ``ref_model`` or, without one, the policy: with its adapter off or replaced by the adapter that it started
    from, or before the first step of a full fine-tuning as it is.

    Args:
        policy: the model in training.
        ref_model: a model of its own, or None.
        accelerator: the trainer's.
        checkpointing: ``gradient_checkpointing_kwargs`` of the trainer, to switch it on again.
    """
    adapter: AbstractContextManager[None] = nullcontext()
    if ref_model is None and has_adapter(policy):
        plain = accelerator.unwrap_model(policy)
        adapter = use_adapter(plain, FIRST_ADAPTER if starts_from_adapter(plain) else None)
    with torch.no_grad(), disable_gradient_checkpointing(policy, checkpointing), adapter, accelerator.autocast():
        yield policy if ref_model is None else ref_model


def cache_file(
    folder: Path | None,
    policy: nn.Module,
    dataset: Dataset,
    args: Any,
    ref_model: nn.Module | None = None,
    loaded_from: Path | None = None,
) -> Path | None:
    """Return the file for the reference log-probs of a table, named by a hash of everything they depend on.

    Args:
        folder: folder of the cache; None: no cache.
        policy: the policy before its first step, which is its own reference and, unlike that, not sharded yet.
        dataset: table with ``ID_COLUMNS``.
        args: training arguments, for truncation and precision.
        ref_model: the reference, if the caller of the trainer gave one, not sharded.
        loaded_from: folder that the trainer itself has loaded the policy from, unchanged.
    """
    if folder is None:
        return None
    settings = [REVISION, args.max_length, args.truncation_mode]
    settings += [name for name in ("bf16", "fp16") if getattr(args, name)]
    reference = policy if ref_model is None else ref_model
    with_adapter = ref_model is not None or starts_from_adapter(policy)
    source = loaded_from if ref_model is None else None
    key = from_main_process(
        lambda: reference_key(reference, dataset, settings, with_adapter=with_adapter, folder=source)
    )
    return folder / f"{key}.npy"


def add_reference_logps(
    dataset: Dataset,
    compute: Callable[[list[dict[str, Any]]], Tensor],
    accelerator: Accelerator,
    *,
    batch_tokens: int | None,
    batch_pairs: int | None = None,
    file: Path | None,
    in_step: bool = False,
) -> Dataset:
    """Add the columns ``REFERENCE_COLUMNS`` to a table; see ``reference_logps``."""
    values = reference_logps(
        dataset,
        compute,
        accelerator,
        batch_tokens=batch_tokens or REFERENCE_TOKENS,
        batch_pairs=batch_pairs,
        file=file,
        in_step=in_step,
    )
    columns = Dataset.from_dict(dict(zip(REFERENCE_COLUMNS, values.T, strict=True)))
    return concatenate_datasets([dataset, columns], axis=1)


def reference_logps(
    dataset: Dataset,
    compute: Callable[[list[dict[str, Any]]], Tensor],
    accelerator: Accelerator,
    *,
    batch_tokens: int,
    batch_pairs: int | None = None,
    file: Path | None,
    in_step: bool = False,
) -> np.ndarray:
    """Log-probs (nats) of every pair's chosen and rejected response under the reference, float64 [N, 2].

    A response that a prompt has in several pairs is computed once, see ``distinct_passes``.

    Args:
        dataset: table with ``ID_COLUMNS``.
        compute: examples of b pairs, with ``ID_COLUMNS`` -> [b, 2].
        accelerator: its processes share the work; each returns all rows.
        batch_tokens: tokens of a batch, prompts counted once.
        batch_pairs: most pairs of a batch; None: as many as ``batch_tokens`` allows.
        file: a .npy file that caches the result, or None; a complete one is only read. During the computation, a
            memory-mapped file next to it holds NaN for passes that are still missing; a stopped run resumes from it.
        in_step: the model is sharded over the processes, so that all of them must compute at the same time.
    """
    if file is not None and file.exists():
        return np.load(file, mmap_mode="r", allow_pickle=False)
    passes = distinct_passes(dataset)
    partial = None if file is None else file.with_suffix(DISTINCT_PARTIAL if passes.repeats else PARTIAL)
    values = _open(partial, len(passes.places), create=accelerator.is_main_process)
    batches = token_batches(passes.lengths(dataset), batch_tokens, padded=False)
    if batch_pairs is not None:
        batches = [batch[k : k + batch_pairs] for batch in batches for k in range(0, len(batch), batch_pairs)]
    batches = [batch for batch in batches if np.isnan(values[batch]).any()]
    accelerator.wait_for_everyone()
    world, rank = accelerator.num_processes, accelerator.process_index
    rounds = range(0, math.ceil(len(batches) / world) * world, world)
    for start in progress(rounds, what="reference log-probs", total=len(rounds), unit="batches"):
        local = batches[start + rank : start + rank + 1]
        computed = [
            (batch, compute([passes.example(dataset, k) for k in batch]).double().cpu().numpy()) for batch in local
        ]
        if in_step and not local:
            compute([passes.example(dataset, k) for k in batches[start]])
        for batch, rows in gather_object(computed) if world > 1 else computed:
            if accelerator.is_main_process or file is None:
                values[batch] = rows
        if isinstance(values, np.memmap):
            values.flush()
    accelerator.wait_for_everyone()
    if file is None or partial is None:
        return np.asarray(values.ravel()[passes.source])
    if accelerator.is_main_process:
        if passes.repeats:
            with atomic_write(file) as temporary, temporary.open("wb") as stream:
                np.save(stream, values.ravel()[passes.source], allow_pickle=False)
            partial.unlink()
        else:
            partial.replace(file)
    accelerator.wait_for_everyone()
    return np.load(file, mmap_mode="r", allow_pickle=False)


def save_reference(reference: nn.Module, folder: Path, accelerator: Accelerator) -> None:
    """Write a reference model that follows the policy (``sync_ref_model``) into a checkpoint."""
    save_model(accelerator.unwrap_model(reference), str(folder / REFERENCE_FILE))


def load_reference(reference: nn.Module, folder: Path, accelerator: Accelerator) -> None:
    """Restore what ``save_reference`` wrote.

    Raises:
        ConfigError: the checkpoint holds no reference.
    """
    file = folder / REFERENCE_FILE
    if not file.exists():
        raise ConfigError(
            f"{folder}: holds no reference model, which train.trainer.sync_ref_model has moved since the start",
            code="trainer-key",
            hint="remove the checkpoint to train from the start",
        )
    load_model(accelerator.unwrap_model(reference), str(file))


def _open(partial: Path | None, rows: int, *, create: bool) -> np.ndarray:
    """Open the partial result; NaN in memory if there is no file and this process may not create it."""
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
