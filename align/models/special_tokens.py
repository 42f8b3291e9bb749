"""The special tokens that a tokenizer puts around every text."""

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from align.models.folders import adapter_base

PROBE = "a"
"""Text that shows which tokens a tokenizer adds before and after any text."""


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the tokens that the tokenizer adds before and after every text."""
    whole = list(tokenizer(PROBE)["input_ids"])
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    starts = (k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare)
    start = next(starts, None) if bare else None
    return (whole, []) if start is None else (whole[:start], whole[start + len(bare) :])


def of_encoder(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer frames each text in tokens that a classifier reads, ``[CLS]`` and ``[SEP]``.

    The architecture of the model that lies with the tokenizer decides (``is_encoder``), because a decoder's tokenizer
    may also name a ``cls_token`` and add it. Where no model is known, the tokenizer decides: that of an encoder puts
    its ``cls_token`` around each text, it is no end, and where it is the beginning as well (RoBERTa), a ``sep_token``
    goes with it.
    """
    cls = tokenizer.cls_token_id
    if cls is None:
        return False
    added = [token for side in added_tokens(tokenizer) for token in side]
    known = is_encoder(tokenizer.name_or_path)
    if cls not in added or known is not None:
        return bool(known) and cls in added
    return cls != tokenizer.eos_token_id and (cls != tokenizer.bos_token_id or tokenizer.sep_token_id in added)


def is_encoder(model: str) -> bool | None:
    """Whether a model folder or hub id is of an encoder's architecture, one that masked tokens are predicted with.

    An adapter is what its base is.

    Returns:
        None where neither that nor a decoder's architecture is known: there is no configuration on this machine, or the
        model comes with its own code.
    """
    model = adapter_base(model) or model
    if not model:
        return None
    try:
        found, _ = PretrainedConfig.get_config_dict(model, local_files_only=True)
    except (OSError, ValueError):
        return None
    kind = found.get("model_type")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return True
    return False if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None
