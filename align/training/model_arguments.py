"""Fields of the trainer that depend on the model's configuration, checked before its weights load."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config import TrainSection
from align.config.reading import nearest
from align.errors import ConfigError
from align.models.expert_balance import check_balanced
from align.models.folders import adapter_base
from align.training.adapter_trial import try_adapter

READ = (
    "adapter_kwargs", "adapter_name", "allow_all_kernels", "attn_implementation", "code_revision", "device_map",
    "device_mesh", "distributed_config", "dtype", "experts_implementation", "generation_config", "gguf_file",
    "kernel_config", "key_mapping", "load_in_4bit", "load_in_8bit", "low_cpu_mem_usage", "max_memory",
    "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info", "proxies",
    "quantization_config", "state_dict", "subfolder", "torch_dtype", "tp_plan", "tp_size", "tqdm_class",
    "trust_remote_code", "use_kernels", "variant",
)  # fmt: skip
"""Keyword arguments of ``from_pretrained`` that transformers reads without having them in its signature."""

ONLY_IN_TRAINING = ("drop", "jitter", "router_aux_loss_coef", "initializer", "use_cache", "output_")
"""Parts of the names of values of a configuration that change nothing that a model computes outside of training."""


def check_model_arguments(train: TrainSection) -> None:
    """Check ``model_init_kwargs`` and ``router_aux_loss_coef`` against the configuration of a model in a folder.

    Any key that ``from_pretrained`` does not read sets a value of the model's configuration, if it has one.

    Raises:
        ConfigError: a key that neither knows, a value that makes another model of the weights (``check_values``), an
            adapter that does not fit the model (``try_adapter``), or experts to balance in a model that does not say
            how many it has.
    """
    from transformers import AutoConfig

    source = adapter_base(train.model) or train.model
    if not Path(source).is_dir():
        return
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=train.trusts_remote_code)
    except (OSError, ValueError, ImportError):
        return  # the check of the folder says what is wrong with it
    path = "train.trainer.model_init_kwargs"
    for name in train.trainer.get("model_init_kwargs") or {}:
        if name not in _known() and not hasattr(config, name):
            raise ConfigError(
                f"{path}.{name}: neither an argument of from_pretrained nor a value of {type(config).__name__}"
                f"{nearest(name, sorted(_known()))}",
                code="trainer-key",
            )
    check_values(config, train.trainer.get("model_init_kwargs") or {}, path)
    if train.peft is not None and not train.quantization and not train.trusts_remote_code:
        try_adapter(config, train.peft)
    _check_experts(config.get_text_config(), train.trainer.get("router_aux_loss_coef"))


def check_values(config: Any, given: Mapping[str, Any], path: str) -> None:
    """Refuse values of the model's configuration with which the weights compute something else.

    Whatever loads the model from its folder again reads its config.json: the other stages of a run, and an adapter's
    folder, which holds no configuration of its base.

    Args:
        config: the configuration in the folder of the model.
        given: ``model_init_kwargs``.
        path: what messages call them.

    Raises:
        ConfigError: names the first such value.
    """
    for name, value in given.items():
        if name in _known() or not hasattr(config, name) or any(part in name for part in ONLY_IN_TRAINING):
            continue
        own = getattr(config, name)
        if value != own:
            raise ConfigError(
                f"{path}.{name}: found {value!r:.60}, and {own!r:.60} in the configuration of the model, which is what "
                "sampling, evaluation and the loading of a trained adapter would read",
                code="trainer-key",
                hint="write the value into config.json of a copy of the model's folder, and name that as the model",
            )


def _check_experts(config: Any, given: float | None) -> None:
    """Check the weight of the load-balancing loss as trl reads it: the configuration's own where none is given."""
    routes = hasattr(config, "output_router_logits")
    if given and not routes:
        raise ConfigError(
            f"train.trainer.router_aux_loss_coef: found {given:g}, and a {type(config).__name__} is of a model that "
            "gives no router's logits, so there is nothing to weigh",
            code="trainer-key",
            hint="leave it out",
        )
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if given is None else given
    if routes and coefficient:
        check_balanced(config, coefficient)


def _known() -> set[str]:
    from transformers import PreTrainedModel

    signature = inspect.signature(PreTrainedModel.from_pretrained).parameters
    return set(READ) | {
        name for name in signature if name not in ("pretrained_model_name_or_path", "model_args", "kwargs")
    }
