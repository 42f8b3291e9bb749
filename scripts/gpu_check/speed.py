"""Throughput and memory of a training step, next to trl's trainer with and without its fused head and Liger."""

from functools import partial
from statistics import median
from typing import Any

import torch
from transformers.utils import is_liger_kernel_available

from scripts.gpu_check.cases import Case, NotHere, Settings, need
from scripts.gpu_check.training import KINDS, train

WARM_UP = 2
"""Steps that are not timed."""


def cases() -> dict[str, Case]:
    """Name -> case."""
    return {f"speed of {kind}": partial(_speed, kind=kind) for kind in KINDS}


def _speed(settings: Settings, *, kind: str) -> dict[str, Any]:
    if kind.endswith("Liger"):
        need(is_liger_kernel_available(), "the package liger-kernel is not installed")
        need(settings.gpu, "Liger's kernels need a GPU")
    try:
        run = train(kind, settings, steps=WARM_UP + settings.steps, bf16=True, lora=settings.lora)
    except torch.OutOfMemoryError:
        raise NotHere(f"out of memory at {settings.pairs} pairs a step") from None
    seconds = run.seconds[WARM_UP:]
    return {
        "tokens a step": run.tokens, "seconds": median(seconds), "slowest": max(seconds),
        "tokens a second": run.tokens / median(seconds), "peak GiB": run.peak_gib,
    }  # fmt: skip
