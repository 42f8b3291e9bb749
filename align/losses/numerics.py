"""Precision of the losses."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or as they are where they are float64; half precision is too coarse for a loss."""
    return values if values.dtype == torch.float64 else values.float()
