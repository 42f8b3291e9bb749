"""Loading a policy and its tokenizer from a folder or hub id."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import ModelError
from align.models.folders import (
    check_model_folder,
    check_vocabulary,
    is_adapter,
    loading,
    refuse_new_weights,
    vocabulary_rows,
)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder or hub id, with a padding token.

    Raises:
        ModelError: there is no tokenizer, it does not fit the model, or it has no token for padding.
    """
    check_model_folder(model)
    with loading(model, "no tokenizer can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    rows = vocabulary_rows(model)
    if rows is not None:
        check_vocabulary(model, len(tokenizer), rows)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ModelError(
            f"{model}: the tokenizer has neither a padding nor an end-of-sequence token, expected one of them",
            code="model-tokenizer",
            hint="name it in tokenizer_config.json (eos_token), or take the tokenizer that belongs to the model",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    model: str, *, trust_remote_code: bool = False, trainable: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Causal language model of a folder (also an adapter's) or hub id; reads safetensors only.

    Args:
        model: folder or hub id.
        trust_remote_code: whether code that comes with the model may run.
        trainable: whether an adapter's weights require gradients; those of a model without adapter always do.
        kwargs: passed to ``from_pretrained``.

    Raises:
        ModelError: it cannot be loaded as a causal language model.
    """
    check_model_folder(model, tokenizer=False)
    with loading(model, "cannot be loaded as a causal language model"):
        if is_adapter(model):
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(
                model, trust_remote_code=trust_remote_code, is_trainable=trainable, **kwargs
            )
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True, **kwargs
        )
    refuse_new_weights(model, loaded, found["missing_keys"], "a causal language model")
    return loaded
