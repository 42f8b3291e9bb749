"""Loading a policy and its tokenizer from a folder or hub id."""

import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import ModelError
from align.io.console import log
from align.models.adapter_folders import base_loading, is_quantized, saved_dtypes
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

SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


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
            _tell_of_outliers(model, policy)
            return policy
        loaded = _load_whole(model, trust_remote_code, kwargs)
    if trainable and _holds_adapter(loaded):
        raise ModelError(
            f"{model}: is an adapter on the hub, expected a folder to train or measure it",
            code="adapter",
            hint=f"download it: hf download {model} --local-dir FOLDER, and give that folder",
        )
    _tell_of_outliers(model, loaded)
    return loaded


def _load_whole(model: str, trust_remote_code: bool, kwargs: dict[str, Any]) -> Any:
    """A causal language model of which every weight is in its folder; the adapter of a hub id has its base's.

    Raises:
        ModelError: some weights would be drawn at random.
    """
    loaded, found = AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True, **kwargs
    )
    drawn = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
    refuse_new_weights(model, loaded, drawn, "a causal language model")
    return loaded


def _tell_of_outliers(model: str, policy: nn.Module) -> None:
    """Warn, once for each model, of a base in 8 bits whose log-probs depend on the other rows of a batch.

    bitsandbytes (LLM.int8, arXiv 2208.07339) multiplies a column of the inputs in 16 bits if any row of the batch has a
    value of at least ``llm_int8_threshold`` there, and in 8 bits otherwise; at 0 all columns are in 8 bits.
    """
    base: Any = base_model(policy)
    config = getattr(getattr(base, "hf_quantizer", None), "quantization_config", None)
    threshold = getattr(config, "llm_int8_threshold", 0.0)
    if getattr(base, "is_loaded_in_8bit", False) and threshold:
        _warn_of_outliers(model, float(threshold))


@functools.cache
def _warn_of_outliers(model: str, threshold: float) -> None:
    log.warning("%s: quantized to 8 bits with llm_int8_threshold %g: which columns are computed in 8 bits depends on "
                "all rows of a batch, so the log-probs of a token differ between batches (0.07 nats on a tiny model); "
                "with llm_int8_threshold: 0 in quantization_config they do not", model, threshold)  # fmt: skip


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
    if trainable and config.is_prompt_learning:
        raise ModelError(
            f"{model}: found an adapter of the kind {config.peft_type.value}, which puts tokens of its own before each "
            "sequence, expected one whose gradients are measured and trained",
            code="adapter",
            hint="sample and evaluate it as it is; to measure or to train it further, take another kind of adapter",
        )
    base = _load_base(model, config, trust_remote_code, kwargs)
    rows = saved_vocabulary(model)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)  # the adapter's own rows replace the new ones
    policy = PeftModelForCausalLM.from_pretrained(base, model, config=config, is_trainable=trainable)
    if is_quantized(model) or getattr(base, "is_quantized", False):
        _as_saved(policy, model)
    return policy


def _as_saved(policy: nn.Module, folder: str) -> None:
    """Give the low-rank updates of an adapter the dtype that they have in its folder, which is that of their training.

    peft widens them to float32, and an adapter on a quantized base is trained in bfloat16 (QLoRA, arXiv 2305.14314, as
    trl has it): what it adds to a layer was rounded. A layer of peft computes an update in the dtype of its weights.
    """
    dtypes = saved_dtypes(folder)
    for name, parameter in policy.named_parameters():
        dtype = dtypes.get(name.replace(".default", ""), "")
        if ".lora_" in name and dtype in SAFETENSORS_DTYPES:
            parameter.data = parameter.data.to(SAFETENSORS_DTYPES[dtype])


def _load_base(model: str, config: Any, trust_remote_code: bool, kwargs: dict[str, Any]) -> Any:
    """The base of an adapter; one that is an adapter itself is merged, since another of the same name would replace it.

    Raises:
        ModelError: the base is an adapter that cannot be merged exactly, or one on the hub.
    """
    name = str(config.base_model_name_or_path)
    if is_adapter(name):
        merged = load_merged_policy(name, trust_remote_code=trust_remote_code, **kwargs)
        if not has_adapter(merged):
            return merged
    else:
        base = _load_whole(name, trust_remote_code, {"revision": config.revision} | kwargs)
        if not _holds_adapter(base):
            return base
    raise ModelError(
        f"{model}: its base, {name}, is an adapter that cannot be merged here, expected a model",
        code="adapter",
        hint="load it in float32 without quantization, or merge that adapter into its base model and name the folder "
        "of the result as base_model_name_or_path in adapter_config.json",
    )


def _holds_adapter(model: Any) -> bool:
    """Whether transformers has put an adapter into a model that it has loaded, as it does for an adapter on the hub."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def place(model: nn.Module, device: torch.device | str) -> Any:
    """Move a model to a device; a quantized one stays where its loader has put it, since it may not be moved."""
    return model if getattr(base_model(model), "is_quantized", False) else model.to(device)
