"""Adapters of reward models: merged into their bases, with the head that the adapter or the base has."""

from collections import Counter
from typing import Any

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel

from align.errors import ModelError
from align.models.folders import IN_ADAPTER
from reward_models.weights import NOT_READ, FoundWeights, listed_names

TRIAL_TOKENS = 8
"""Tokens of the text on which an adapter and the model it is merged into are compared."""
HALF = (torch.bfloat16, torch.float16)
SAME = 1e-2
"""Difference of rewards that rounding explains, relative to 1 + |reward|."""


def merged(
    name: str, base: PreTrainedModel, config: PeftConfig, found: FoundWeights, **at: Any
) -> tuple[PreTrainedModel, FoundWeights]:
    """The base with the adapter merged into it, and what became of the weights of both.

    The adapter of a policy fits too, where it was trained on the same backbone; it brings no head.

    Args:
        name: folder or hub id of the adapter.
        base: model that ``config`` names.
        config: of the adapter.
        found: what became of the weights of the base.
        at: ``revision`` of a hub id.

    Raises:
        ModelError: the adapter is no change of weights (a prompt), its weights and those of the model differ, or the
            base is in 16 bits and has an adapter itself.
    """
    if config.is_prompt_learning:
        raise ModelError(
            f"{name}: is an adapter of the kind {config.peft_type}, which cannot be merged, expected one that "
            "changes weights, such as LoRA",
            code="model-load",
            hint="give a model folder, or train a LoRA adapter",
        )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ModelError(
            f"{name}: is an adapter on an adapter ({config.base_model_name_or_path}), which is not merged in 16 bits, "
            "expected dtype float32",
            code="model-load",
            hint="give --dtype float32, or merge the first adapter into its base and save that",
        )
    weights = load_peft_weights(name, device="cpu", **at)
    _resize(base, weights)
    if config.task_type != TaskType.SEQ_CLS:
        config.task_type = None  # a policy's: a classifier has nothing of what that class asks of a model
    kind = PeftModel if config.task_type is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
    whole = {name for name, _ in base.named_parameters()}
    wrapped = kind(base, config)
    saved = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    loaded = set_peft_model_state_dict(wrapped, weights)
    given = Counter(map(_parameter, weights))  # peft writes the embedding of added tokens twice
    new = [key for key in saved if key not in weights and _parameter(key) not in whole]
    unread = [
        key for key in loaded.unexpected_keys if given[_parameter(key)] == 1 and not NOT_READ.search(_parameter(key))
    ]
    if new or unread:
        what = f"lacks {listed_names(new)}" if new else f"has {listed_names(unread)}, which the model does not read"
        raise ModelError(
            f"{name}: the adapter {what}, expected the weights that its configuration names",
            code="model-load",
            hint="give the base model that the adapter was trained on, and copy the adapter again",
        )
    made = _merged(name, wrapped, config)
    for parameter in made.parameters():
        parameter.requires_grad_(True)  # peft freezes its base
    return made, found.adapted(given)


def _merged(name: str, wrapped: Any, config: PeftConfig) -> PreTrainedModel:
    """The base of a model with an adapter, with the adapter merged; a trial shows whether they are the same.

    In 16 bits the adapter stays beside the weights of the base: rounding their sum can lose an update whole.

    Raises:
        ModelError: the merged model would give other rewards, such as where several layers share a weight of the base.
    """
    repeats = getattr(config, "layer_replication", None) is not None
    if wrapped.dtype in HALF and not repeats:
        beside: PreTrainedModel = wrapped.get_base_model()
        return beside
    expected = _trial(wrapped.eval().float())
    made: PreTrainedModel = wrapped.merge_and_unload()
    difference = float((_trial(made) - expected).abs().max())
    if repeats or not difference <= SAME * (1 + float(expected.abs().max())):
        reason = "layer_replication repeats layers of the base, which share" if repeats else "its merging changes"
        raise ModelError(
            f"{name}: its adapter cannot be merged into its base ({reason} weights so that rewards differ by "
            f"{difference:.2g}), expected one whose merged model gives the same rewards",
            code="model-load",
            hint="give a model folder, or train an adapter that merges, such as LoRA",
        )
    return made


@torch.no_grad()
def _trial(model: Any) -> torch.Tensor:
    """What a model gives one row of random token ids."""
    count = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(count, (1, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.double()


def _parameter(key: str) -> str:
    """The parameter of the base that a weight of the adapter's file stands for, or is added to."""
    for part in (".modules_to_save", ".default"):
        key = key.replace(part, "")
    return key.removeprefix(IN_ADAPTER)


def _resize(base: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Give the base as many tokens as the adapter's embedding has, where the file has an embedding."""
    embedding = base.get_input_embeddings()
    place = next(name for name, module in base.named_modules() if module is embedding)
    rows = next((len(value) for key, value in weights.items() if _parameter(key) == f"{place}.weight"), None)
    if rows is not None and rows != embedding.weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
