"""Choice of the layout in which log-probs are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from align.config.columns import ID_COLUMNS
from align.errors import ConfigError, ModelError
from align.io.console import log
from align.models import attention
from align.models.logps import Layout, add_completion_head, pair_logps
from align.models.packing import packed_tokens

LayoutChoice = Literal["auto", "concatenated", "shared_prefix"]
EXACT_LAYERS = {"full_attention", "sliding_attention"}
TRIAL_TOKENS = 24
TRIAL_NOISE = 0.02
"""Standard deviation of the trial's values for adapter weights that start at 0."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference per token (nats) between layouts due to rounding; ``HALF_TOLERANCE`` for 16-bit models."""
HALF_TOLERANCE = 0.05
TRIAL_SCALE = 0.02
"""Standard deviation of the adapter weights in a trial."""


def choose_layout(
    model: torch.nn.Module,
    batch: dict[str, Any],
    choice: LayoutChoice,
    *,
    longest: int | None = None,
    training: bool = False,
) -> Layout:
    """Choose the layout to train with, prepare ``model`` for it, and log the choice with its reason.

    Args:
        model: causal language model, with its adapter if it has one, not yet wrapped by a launcher.
        batch: a sample of the data, from ``PairCollator``.
        choice: ``auto`` takes ``shared_prefix`` if it is exact for the model.
        longest: tokens of the longest sequence of the data, so that a window which only long rows exceed is found;
            default: that of ``batch``.
        training: the model will be trained, so it must not draw noise (dropout) in training mode: only
            ``concatenated`` draws it for each row, as trl does.

    Raises:
        ConfigError: ``choice`` is ``shared_prefix``, which is not exact for this model.
    """
    base = base_model(model)
    add_completion_head(base)
    if choice == "concatenated":
        return "concatenated"
    reason = _refusal(model, base, longest or int(batch["attention_mask"].shape[1]), training)
    if reason is None:
        padded = int(batch["attention_mask"].numel())
        packed = int(packed_tokens(batch).sum())
        log.info("layout: shared_prefix (%d tokens in place of %d in a sample of the data)", packed, padded)
        return "shared_prefix"
    if choice == "shared_prefix":
        raise ConfigError(
            f"train.layout: shared_prefix is not exact for this model: {reason}",
            code="layout",
            hint="set `layout: concatenated`, or `auto` to let the program choose",
        )
    log.info("layout: concatenated (%s)", reason)
    return "concatenated"


def longest_sequence(dataset: Dataset, max_length: int | None) -> int:
    """Tokens of the longest sequence of a table with ``ID_COLUMNS``, at most ``max_length``."""
    prompt, chosen, rejected = (pc.list_value_length(dataset.data.column(name)) for name in ID_COLUMNS)
    longest = int(pc.max(pc.add(prompt, pc.max_element_wise(chosen, rejected))).as_py())
    return longest if max_length is None else min(longest, max_length)


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model and inside ``torch.compile``; any other model itself.

    Raises:
        ModelError: the adapter keeps the forward that the model had when it was added (adaption prompts), so nothing
            can be measured through it.
    """
    plain: Any = getattr(model, "_orig_mod", model)
    if not has_adapter(plain):
        return plain
    base: PreTrainedModel = plain.get_base_model()
    tuner: Any = plain.base_model
    if tuner is not base and "forward" in vars(tuner):
        raise ModelError(
            f"adapter of the kind {next(iter(plain.peft_config.values())).peft_type.value}: it calls the forward that "
            "the model had before it, expected one that calls the model's own",
            code="adapter",
            hint="use another kind of adapter, such as LoRA",
        )
    return base


def has_adapter(model: torch.nn.Module) -> bool:
    """Whether the model is a PEFT model. ``peft_config`` does not tell: a model keeps it after merging an adapter."""
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


def _refusal(model: torch.nn.Module, base: PreTrainedModel, longest: int, training: bool) -> str | None:
    """Why packed pairs are not exact for this model; None if a trial finds them exact."""
    bypassed = is_bypassed(model)
    if bypassed is not None:
        return bypassed
    unknown = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - EXACT_LAYERS
    if unknown:
        return f"it has layers of type {', '.join(sorted(unknown))}, which see more than the tokens of their own row"
    original = base.config._attn_implementation
    try:
        attention.enable(base)
        reason = _trials(model, base, longest) or (_noise(model, base) if training else None)
    except Exception as error:
        reason = f"it does not run on packed pairs ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    if reason is not None:
        base.set_attn_implementation(original)
    return reason


def _trials(model: torch.nn.Module, base: PreTrainedModel, longest: int) -> str | None:
    """Compare the layouts on random pairs; return why they are not the same, or None.

    Finds what the rules of ``_refusal`` miss: positions that are ignored, a state that is carried along, a window or
    chunk that stands only in the model's own mask, an adapter that looks at its row.
    """
    batches = [_random_pairs(model, base, pairs=2, tokens=TRIAL_TOKENS)]
    if longest > TRIAL_TOKENS:
        batches.append(_random_pairs(model, base, pairs=1, tokens=longest))
    with torch.no_grad(), _mode(model, training=False), _adapter_at_work(model):
        differences = [_difference(model, batch, *get_args(Layout)) for batch in batches]
    for difference in differences:
        if not difference <= TOLERANCE.get(base.dtype, HALF_TOLERANCE):  # nor is NaN
            return f"in a trial its log-probs differ by {difference:.2g} nats a token from those of separate rows"
    return None


def _noise(model: torch.nn.Module, base: PreTrainedModel) -> str | None:
    """Return why packed pairs would draw other noise than separate rows; None if two passes in training mode agree."""
    batch = _random_pairs(model, base, pairs=2, tokens=TRIAL_TOKENS)
    device = batch["input_ids"].device
    with (
        torch.no_grad(),
        _mode(model, training=True),
        _adapter_at_work(model),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        drawn = _difference(model, batch, "concatenated", "concatenated")
    if drawn > 0:
        return "it draws noise in training, such as dropout, and both responses would share that of their prompt"
    return None


def _difference(model: torch.nn.Module, batch: dict[str, Any], *layouts: Layout) -> float:
    """Largest difference of a token's log-prob (nats) between two forward passes."""
    one, other = (pair_logps(model, batch, layout).tokens.logps for layout in layouts)
    return float((one - other).abs().max())


def _random_pairs(model: torch.nn.Module, base: PreTrainedModel, *, pairs: int, tokens: int) -> dict[str, Any]:
    """Batch of random pairs whose rows share their first half and end with a scored completion.

    Only the last ``2 * TRIAL_TOKENS // 3`` tokens of a row are scored: what a window or a chunk hides is farthest from
    them, and rounding in 16 bits stays that of a short row.
    """
    device = next(model.parameters()).device
    vocabulary = base.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2 * pairs, tokens), generator=torch.Generator().manual_seed(0))
    shared = max(tokens // 2, tokens - TRIAL_TOKENS // 2)
    ids[pairs:, :shared] = ids[:pairs, :shared]
    completion = (torch.arange(tokens) >= tokens - 2 * TRIAL_TOKENS // 3).long().expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def _mode(model: torch.nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode for a while."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextmanager
def _adapter_at_work(model: torch.nn.Module) -> Iterator[None]:
    """Give weights of an adapter that start at 0, so that it does nothing yet, random values for a while."""
    trained = [p for p in model.parameters() if p.requires_grad] if has_adapter(model) else []
    still = [p for p in trained if p.numel() and p.is_floating_point() and not p.any()]
    generator = torch.Generator().manual_seed(0)
    for parameter in still:
        values = torch.randn(parameter.shape, generator=generator) * TRIAL_NOISE
        parameter.data.copy_(values)
    try:
        yield
    finally:
        for parameter in still:
            parameter.data.zero_()


def trim(batch: dict[str, Any], pairs: torch.Tensor) -> dict[str, Any]:
    """Some pairs of a batch, without the columns that then hold only padding.

    Args:
        batch: from ``PairCollator``; tensors [2B, T] and [B].
        pairs: int64 [b], indices of pairs.
    """
    half = batch["input_ids"].shape[0] // 2
    rows = torch.cat([pairs, pairs + half])
    width = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {name: value[rows][:, :width] if value.dim() == 2 else value[pairs] for name, value in batch.items()}
