"""Exactness: both layouts under every attention kernel, DPO against trl's own trainer."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from align.errors import ConfigError
from align.models.layout import choose_layout
from align.models.loading import load_policy, load_tokenizer
from align.models.logps import pair_logps
from align.models.tokenization import collate, tokenize_pairs
from scripts.gpu_check.cases import Case, NotHere, Settings, judge, need
from scripts.gpu_check.training import pairs, train

LAYOUTS = ("concatenated", "shared_prefix")
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
EXACT = 1e-3
"""Largest relative error of float32, of a response's log-prob and of the gradient."""
ROUNDINGS = 4.0
"""How many times the rounding error of the plain bfloat16 model (eager, row by row) another kernel's may be."""


def cases() -> dict[str, Case]:
    """Name -> case."""
    found: dict[str, Case] = {}
    for layout in LAYOUTS:
        found[f"float32 {layout} sdpa"] = partial(_float32, layout=layout)
        for kernel in KERNELS:
            found[f"bfloat16 {layout} {kernel}"] = partial(_bfloat16, layout=layout, kernel=kernel)
    for layout in LAYOUTS:
        found[f"DPO as trl, float32 {layout}"] = partial(_as_trl, layout=layout, bf16=False)
        found[f"DPO as trl, bf16 {layout}"] = partial(_as_trl, layout=layout, bf16=True)
    return found


def missing(kernel: str, gpu: bool) -> str | None:
    """What a kernel needs and this machine does not have."""
    if kernel.startswith("fl") and not gpu:
        return f"{kernel} needs a GPU"
    if kernel == "flash_attention_2" and not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if kernel == "flash_attention_3" and not is_flash_attn_3_available():
        return "the package flash-attn-3 is not installed"
    if kernel == "flex_attention" and find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _float32(settings: Settings, *, layout: str) -> dict[str, Any]:
    truth = _measured(settings, "concatenated", "eager", torch.float32)
    found = _measured(settings, layout, "sdpa", torch.float32)
    return judge(_errors(found, truth), {"logps": EXACT, "gradient": EXACT})


def _bfloat16(settings: Settings, *, layout: str, kernel: str) -> dict[str, Any]:
    reason = missing(kernel, settings.gpu)
    need(reason is None, reason or "")
    truth = _measured(settings, "concatenated", "eager", torch.float32)
    plain = _errors(_measured(settings, "concatenated", "eager", torch.bfloat16), truth)
    errors = _errors(_measured(settings, layout, kernel, torch.bfloat16), truth)
    limits = {name: ROUNDINGS * value + EXACT for name, value in plain.items()}
    return judge(errors | {"plain bfloat16": plain}, limits)


def _errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest relative error of a response's log-prob, and relative error of the gradient."""
    (logps, gradient), (right, slope) = found, truth
    return {
        "logps": float(((logps - right).abs() / right.abs()).max()),
        "gradient": float((gradient - slope).norm() / slope.norm()),
    }


def _measured(settings: Settings, layout: str, kernel: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs of all responses [2B], and the gradient of DPO's loss over three matrices of the model, float64."""
    device = torch.device("cuda" if settings.gpu else "cpu")
    model = load_policy(settings.model, dtype=dtype, attn_implementation=kernel).to(device).eval()
    tokenizer = load_tokenizer(settings.model)
    table = pairs(settings.pairs, settings.prompt, settings.completion)
    table = table.add_column("id", [str(k) for k in range(len(table))])
    batch = collate(tokenize_pairs(table, tokenizer, max_length=4096), tokenizer.pad_token_id, max_length=4096)
    batch = {name: value.to(device) for name, value in batch.items()}
    try:
        choose_layout(model, batch, layout)  # type: ignore[arg-type]
    except ConfigError as error:
        raise NotHere(f"{layout} is not offered here: {str(error).splitlines()[0]}") from None
    logps = pair_logps(model, batch, layout)  # type: ignore[arg-type]
    gap = (logps.chosen.float() - logps.rejected.float()) - (logps.chosen - logps.rejected).detach().float()
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    chosen = [matrices[k] for k in (0, len(matrices) // 2, -1)]
    slopes = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.1 * gap).mean(), chosen)
    both = torch.cat([logps.chosen, logps.rejected]).detach().double().cpu()
    return both, torch.cat([slope.double().flatten().cpu() for slope in slopes])


def _as_trl(settings: Settings, *, layout: str, bf16: bool) -> dict[str, Any]:
    """Three steps of DPO under trl's trainer and under this one, on the same pairs."""
    own, other = (
        train(kind, settings, steps=3, bf16=bf16, rate=1e-4) for kind in (layout, "trl")
    )  # fmt: skip
    numbers = {
        "loss": max(abs(a - b) for a, b in zip(own.losses, other.losses, strict=True)),
        "norm": max(abs(a / b - 1) for a, b in zip(own.norms, other.norms, strict=True)),
        "losses": {"trl": other.losses, layout: own.losses},
    }
    moved = abs(other.losses[-1] - other.losses[0])
    return judge(numbers | {"moved": moved}, {"loss": 0.02 if bf16 else EXACT, "norm": 0.05 if bf16 else EXACT})
