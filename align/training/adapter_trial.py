"""A new adapter is put on a model without weights when a run is checked, so that what peft refuses is found then."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from align.errors import ConfigError
from align.io.console import log
from align.training.base.arguments import build_lora

READ_WEIGHTS = ("mica",)
"""Starts of LoRA that read the weights of the base, of which there are none here."""
REFUSALS = (TypeError, ValueError, AttributeError, LookupError, ImportError)
"""What peft raises for fields that do not fit the model."""


def try_adapter(config: Any, fields: Mapping[str, Any]) -> None:
    """Put an adapter on a model of this configuration, on the device ``meta``; nothing is computed.

    Names that no module has are told: peft passes over them while others are found.

    Args:
        config: of the model that is trained.
        fields: ``train.peft``.

    Raises:
        ConfigError: peft refuses it, for example because no layer has a name among ``target_modules``, or a token
            that is trained is none of the model's.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    _check_token_indices(config.get_text_config().vocab_size, fields.get("trainable_token_indices"))
    start = fields.get("init_lora_weights", True)
    start = True if start in READ_WEIGHTS else start
    lora = build_lora({**fields, "init_lora_weights": start}, path="train.peft", task_type="CAUSAL_LM")
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except (ValueError, ImportError, NotImplementedError):
            return  # what cannot be made is refused with its reason when it is loaded
        names = [name for name, _ in model.named_modules()]
        try:
            get_peft_model(model, lora)
        except REFUSALS as error:
            raise ConfigError(
                f"train.peft: {' '.join(str(error).split())[:300] or type(error).__name__}",
                code="adapter",
                hint="see peft.LoraConfig; `target_modules: all-linear` takes all linear layers but the head",
            ) from error
    _tell_unmatched(names, fields)


def _tell_unmatched(modules: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Warn of names and patterns among the fields of an adapter that no module of the model has."""
    for field in ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        given = fields.get(field) or ()
        for wanted in () if isinstance(given, str) else given:
            if not any(re.fullmatch(rf"(.*\.)?({wanted})", name) for name in modules):
                log.warning("train.peft.%s: no module of the model is called %s, which is passed over", field, wanted)


def _check_token_indices(vocabulary: int, given: Any) -> None:
    """Refuse trained tokens that the model does not have; peft raises an IndexError, or takes -1 for the last one."""
    groups = list(given.values()) if isinstance(given, Mapping) else [] if given is None else [given]
    wrong = [group for group in groups if not isinstance(group, list | tuple)] or [
        token for group in groups for token in group if not (type(token) is int and 0 <= token < vocabulary)
    ]
    if wrong:
        raise ConfigError(
            f"train.peft.trainable_token_indices: found {wrong[0]!r}, expected a list of ids from 0 to "
            f"{vocabulary - 1}",
            code="adapter",
            hint="leave it out, or give ids of the tokenizer's tokens",
        )
