"""Pairs for which no gradient says all that a step does: their tokens hold the padding token of a tied model.

torch gives the look-up of an embedding's ``padding_idx`` no gradient. Where the output layer has the same weights, its
own gradient moves that row all the same, and with it every text that holds the token. Templates whose end of turn is
the padding token (ChatML with ``<|im_end|>`` as both) put it into every prompt.
"""

from typing import Any

from datasets import Dataset
from torch import nn

from align.config.columns import ID_COLUMNS
from align.io.console import log
from align.models.layout import base_model


def padding_row(policy: nn.Module) -> int | None:
    """Id of the padding token whose row a step moves by the output layer alone; None if there is none.

    It is there if the input embedding has a ``padding_idx``, and its weights are trained and those of the output layer.
    """
    model = base_model(policy)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    padding: int | None = getattr(embedding, "padding_idx", None)
    weight: Any = getattr(embedding, "weight", None)
    tied = weight is not None and getattr(head, "weight", None) is weight
    return padding if padding is not None and tied and weight.requires_grad else None


def report_padding_lookups(policy: nn.Module, tokens: Dataset) -> int:
    """Number of pairs that hold the token of ``padding_row``, with a warning if there are any.

    Args:
        policy: the measured model.
        tokens: table with ``ID_COLUMNS``.
    """
    padding = padding_row(policy)
    if padding is None:
        return 0
    count = sum(any(padding in ids for ids in row) for row in zip(*(tokens[name] for name in ID_COLUMNS), strict=True))
    if count:
        log.warning(
            "%d of %d pairs hold token %d, the padding token of a model with tied embeddings: gradients leave its "
            "look-ups out, and a step of a full training moves its row by the output layer, so what such a step does "
            "to these pairs is foretold without that part; adapters that leave the embedding alone are not concerned",
            count, len(tokens), padding,
        )  # fmt: skip
    return count
