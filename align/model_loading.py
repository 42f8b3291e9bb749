"""Loading a policy and its tokenizer from a folder or hub id."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import ModelError

ADAPTER = "adapter_config.json"


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder or hub id, with a padding token.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: no tokenizer can be loaded ({_first_line(error)})",
            code="model-load",
            hint="give a hub id or a folder with the model and its tokenizer",
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(model: str, **kwargs: Any) -> PreTrainedModel:
    """Causal language model of a folder (an adapter folder included) or hub id.

    Raises:
        ModelError: it cannot be loaded as one.
    """
    try:
        if (Path(model) / ADAPTER).exists():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(model, **kwargs)
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{model}: cannot be loaded as a causal language model ({_first_line(error)})",
            code="model-load",
            hint="give a hub id or a folder with config.json and safetensors weights",
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
