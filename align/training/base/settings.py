"""Fields of a trainer's arguments that cannot be obeyed here, refused when a run is checked, before a model loads."""

import copy
import dataclasses
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from align.distributed import world_size
from align.errors import FROM_YAML, ConfigError, listed
from align.io.console import log
from align.training.base.tracked_runs import check_trackers

NOTHING_HELD_BACK = "a training here holds no pairs back; evaluate the trained model"
NEEDS_EVAL_PAIRS = "nothing is held out without train.eval_pairs"
OF_EVALUATION = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip
"""Fields that an evaluation while training reads."""
NEVER_READ: dict[str, str] = dict.fromkeys(
    (
        "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "batch_eval_metrics",
        "include_for_metrics", "prediction_loss_only", "do_eval", "do_predict",
    ),
    "an evaluation while training keeps the numbers of each pair and no logits",
) | {
    "label_smoothing_factor": "it smooths the labels of a language model's own loss, not those of pairs",
    "label_names": "a batch of pairs has no labels",
    "average_tokens_across_devices": "the loss of a step is the mean over its pairs on all processes",
    "resume_from_checkpoint": "a training resumes from the last checkpoint in its own folder",
    "ignore_data_skip": "a resumed training goes on with the pairs that are left",
    "remove_unused_columns": "the columns that a training reads are chosen by the program",
    "padding_free": "trl does not have it at present; `train.layout: shared_prefix` packs the pairs",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        "a run uploads nothing; `align push FOLDER hf://user/name` uploads a trained model",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "an evaluation while training computes as the training does",
    ),
    "enable_jit_checkpoint": "a training that is asked to stop (SIGTERM) writes a checkpoint anyway",
    "save_only_model": "a training could not resume from such a checkpoint; once it has ended, its checkpoints are "
    "reduced to their models anyway",
}  # fmt: skip
"""Field of the trainer's arguments -> why no value but its default means anything here."""
PROJECTED = ("galore", "apollo")
"""Parts of the names of optimizers that read ``optim_target_modules``."""
OTHER_VALUES = ("7", "8", "true", "false")
"""Values of an ``optim_args`` key, two of each type, so that one of them is not its default."""
ATTENTION = ("eager", "sdpa")
NEEDS_A_GPU = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
LAUNCHED_BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"}
CHOOSE_WEIGHTS = (
    "revision", "code_revision", "subfolder", "variant", "gguf_file", "state_dict", "config", "adapter_kwargs",
)  # fmt: skip
"""Keys of ``model_init_kwargs`` that choose another model than the one that the other stages read."""


def check_fields(fields: dict[str, Any], defaults: dict[str, Any], path: str, *, evaluates: bool) -> list[str]:
    """Return a message for each field that the user sets and no training here reads.

    Args:
        fields: what the user wrote.
        defaults: the defaults of the class of arguments; a value equal to its default passes.
        path: YAML path of ``fields``.
        evaluates: the training has held-out pairs.
    """
    none = NEEDS_EVAL_PAIRS if path.startswith("train.") else NOTHING_HELD_BACK
    unread = NEVER_READ if evaluates else dict.fromkeys(OF_EVALUATION, none) | NEVER_READ
    problems = [
        f"{path}.{name}: found {fields[name]!r}, which has no effect here: {reason}"
        for name, reason in unread.items()
        if name in fields and name in defaults and fields[name] != defaults[name]
    ]
    if fields.get("save_strategy") == "best" and not evaluates:
        problems.append(f"{path}.save_strategy: found 'best', expected no, steps or epoch: {none}")
    return problems


def check_arguments(args: Any, path: str) -> None:
    """Refuse arguments under which no step is made, or that need what this machine lacks.

    Args:
        args: an instance of transformers.TrainingArguments.
        path: YAML path of its fields.

    Raises:
        ConfigError: every problem at once, or a tracker that cannot be used.
    """
    tell_of_one_process()
    problems = [f"{path}.{problem}" for check in _CHECKS if (problem := check(args))]
    problems += [f"{path}.model_init_kwargs.{problem}" for problem in _model_problems(args)]
    if problems:
        raise ConfigError(listed(problems), code="trainer-key")
    check_trackers(args, f"{path}.report_to")


def check_machine(args: Any) -> None:
    """Refuse arguments of a trainer made in Python that need a package or a device that is not here.

    Those of a run file are checked with the run.

    Args:
        args: an instance of transformers.TrainingArguments, or None.

    Raises:
        ConfigError: every problem at once.
    """
    if args is None or FROM_YAML.get():
        return
    tell_of_one_process()
    problems = [f"{type(args).__name__}.{problem}" for check in _NEEDED if (problem := check(args))]
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else listed(problems).lstrip(), code="trainer-key")


@functools.cache
def tell_of_one_process() -> None:
    """Warn, once, where accelerate was asked for several processes and has started one, as it does with ``--cpu``.

    It sets a port for processes to meet only where several are asked for.
    """
    if os.environ.keys() >= LAUNCHED_BY_ACCELERATE and "WORLD_SIZE" not in os.environ:
        log.warning(
            "accelerate was asked for several processes and has started one, so a step has only the pairs of one; "
            "on CPUs it starts them with --multi_gpu"
        )


def _no_step(args: Any) -> str:
    if args.max_steps > 0 or args.num_train_epochs > 0:
        return ""
    return f"num_train_epochs: found {args.num_train_epochs:g}, expected more than 0: no step would be made"


def _optimizer(args: Any) -> str:
    """Ask transformers for the optimizer; it imports the package that the optimizer comes from."""
    if args.optim_args and not all("=" in part for part in args.optim_args.split(",")):
        return f"optim_args: found {args.optim_args!r}, expected key=value,key=value"
    if args.optim_target_modules is not None and not any(name in args.optim.value for name in PROJECTED):
        return f"optim_target_modules: found {args.optim_target_modules!r}, which {args.optim.value} does not read"
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        unread = [part for part in (args.optim_args or "").split(",") if part and not _is_read(args, part, settings)]
    except ImportError as error:
        return f"optim: {args.optim.value}: {' '.join(str(error).split())}"
    except Exception:  # some want the model, which is not loaded yet
        return ""
    if unread:
        return f"optim_args: found {', '.join(unread)}, which has no effect here: {args.optim.value} does not read it"
    if kind.__module__.startswith("torch.optim"):
        try:
            kind([torch.zeros(1, requires_grad=True)], **settings)
        except (TypeError, ValueError) as error:
            return f"optim: {args.optim.value}: {' '.join(str(error).split())}"
    return ""


def _is_read(args: Any, part: str, settings: dict[str, Any]) -> bool:
    """Whether the settings of the optimizer, with all of ``optim_args``, depend on its ``part``, key=value.

    It is left out and given other values, because its own may be the default of the optimizer.
    """
    others = [other for other in args.optim_args.split(",") if other != part]
    key = part.partition("=")[0]
    for instead in ([], *([f"{key}={value}"] for value in OTHER_VALUES)):
        changed = copy.copy(args)
        changed.optim_args = ",".join([*others, *instead]) or None
        try:
            if Trainer.get_optimizer_cls_and_kwargs(changed)[1] != settings:
                return True
        except (TypeError, ValueError, AttributeError, LookupError):  # it was read, and is of another type
            return True
    return False


def _checkpointing(args: Any) -> str:
    """Check the arguments of torch's checkpointing, which reads them in the first step."""
    found = args.gradient_checkpointing_kwargs
    known = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "preserve_rng_state"]
    known = [name for name in known if name not in ("function", "args", "kwargs")]
    if found is None or (isinstance(found, dict) and set(found) <= set(known)):
        return ""
    return f"gradient_checkpointing_kwargs: found {found!r}, expected a mapping with keys of {', '.join(known)}"


def _workers(args: Any) -> str:
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        return "dataloader_persistent_workers: found true, expected dataloader_num_workers of at least 1 with it"
    return ""


def _saved_steps(args: Any) -> str:
    if args.save_strategy == "steps" and args.save_steps == 0:
        return "save_steps: found 0, expected more than 0: no checkpoint would be written"
    return ""


def _smaller_batches(args: Any) -> str:
    if args.auto_find_batch_size:
        return (
            "auto_find_batch_size: found true, expected false: where memory ends it would go on with fewer pairs "
            "in a step, which is another training; max_tokens_per_device splits a batch and keeps its step"
        )
    return ""


def _moving_reference(args: Any) -> str:
    """Name a setting of ``sync_ref_model`` that is set without it."""
    if getattr(args, "sync_ref_model", True):
        return ""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        if getattr(args, name) != defaults[name]:
            return f"{name}: found {getattr(args, name)}, which has no effect here: sync_ref_model is false"
    return ""


def _compiled(args: Any) -> str:
    if args.torch_compile_mode is None:
        return ""
    from torch._inductor import list_mode_options  # takes a second

    modes = list(list_mode_options())
    if args.torch_compile_mode not in modes:
        return f"torch_compile_mode: found {args.torch_compile_mode!r}, expected one of {', '.join(modes)}"
    return ""


def _tokens_seen(args: Any) -> str:
    choices = ("all", "non_padding", "no")
    found = args.include_num_input_tokens_seen
    return "" if found in choices else f"include_num_input_tokens_seen: found {found!r}, expected {', '.join(choices)}"


def _schedule(args: Any) -> str:
    """Build the schedule of learning rates on an optimizer of one number."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1e-5)
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(2),
            num_training_steps=2,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, AttributeError) as error:
        return f"lr_scheduler_kwargs: found {args.lr_scheduler_kwargs!r}: {' '.join(str(error).split())}"
    return ""


def _liger(args: Any) -> str:
    if args.use_liger_kernel and not is_liger_kernel_available():
        return "use_liger_kernel: found true, expected the package liger-kernel to be installed"
    return ""


def _sharding(args: Any) -> str:
    """Check that FSDP has processes to shard over, and that its settings are read."""
    if world_size() > 1:
        return ""
    if args.fsdp:
        return (
            f"fsdp: found {args.fsdp!r} and one process, expected a launcher with several: `accelerate launch` or "
            "`torchrun`, for --dry-run too"
        )
    if args.fsdp_config and not args.fsdp:
        return f"fsdp_config: found {args.fsdp_config!r}, which has no effect without fsdp: true"
    return ""


def _half_precision(args: Any) -> str:
    """Nothing computes in float16 on a CPU: accelerate goes on in float32 without a word."""
    if args.mixed_precision == "fp16" and (args.use_cpu or not torch.cuda.is_available()):
        asked = "found true" if args.fp16 else "found it in ACCELERATE_MIXED_PRECISION, which a launcher sets"
        return f"fp16: {asked}, expected a GPU; on a CPU bf16 computes in 16 bits, slowly"
    return ""


def _offloading(args: Any) -> str:
    if getattr(args, "activation_offloading", False) and not torch.cuda.is_available():
        return "activation_offloading: found true, expected a GPU, from which activations are moved"
    return ""


def _model_problems(args: Any) -> list[str]:
    """Return what is wrong with ``model_init_kwargs``, each beginning with the name of its key."""
    keys = getattr(args, "model_init_kwargs", None) or {}
    problems = [
        f"{name}: found {keys[name]!r}, which the other stages of a run would not read; save that model and its "
        "tokenizer in a folder and name it as the model"
        for name in CHOOSE_WEIGHTS
        if name in keys
    ]
    for name, instead in (("torch_dtype", "dtype"), ("trust_remote_code", "trust_remote_code of the trainer")):
        if name in keys:
            problems.append(f"{name}: found {keys[name]!r}, expected {instead} in its place")
    for name in ("use_safetensors", "output_loading_info"):
        if name in keys:
            problems.append(f"{name}: set by the program, leave it out")
    if keys.get("ignore_mismatched_sizes"):
        problems.append("ignore_mismatched_sizes: found true, with which weights that do not fit are drawn at random")
    if not _is_dtype(keys.get("dtype", "auto")):
        problems.append(f"dtype: found {keys['dtype']!r}, expected a dtype of torch, such as float32 or bfloat16")
    attention = keys.get("attn_implementation")
    if not isinstance(attention, str | dict | NoneType) or (
        isinstance(attention, str) and "/" not in attention and attention not in (*ATTENTION, *NEEDS_A_GPU)
    ):
        problems.append(f"attn_implementation: found {attention!r}, expected one of {', '.join(ATTENTION)}, "
                        f"{', '.join(NEEDS_A_GPU)}, or a kernel's name on the hub")  # fmt: skip
    if isinstance(attention, str) and attention in NEEDS_A_GPU and not torch.cuda.is_available():
        problems.append(f"attn_implementation: found {attention}, expected sdpa or eager: there is no GPU")
    quantization = keys.get("quantization_config")
    loads_few_bits = isinstance(quantization, dict) and any(name.startswith("load_in_") for name in quantization)
    if (loads_few_bits or any(name in keys for name in ("load_in_4bit", "load_in_8bit"))) and not _has("bitsandbytes"):
        problems.append("quantization_config: expected the package bitsandbytes to be installed")
    four_bits = keys.get("load_in_4bit") or (isinstance(quantization, dict) and quantization.get("load_in_4bit"))
    if four_bits and not torch.cuda.is_available():
        problems.append(
            "quantization_config: found load_in_4bit, expected load_in_8bit or a GPU: on a CPU bitsandbytes computes "
            "with kernels that pass back no gradient, after its first evaluation"
        )
    return problems


def _is_dtype(given: Any) -> bool:
    """Whether weights can be loaded in this dtype, or its name; None and auto leave the choice to transformers."""
    found = getattr(torch, given, None) if isinstance(given, str) else given
    return given in (None, "auto") or (isinstance(found, torch.dtype) and found.is_floating_point)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_NEEDED: tuple[Callable[[Any], str], ...] = (
    _optimizer, _schedule, _liger, _offloading, _half_precision, _sharding,
)  # fmt: skip
_CHECKS = (
    _no_step, *_NEEDED, _checkpointing, _workers, _saved_steps, _smaller_batches, _moving_reference, _compiled,
    _tokens_seen,
)  # fmt: skip
