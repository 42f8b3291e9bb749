"""Fields of trl's and transformers' argument classes from YAML, with errors that name the key."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType
from typing import Any, TypeVar

from align.config import nearest
from align.distributed import init_process_group, world_size
from align.errors import AlignError, ConfigError, listed
from align.io.console import log

Args = TypeVar("Args")
DEFAULTS = {"report_to": "none"}
WITHOUT_GPU = {"bf16": False, "dataloader_pin_memory": False}
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": 0, "num_train_epochs": 0, "max_grad_norm": 0, "weight_decay": 0, "warmup_steps": 0,
    "dataloader_num_workers": 0, "logging_steps": 0, "save_steps": 0, "max_length": 2,
}  # fmt: skip
"""Smallest values of fields that the libraries check late or not at all."""


def build_trainer_args(
    kind: type[Args], fields: dict[str, Any], *, path: str, forced: dict[str, Any], pairs_per_step: int | None = None
) -> Args:
    """An instance of ``kind`` (trl.DPOConfig, trl.RewardConfig) from user fields.

    A number that YAML reads as text (``1e-5``) is taken as a number where the field is one. ``report_to`` is ``none``,
    and without a GPU ``bf16`` and pinned memory are off, unless the user says otherwise. Processes of a launcher find
    each other on CPUs only where ``use_cpu`` is set, so without a GPU it is; how long they wait there, ``ddp_timeout``,
    would get lost in transformers and is set here.

    Args:
        kind: dataclass of training arguments.
        fields: what the user wrote.
        path: where the user wrote it, for messages.
        forced: fields that the program sets itself; the user may not.
        pairs_per_step: pairs of an optimizer step over all processes, from which ``gradient_accumulation_steps``
            follows; None leaves that to ``fields``.

    Raises:
        ConfigError: unknown field (with the nearest known), wrong type, a field that is not the user's to set,
            anything that the class itself refuses, or pairs of a step that the processes cannot share.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    known = {field.name: field.type for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    problems, values = [], {}
    for name, value in fields.items():
        if name in OF_THE_LOSS and path.startswith("train."):
            problems.append(f"{path}.{name}: has no meaning here: name the loss and its parameters under train.methods")
        elif name in OF_THE_READING and path.startswith("reward."):
            problems.append(f"{path}.{name}: has no meaning here: {OF_THE_READING[name]}")
        elif name not in known:
            problems.append(f"{path}.{name}: not a field of {kind.__name__}{nearest(name, list(known))}")
        elif name in forced and name != "seed":
            problems.append(f"{path}.{name}: set by the program, leave it out")
        else:
            if name.endswith("_strategy") and value is False:
                value = "no"  # noqa: PLW2901  YAML reads a bare no as false
            if name == "eval_strategy" and value != "no":
                problems.append(f"{path}.{name}: found {value!r}, expected no: a training here holds no pairs back")
            values[name], problem = _typed(value, hints[name])
            problem = problem or _in_range(name, values[name])
            if problem:
                problems.append(f"{path}.{name}: found {value!r}, expected {problem}")
    if problems:
        raise ConfigError(listed(problems), code="trainer-key")
    defaults = DEFAULTS if _has_gpu() else DEFAULTS | WITHOUT_GPU | {"use_cpu": world_size() > 1}
    given = {**defaults, **forced, **values}
    if world_size() > 1 and given.get("use_cpu"):
        init_process_group(given.get("ddp_timeout"))
    with refusals(path):
        made = kind(**given)
        get_reporting_integration_callbacks(made.report_to)  # type: ignore[attr-defined]
    if pairs_per_step is not None:
        _share(made, fields, pairs_per_step, path)
    return made


OF_THE_LOSS = ("loss_type", "beta", "label_smoothing", "loss_weights", "discopop_tau")
"""Fields of trl.DPOConfig that would say what the loss is."""
OF_TOKENIZER = "a reward model trains and scores by the tokenizer in its model's folder; change it there"
OF_THE_READING = {
    "chat_template_path": OF_TOKENIZER,
    "eos_token": OF_TOKENIZER,
    "model_init_kwargs": "weights are loaded as float32; bf16: true computes in 16 bits",
}
"""Fields of trl.RewardConfig that would say how the model is loaded and reads texts, and what says so here."""


def _share(args: Any, fields: dict[str, Any], pairs: int, path: str) -> None:
    """Set the micro-batches of a step such that all processes together see ``pairs`` in it."""
    section = path.partition(".")[0]
    if "gradient_accumulation_steps" in fields:
        raise ConfigError(
            f"{path}.gradient_accumulation_steps: follows from {section}.pairs_per_step", code="trainer-key",
            hint="leave one of them out",
        )  # fmt: skip
    steps, rest = divmod(pairs, args.train_batch_size * world_size())
    if rest:
        raise ConfigError(
            f"{section}.pairs_per_step: found {pairs}, expected a multiple of {args.train_batch_size} pairs of a batch "
            f"in each of {world_size()} {'process' if world_size() == 1 else 'processes'}",
            code="trainer-key",
            hint=f"choose a {path}.per_device_train_batch_size that divides it for every number of processes",
        )
    args.gradient_accumulation_steps = steps


@contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn what trl, transformers or peft refuse in their settings into an error that names where these stand.

    Raises:
        ConfigError: a value is refused, or a package that it needs is missing.
    """
    try:
        yield
    except AlignError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        log.debug("%s", path, exc_info=True)
        raise ConfigError(f"{path}: {' '.join(str(error).split())}", code="trainer-key") from None


def build_lora(fields: dict[str, Any] | None, *, path: str, task_type: str) -> Any:
    """``peft.LoraConfig`` from user fields, or None where no adapter is wanted.

    Raises:
        ConfigError: a field that LoraConfig does not know, or a value that it refuses.
    """
    if fields is None:
        return None
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig)]
    problems = [
        f"{path}.{name}: not a field of peft.LoraConfig{nearest(name, known)}" for name in fields if name not in known
    ]
    if problems:
        raise ConfigError(listed(problems), code="peft-key")
    try:
        return LoraConfig(**({"task_type": task_type} | fields))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}", code="peft-key") from None


def _in_range(name: str, value: Any) -> str:
    """Empty where the value may be, else what was expected."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if name in LEAST and isinstance(value, int | float) and value < LEAST[name]:
        return f"at least {LEAST[name]}"
    return ""


def _typed(value: Any, hint: Any) -> tuple[Any, str]:
    """The value as the hint wants it and an empty string, or the value and what was expected."""
    allowed = set(_members(hint))
    if str in allowed or not allowed & {int, float, bool} or (value is None and NoneType in allowed):
        return value, ""
    if bool in allowed and isinstance(value, bool):
        return value, ""
    if isinstance(value, str) and float in allowed:
        try:
            return float(value), ""
        except ValueError:
            return value, "a number"
    if isinstance(value, bool):
        return value, "a number"
    if int in allowed and isinstance(value, int):
        return value, ""
    if float in allowed and isinstance(value, int | float):
        return value, ""
    if allowed - {int, float, bool, NoneType}:
        return value, ""
    return value, "true or false" if allowed <= {bool, NoneType} else "a whole number" if int in allowed else "a number"


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
