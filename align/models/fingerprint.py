"""Cache keys of reference log-probs."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from align.config.columns import ID_COLUMNS, MASK_COLUMNS
from align.io.hashing import digest
from align.models.layout import base_model, has_adapter

NOT_OF_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Fields of a model's config on which no log-prob depends: its path, the version that wrote it, sampling."""


_KNOWN: dict[tuple[object, ...], Any] = {}
"""The state of a hash after the weights of a folder, for the other methods of a run."""


def reference_key(
    model: torch.nn.Module,
    dataset: Dataset,
    settings: Sequence[object],
    *,
    with_adapter: bool,
    folder: Path | None = None,
) -> str:
    """Hex digest (sha256) of the reference's weights and config, the token ids and ``settings``.

    Args:
        model: the reference, or a policy that serves as its own reference before the first step.
        dataset: table with ``ID_COLUMNS``.
        settings: everything else on which the log-probs depend.
        with_adapter: include the adapter's weights, because the adapter is part of the reference.
        folder: the model has just been loaded from it, so that weights of the same files are hashed once in a process.
    """
    state = _hashed_weights(model, settings, with_adapter, folder)
    for column in (*ID_COLUMNS, *(name for name in MASK_COLUMNS if name in dataset.column_names)):
        for ids in dataset[column]:
            state.update(f"{column}{ids}".encode())
    return str(state.hexdigest())


def _hashed_weights(model: torch.nn.Module, settings: Sequence[object], with_adapter: bool, folder: Path | None) -> Any:
    """The state of the hash after ``settings``, config and weights."""
    config = {name: value for name, value in base_model(model).config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    state = hashlib.sha256(repr([*settings, digest(config)]).encode())
    tuner = getattr(model, "base_model", None) if has_adapter(model) and not with_adapter else None
    adapter = () if tuner is None else (str(getattr(tuner, "prefix", "lora_")), "modules_to_save.")
    weights = [named for named in sorted(model.named_parameters()) if not any(part in named[0] for part in adapter)]
    known: tuple[object, ...] | None = None
    if folder is not None and not with_adapter and _is_as_in_folder(model):
        shapes = tuple((name, parameter.dtype, parameter.shape) for name, parameter in weights)
        known = (state.digest(), shapes, _files(folder))
        if known in _KNOWN:
            return _KNOWN[known].copy()
    for name, parameter in weights:
        state.update(name.encode())
        state.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    if known is not None:
        _KNOWN[known] = state.copy()
    return state


def _is_as_in_folder(model: torch.nn.Module) -> bool:
    """Whether an adapter, if there is one, has left the weights of its base alone; PiSSA and others do not."""
    return all(getattr(one, "init_lora_weights", True) is True for one in getattr(model, "peft_config", {}).values())


def _files(folder: Path) -> tuple[object, ...]:
    """What tells the files of a folder from those that replace them: path, size, time and inode of each."""
    found = [(str(file), file.stat()) for file in sorted(folder.resolve().rglob("*")) if file.is_file()]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in found)
