"""``train.reference``: a reference of the losses that is another model than the one that training starts from.

A stronger or earlier policy as the guide of a training (Pre-DPO, arXiv 2504.15843), another supervised model, the same
fixed model in every round of an iteration; an adapter's folder is the model with that adapter.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from align.config import TrainSection
from align.errors import ConfigError
from align.losses.registry import BoundLoss
from align.models.loading import load_policy, load_tokenizer

SHOWN = 3
"""Tokens that a message names."""


def check_reference(config: TrainSection, losses: Iterable[BoundLoss]) -> None:
    """Refuse a reference that is the start anyway, that no loss reads, or whose tokens have other ids.

    Only folders are read; ``load_given_reference`` checks a hub id.

    Args:
        config: section ``train``.
        losses: those of its methods.

    Raises:
        ConfigError: names what was found.
        ModelError: the folder is no model.
    """
    given = config.reference
    if given is None:
        return
    if _place(given) == _place(config.model):
        raise ConfigError(
            f"train.reference: found {given}, which is train.model: the model as it is before training is the "
            "reference anyway",
            code="train-reference",
            hint="leave it out",
        )
    names = [loss.spec.name for loss in losses]
    if not any(loss.spec.reads_reference for loss in losses):
        raise ConfigError(
            f"train.reference: found {given}, and no loss here reads a reference: {', '.join(names)}",
            code="train-reference",
            hint="leave it out",
        )
    if Path(given).is_dir() and Path(config.model).is_dir():
        _check_tokens(config)


def load_given_reference(config: TrainSection, loss: BoundLoss) -> nn.Module | None:
    """The section's reference, loaded; None if it names none, or where the loss reads no reference.

    It is loaded with ``model_init_kwargs``, as the policy is, in float32 unless they have a ``dtype``.

    Raises:
        ConfigError: its tokens have other ids than the policy's.
        ModelError: it cannot be loaded.
    """
    if config.reference is None or not loss.spec.reads_reference:
        return None
    _check_tokens(config)
    kwargs: dict[str, Any] = {"dtype": "float32"} | dict(config.trainer.get("model_init_kwargs") or {})
    trusted = bool(kwargs.pop("trust_remote_code", config.trusts_remote_code))
    reference: nn.Module = load_policy(config.reference, trust_remote_code=trusted, **kwargs)
    return reference.eval().requires_grad_(False)


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _check_tokens(config: TrainSection) -> None:
    """Refuse a reference that reads the policy's token ids as other tokens.

    Raises:
        ConfigError: names the first tokens that differ.
    """
    assert config.reference is not None
    own, other = (
        load_tokenizer(model, trust_remote_code=config.trusts_remote_code).get_vocab()
        for model in (config.model, config.reference)
    )
    different = sorted((token for token in own if other.get(token) != own[token]), key=lambda token: own[token])
    if not different:
        return
    shown = ", ".join(f"{token!r} is {own[token]} and {other.get(token, 'missing')}" for token in different[:SHOWN])
    raise ConfigError(
        f"train.reference: {config.reference}: {len(different)} of {len(own)} tokens of {config.model} have another id "
        f"there ({shown}): log-probs of the same ids would be those of other texts",
        code="train-reference",
        hint="take a reference with the policy's tokenizer",
    )
