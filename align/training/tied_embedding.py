"""The gradient of an embedding that is also the output head.

The lookup's gradient is zero but for the rows of a batch's tokens, and torch makes it as large as the vocabulary all
the same, to add it to the head's. As a sparse tensor it is added to the head's gradient row by row, in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator, DistributedType
from torch import nn

from align.models.layout import base_model


def tied_embedding(model: nn.Module, accelerator: Accelerator) -> nn.Embedding | None:
    """The embedding of a model whose rows may be added to the gradient of its head; None where that is not exact.

    It needs a plain embedding and a plain linear head that share one trained weight, on a CPU, in one process that does
    not shard it: launchers expect dense gradients.
    """
    if hasattr(model, "_orig_mod") or accelerator.distributed_type != DistributedType.NO:
        return None
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or embedding.scale_grad_by_freq:
        return None
    weight = embedding.weight
    shared = weight is head.weight and type(weight) is nn.Parameter and weight.requires_grad
    return embedding if shared and weight.device.type == "cpu" and embedding.max_norm is None else None


@contextmanager
def as_rows(embedding: nn.Embedding | None) -> Iterator[None]:
    """Let the lookups of the block give the rows of their gradient alone; None changes nothing."""
    if embedding is None:
        yield
        return
    before, embedding.sparse = embedding.sparse, True
    try:
        yield
    finally:
        embedding.sparse = before
