"""Loading a policy and its tokenizer from a folder or hub id."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import ModelError
from align.models.adapter_folders import base_loading
from align.models.adapters import merge_adapter
from align.models.folders import (
    check_model_folder,
    check_vocabulary,
    is_adapter,
    loading,
    refuse_new_weights,
    saved_vocabulary,
    vocabulary_rows,
)
from align.models.layout import base_model, has_adapter


def load_tokenizer(
    model: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder or hub id, with a padding token.

    Args:
        model: folder or hub id.
        trust_remote_code: whether code that comes with the model may run.
        revision: branch, tag or commit of a hub id; None: the newest.

    Raises:
        ModelError: there is no tokenizer, it does not fit the model, or it has no token for padding.
    """
    check_model_folder(model)
    with loading(model, "no tokenizer can be loaded"):
        at = {} if revision is None else {"revision": revision}
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, **at)
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
            policy = _load_adapter(model, trust_remote_code, trainable, kwargs)
            if trainable:
                _check_gradients(model, policy)
            return policy
        loaded, found = AutoModelForCausalLM.from_pretrained(
            model, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True, **kwargs
        )
    refuse_new_weights(model, loaded, found["missing_keys"], "a causal language model")
    return loaded


def _check_gradients(model: str, policy: nn.Module) -> None:
    """Refuse gradients through a base that bitsandbytes has quantized to 4 bits, on a CPU.

    After its first evaluation there it computes with kernels that pass back no gradient, without a word.
    """
    if getattr(base_model(policy), "is_loaded_in_4bit", False) and not torch.cuda.is_available():
        raise ModelError(
            f"{model}: its base is quantized to 4 bits, and bitsandbytes has no right gradients for it on a CPU",
            code="adapter",
            hint="use a machine with a GPU",
        )


def load_merged_policy(model: str, *, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A policy to sample from: ``load_policy``, its adapter merged into the base wherever that is exact.

    An adapter costs each sampled token more than once what it holds; one that cannot be merged stays as it is.

    Raises:
        ModelError: it cannot be loaded.
    """
    policy = load_policy(model, trust_remote_code=trust_remote_code, **kwargs)
    if not has_adapter(policy):
        return policy
    merged = merge_adapter(policy)
    if merged is not None:
        return merged
    return load_policy(model, trust_remote_code=trust_remote_code, **kwargs)


def _load_adapter(model: str, trust_remote_code: bool, trainable: bool, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A model with the adapter of a folder.

    Its base is quantized as in the adapter's training, and gets as many embeddings as the adapter was saved with.
    """
    from peft import PeftConfig, PeftModelForCausalLM

    config = PeftConfig.from_pretrained(model)
    kwargs = kwargs | base_loading(model)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"its adapter was trained for the task {config.task_type}, expected CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(
        config.base_model_name_or_path, trust_remote_code=trust_remote_code, use_safetensors=True,
        **({"revision": config.revision} | kwargs),
    )  # fmt: skip
    rows = saved_vocabulary(model)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's own rows replace the new ones
    return PeftModelForCausalLM.from_pretrained(base, model, config=config, is_trainable=trainable)


def place(model: nn.Module, device: torch.device | str) -> Any:
    """Move a model to a device; a quantized one stays where its loader has put it, since it may not be moved."""
    return model if getattr(base_model(model), "is_quantized", False) else model.to(device)
