"""Cache keys of reference log-probs."""

import hashlib
from collections.abc import Sequence

import torch
from datasets import Dataset

from align.config.columns import ID_COLUMNS, MASK_COLUMNS
from align.io.hashing import digest
from align.models.layout import base_model, has_adapter

NOT_OF_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Fields of a model's config on which no log-prob depends: its path, the version that wrote it, sampling."""


def reference_key(model: torch.nn.Module, dataset: Dataset, settings: Sequence[object], *, with_adapter: bool) -> str:
    """Hex digest (sha256) of the reference's weights and config, the token ids and ``settings``.

    Args:
        model: the reference, or a policy that serves as its own reference before the first step.
        dataset: table with ``ID_COLUMNS``.
        settings: everything else on which the log-probs depend.
        with_adapter: include the adapter's weights, because the adapter is part of the reference.
    """
    config = {name: value for name, value in base_model(model).config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    state = hashlib.sha256(repr([*settings, digest(config)]).encode())
    tuner = getattr(model, "base_model", None) if has_adapter(model) and not with_adapter else None
    adapter = () if tuner is None else (str(getattr(tuner, "prefix", "lora_")), "modules_to_save.")
    for name, parameter in sorted(model.named_parameters()):
        if not any(part in name for part in adapter):
            state.update(name.encode())
            state.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for column in (*ID_COLUMNS, *(name for name in MASK_COLUMNS if name in dataset.column_names)):
        for ids in dataset[column]:
            state.update(f"{column}{ids}".encode())
    return state.hexdigest()
