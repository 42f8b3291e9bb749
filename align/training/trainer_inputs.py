"""What is given to a PreferenceTrainer besides tables: a model by its name, a collator, a tokenizer."""

import copy
import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id

from align.distributed import world_size
from align.errors import FROM_YAML, ConfigError
from align.io.files import read_json, write_json
from align.models.adapter_folders import QUANTIZATION
from align.models.adapters import quantization_of
from align.models.folders import ADAPTER, adapter_base, is_adapter
from align.models.layout import has_adapter
from align.models.loading import load_policy, load_tokenizer
from align.training.model_arguments import check_values
from align.training.settings import launched

IGNORED_KWARGS = "The `model_init_kwargs` will be ignored."
"""trl's warning about a model that is loaded already; ``load_named`` has applied them."""
MODULE_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
"""Keys of an adapter's config that peft keeps as sets."""


def check_kinds(model: Any, args: Any, ref_model: Any = None, peft_config: Any = None) -> None:
    """Refuse a model, arguments, a reference or an adapter of another kind.

    Raises:
        ConfigError: names the argument and what it is.
    """
    if not isinstance(model, str) and not hasattr(model, "config"):
        raise ConfigError(
            f"model: found {type(model).__name__}, expected a folder, a hub id or a causal language model",
            code="trainer-key",
        )
    if args is not None and not isinstance(args, DPOConfig):
        raise ConfigError(
            f"args: found {type(args).__name__}, expected align.PreferenceConfig or trl.DPOConfig", code="trainer-key"
        )
    if ref_model is not None and not isinstance(ref_model, nn.Module):
        raise ConfigError(
            f"ref_model: found {type(ref_model).__name__}, expected a loaded model, or None for the model as it is now",
            code="trainer-key",
            hint="the second argument is ref_model, as in trl: write args=...; load a reference with from_pretrained",
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config: found {type(peft_config).__name__}, expected a peft.PeftConfig, such as peft.LoraConfig",
            code="trainer-key",
        )
    if peft_config is not None and starts_as_adapter(model):
        raise ConfigError(
            "peft_config: found one, and a model that is an adapter already, expected one of them",
            code="trainer-key",
            hint="leave peft_config out to train the adapter further, or merge it into its base first",
        )


def reference_of(model: Any, args: DPOConfig, peft_config: Any) -> nn.Module | None:
    """A copy of a loaded model as it is now, where a second model in memory is the reference.

    trl reads the folder that the model was loaded from again, which is another model if its weights were changed since.
    With an adapter, and with precomputed log-probs, the model itself is the reference, and None is returned; so it is
    for a model of which each process of DeepSpeed holds a part, which cannot be copied.

    Args:
        model: the policy before training.
        args: ``precompute_ref_log_probs`` of DPOConfig.
        peft_config: adapter to train, or None.
    """
    parted = any(hasattr(weight, "ds_id") for weight in model.parameters())
    if peft_config is not None or has_adapter(model) or args.precompute_ref_log_probs or parted:
        return None
    return copy.deepcopy(model).eval().requires_grad_(False)


def check_tokenizer_found(model: Any) -> None:
    """Refuse a model without a name from which its tokenizer could be loaded.

    Raises:
        ConfigError: it was made from a config.
    """
    if not get_config_model_id(model.config):
        raise ConfigError(
            "processing_class: found None, and the model was loaded from no folder that has a tokenizer",
            code="trainer-key",
            hint="give its tokenizer: processing_class=AutoTokenizer.from_pretrained(...)",
        )


def default_output(model: Any, loss: Any) -> str:
    """``output_dir`` where no arguments are given: trl's, with the name of the loss."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return f"{name.split('/')[-1]}-{loss.upper() if isinstance(loss, str) else 'DPO'}"


def check_stream(args: TrainingArguments) -> None:
    """Refuse a stream of pairs where it is not known how many of them are trained on.

    Raises:
        ConfigError: no ``max_steps``, or an order of its own.
    """
    if getattr(args, "group_by_prompt", False):
        raise ConfigError(
            "PreferenceConfig.group_by_prompt: found it together with an IterableDataset, whose pairs are trained on "
            "in their order",
            code="trainer-key",
            hint="leave it out, or make a datasets.Dataset of the stream",
        )
    if args.max_steps <= 0:
        raise ConfigError(
            f"train_dataset: found an IterableDataset and max_steps {args.max_steps}, expected more than 0: the first "
            "pairs of the stream that fill so many steps are trained on, in their order",
            code="data-type",
            hint=f"set {type(args).__name__}.max_steps, or make a datasets.Dataset of it",
        )


def streamed_pairs(args: TrainingArguments) -> int:
    """Pairs of a stream that the steps of a training take, over all processes."""
    return int(args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * world_size())


def starts_as_adapter(model: Any) -> bool:
    """Whether the model, or the folder of this name, holds an adapter."""
    return is_adapter(model) if isinstance(model, str) else has_adapter(model)


def load_named(
    model: str, args: DPOConfig, tokenizer: Any, quantization: Any, peft_config: Any = None
) -> tuple[Any, Any]:
    """The policy of a folder or hub id in float32, unless ``model_init_kwargs`` say otherwise, and its tokenizer.

    Args:
        model: folder or hub id.
        args: the trainer's arguments.
        tokenizer: a given one, or None.
        quantization: a given ``quantization_config``, or None.
        peft_config: that of a new adapter, or None; adapters are saved without the configuration of their base.

    Raises:
        ConfigError: it is to be quantized in two ways, or see ``check_values``.
        ModelError: it cannot be loaded.
    """
    kwargs = {"dtype": "float32"} | dict(args.model_init_kwargs or {})
    trusted = bool(kwargs.pop("trust_remote_code", args.trust_remote_code))
    if quantization is not None:
        if "quantization_config" in kwargs:
            raise ConfigError(
                "quantization_config: found it as an argument and in model_init_kwargs, expected one of them",
                code="trainer-key",
            )
        kwargs["quantization_config"] = quantization
    with loaded_whole(args):
        policy = load_policy(model, trust_remote_code=trusted, trainable=True, **kwargs)
    if peft_config is not None or starts_as_adapter(model) or FROM_YAML.get():
        own = AutoConfig.from_pretrained(adapter_base(model) or model, trust_remote_code=trusted)
        path = "train.trainer" if FROM_YAML.get() else type(args).__name__
        check_values(own, kwargs, f"{path}.model_init_kwargs")
    if tokenizer is None:
        tokenizer = load_tokenizer(model, trust_remote_code=trusted, revision=kwargs.get("revision"))
    return policy, tokenizer


@contextmanager
def loaded_whole(args: DPOConfig) -> Iterator[None]:
    """Load models whole under DeepSpeed ZeRO 3, which else loads them in parts; its engine divides them for training.

    What is computed before training (the layout's trial, the check of the head, the reference) needs a whole model.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None or not is_deepspeed_zero3_enabled():
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        plugin.set_deepspeed_weakref()


def collator_fields(collator: Any) -> dict[str, Any]:
    """Settings of a given collator.

    Raises:
        ConfigError: it is not trl's, which the trainer extends by margins and weights.
    """
    if collator is None:
        return {}
    if type(collator) is not DataCollatorForPreference:
        raise ConfigError(
            f"data_collator: found {type(collator).__name__}, expected none or trl's DataCollatorForPreference: the "
            "trainer's own adds margins and weights to its batches",
            code="trainer-key",
            hint="leave it out",
        )
    return {one.name: getattr(collator, one.name) for one in dataclasses.fields(collator) if one.init}


def has_tokenizer(processing_class: Any) -> None:
    """Refuse what is no tokenizer.

    Raises:
        ConfigError: for example a processor of images.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class: found {type(processing_class).__name__}, expected a tokenizer",
            code="trainer-key",
            hint="give the tokenizer inside a processor: processing_class=processor.tokenizer",
        )


def finish_adapter(folder: Path, policy: nn.Module) -> None:
    """Keep how the base was quantized with a saved adapter, and sort the module names in its configuration.

    peft keeps these as sets; sorted, the same training writes the same bytes every time.
    """
    file = folder / ADAPTER
    if file.exists():
        quantization = quantization_of(policy)
        if quantization:
            write_json(folder / QUANTIZATION, quantization)
        config = read_json(file)
        ordered = {name: sorted(config[name]) for name in MODULE_LISTS if isinstance(config.get(name), list)}
        write_json(file, config | ordered)


@contextmanager
def without_ignored_kwargs(trainer: type = DPOTrainer) -> Iterator[None]:
    """Keep a warning of trl's that does not hold here from the log, see ``IGNORED_KWARGS``."""
    logger = logging.getLogger(trainer.__module__)

    def other(record: logging.LogRecord) -> bool:
        return IGNORED_KWARGS not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


@contextmanager
def without_model_hash(args: DPOConfig) -> Iterator[None]:
    """Spare trl the hash of the reference's weights for its own cache, which is read under DeepSpeed only."""
    if args.deepspeed or launched("DEEPSPEED"):
        yield
        return
    before = dpo_trainer.hash_module
    dpo_trainer.hash_module = lambda _module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = before
