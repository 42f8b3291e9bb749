"""The longest sequence that a model has positions for."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from align.errors import DataError
from align.io.console import log

LEARNED = ("wpe", "embed_positions", "position_embeddings", "position_embedding", "position_embed")
"""Attribute names of embeddings of absolute positions in transformers' models."""
_WARNED: set[str] = set()


def learned_positions(model: PreTrainedModel) -> int | None:
    """Number of positions of a model with learned absolute positions (GPT-2, OPT, ...); None for any other model.

    Beyond it the look-up fails: with an IndexError on a CPU, with an assertion that ends the process on a GPU.
    Positions of patches, in the vision part of a model that reads images too, are none of its text.
    """
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in LEARNED:
            return int(module.num_embeddings - getattr(module, "offset", 0))
    return None


def context_window(model: PreTrainedModel) -> int | None:
    """Tokens that a sequence may have, prompt and completion together; None if the model sets no limit that is sure.

    It is the number of learned positions, or ``max_position_embeddings`` unless rotary positions are scaled, where
    configurations disagree on whether it is the length before or after scaling.

    Args:
        model: not wrapped by an adapter.
    """
    config = model.config.get_text_config()
    learned = learned_positions(model)
    made_for = None if _scales_positions(config) else getattr(config, "max_position_embeddings", None)
    return learned if learned is not None or not isinstance(made_for, int) or made_for < 1 else made_for


def _scales_positions(config: Any) -> bool:
    """Whether rotary positions are scaled, in all layers or in those of one type."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [part for part in (found, *found.values()) if isinstance(part, Mapping)]
    return any((part.get("rope_type") or part.get("type") or "default") != "default" for part in parts)


def check_padding(limit: int | None, longest: int, multiple: int | None) -> None:
    """Refuse rows that padding makes longer than the learned positions of a model.

    Args:
        limit: ``learned_positions``.
        longest: tokens of the longest row.
        multiple: trl's ``pad_to_multiple_of``.

    Raises:
        DataError: see above.
    """
    padded = -(-longest // multiple) * multiple if multiple else longest
    if limit is not None and padded > limit:
        raise DataError(
            f"train.trainer.pad_to_multiple_of: found {multiple}, with which a row of {longest} tokens gets {padded}, "
            f"expected at most {limit}: the model has no more positions",
            code="positions",
            hint="leave it out, or lower train.trainer.max_length",
        )


def check_positions(model: PreTrainedModel, longest: int, what: str, hint: str) -> None:
    """Refuse sequences that a model has no positions for; warn once about those beyond what it was trained on.

    Args:
        model: not wrapped by an adapter.
        longest: tokens of the longest sequence, sampled ones included.
        what: names the sequence, for messages.
        hint: what to do.

    Raises:
        DataError: the model has learned absolute positions, and fewer than ``longest``.
    """
    limit = learned_positions(model)
    if limit is not None and longest > limit:
        raise DataError(
            f"{what}: found {longest} tokens, expected at most {limit}: {type(model).__name__} has no more positions",
            code="positions",
            hint=hint,
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    name = model.name_or_path or type(model).__name__
    if limit is None and isinstance(trained, int) and longest > trained and name not in _WARNED:
        _WARNED.add(name)
        log.warning("%s: %s has %d tokens, and the model was made for %d (max_position_embeddings): what it computes "
                    "beyond is not reliable", name, what, longest, trained)  # fmt: skip
