"""Cache keys of a model: what reference log-probs depend on."""

import hashlib
from collections.abc import Sequence

import torch
from datasets import Dataset

from align.config.columns import TOKEN_IDS
from align.io.hashing import digest
from align.models.layout import base_model, has_adapter

NOT_OF_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "use_cache"})
"""Fields of a config that no log-prob depends on: where it lies, who wrote it, how it samples."""


def reference_key(model: torch.nn.Module, dataset: Dataset, settings: Sequence[object], *, with_adapter: bool) -> str:
    """Hex digest of the reference's weights and config, the token ids and ``settings``.

    Args:
        model: the reference, or a policy that is its own before the first step.
        dataset: table with ``TOKEN_IDS``.
        settings: whatever else the log-probs come from.
        with_adapter: the adapter is part of the reference; else its weights are left out.
    """
    config = {name: value for name, value in base_model(model).config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    state = hashlib.sha256(repr([*settings, digest(config)]).encode())
    tuner = getattr(model, "base_model", None) if has_adapter(model) and not with_adapter else None
    adapter = () if tuner is None else (str(getattr(tuner, "prefix", "lora_")), "modules_to_save.")
    for name, parameter in sorted(model.named_parameters()):
        if not any(part in name for part in adapter):
            state.update(name.encode())
            state.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for column in TOKEN_IDS:
        for ids in dataset[column]:
            state.update(f"{column}{ids}".encode())
    return state.hexdigest()
