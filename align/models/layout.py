"""Which layout a run uses, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from align.errors import ConfigError
from align.io.console import log
from align.models import attention
from align.models.logps import Layout, add_completion_head, pair_logps
from align.models.packing import packed_tokens

LayoutChoice = Literal["auto", "concatenated", "shared_prefix"]
EXACT_LAYERS = {"full_attention", "sliding_attention"}
TRIAL_TOKENS = 24
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Difference of log-probs per completion token (nats) that rounding explains; ``HALF_TOLERANCE`` for 16-bit models."""
HALF_TOLERANCE = 0.05
TRIAL_SCALE = 0.02
"""Standard deviation of the adapter weights in a trial."""


def choose_layout(model: torch.nn.Module, batch: dict[str, Any], choice: LayoutChoice) -> Layout:
    """The layout to train with; prepares ``model`` for it and says at INFO what was chosen and why.

    Args:
        model: causal language model, with its adapter if it has one, not yet wrapped by a launcher.
        batch: a sample of the data as ``PairCollator`` makes it.
        choice: ``auto`` takes ``shared_prefix`` wherever it is exact.

    Raises:
        ConfigError: ``shared_prefix`` is asked for and is not exact for this model.
    """
    base = base_model(model)
    add_completion_head(base)
    if choice == "concatenated":
        return "concatenated"
    reason = _refusal(model, base)
    if reason is None:
        whole = int(batch["attention_mask"].numel())
        packed = int(packed_tokens(batch).sum())
        log.info("layout: shared_prefix (%d tokens in place of %d in a sample of the data)", packed, whole)
        return "shared_prefix"
    if choice == "shared_prefix":
        raise ConfigError(
            f"train.layout: shared_prefix is not exact for this model: {reason}",
            code="layout",
            hint="set `layout: concatenated`, or `auto` to let the program choose",
        )
    log.info("layout: concatenated (%s)", reason)
    return "concatenated"


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if has_adapter(model) else model  # type: ignore[operator]


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether PEFT has wrapped the model; one that an adapter was merged into may keep its ``peft_config``."""
    return hasattr(model, "get_base_model")


def is_bypassed(model: torch.nn.Module) -> str | None:
    """Why the transformers model inside the adapter, called alone, is not the adapted model; None where it is.

    Adapters on layers act wherever these are called. One that adds tokens of its own, or chooses by the tokens of a
    row where to act, does so in the forward of the PEFT model around it.
    """
    for adapter in model.peft_config.values() if has_adapter(model) else ():  # type: ignore[operator]
        if adapter.is_prompt_learning:
            return "a prompt-learning adapter puts tokens of its own before each sequence"
        if getattr(adapter, "alora_invocation_tokens", None):
            return "an activated LoRA acts only after its invocation tokens, looked for in each row"
    return None


def _refusal(model: torch.nn.Module, base: PreTrainedModel) -> str | None:
    """Why packed pairs are not exact for this model, or None after a trial."""
    bypassed = is_bypassed(model)
    if bypassed is not None:
        return bypassed
    unknown = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - EXACT_LAYERS
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}, which see more than the tokens of their own row"
    original = base.config._attn_implementation
    try:
        attention.enable(base)
        difference = _trial(model)
    except Exception as error:
        reason = f"it does not run on packed pairs ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    else:
        if difference <= TOLERANCE.get(base.dtype, HALF_TOLERANCE):
            return None
        reason = f"in a trial its log-probs differ by {difference:.2g} nats a token from those of separate rows"
    base.set_attn_implementation(original)
    return reason


def _trial(model: torch.nn.Module) -> float:
    """Largest difference of a token's log-prob (nats) between the layouts, on two random pairs.

    The rules above cannot know every architecture; one that ignores position_ids, or keeps a state along the row,
    shows here.
    """
    device = next(model.parameters()).device
    vocabulary = base_model(model).get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (4, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[2:, : TRIAL_TOKENS // 2] = ids[:2, : TRIAL_TOKENS // 2]
    completion = (torch.arange(TRIAL_TOKENS) >= TRIAL_TOKENS // 3).long().expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    batch = {name: value.to(device) for name, value in batch.items()}
    training = model.training
    model.eval()
    with torch.no_grad(), _random_adapter(model):
        one, other = (pair_logps(model, batch, layout).tokens.logps for layout in get_args(Layout))
    model.train(training)
    return float((one - other).abs().max())


@contextmanager
def _random_adapter(model: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the trained parameters of an adapter that are 0, as before its first step, are random instead."""
    zero = [
        parameter
        for parameter in (model.parameters() if has_adapter(model) else ())
        if parameter.requires_grad and not parameter.detach().any()
    ]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zero:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * TRIAL_SCALE)
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


def trim(batch: dict[str, Any], pairs: torch.Tensor) -> dict[str, Any]:
    """Some pairs of a batch, without the columns that only padding is left in.

    Args:
        batch: as ``PairCollator`` makes it; tensors [2B, T] and [B].
        pairs: [b], indices of pairs.
    """
    half = batch["input_ids"].shape[0] // 2
    rows = torch.cat([pairs, pairs + half])
    width = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {name: value[rows][:, :width] if value.dim() == 2 else value[pairs] for name, value in batch.items()}
