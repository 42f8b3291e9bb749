"""Training arguments of trl and transformers from YAML fields, with errors that name the key."""

import dataclasses
import math
import sysconfig
import traceback
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError

from align.config import nearest
from align.distributed import init_process_group, world_size
from align.errors import AlignError, ConfigError, listed
from align.io.console import log
from align.training.base.settings import check_arguments, check_fields

Args = TypeVar("Args")
ROOT = Path(__file__).parents[3]
INSTALLED = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
HOMES = (ROOT / "align", ROOT / "reward_models", *INSTALLED)
"""Folders of this program, of Python and of installed packages; other code is the user's."""
DEFAULTS = {"report_to": "none"}
WITHOUT_GPU = {"bf16": False, "dataloader_pin_memory": False, "gradient_checkpointing": False}
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "learning_rate": 0, "num_train_epochs": 0, "max_grad_norm": 0, "weight_decay": 0, "warmup_steps": 0,
    "dataloader_num_workers": 0, "logging_steps": 0, "save_steps": 0, "max_length": 2, "adam_beta1": 0, "adam_beta2": 0,
    "adam_epsilon": 0, "seed": 0, "data_seed": 0, "dataset_num_proc": 1, "pad_to_multiple_of": 1,
    "precompute_ref_batch_size": 1, "neftune_noise_alpha": 0, "save_total_limit": 1, "ref_model_mixup_alpha": 0,
    "ref_model_sync_steps": 1, "router_aux_loss_coef": 0, "dataloader_prefetch_factor": 1, "max_steps": -1,
    "center_rewards_coefficient": 0,
}  # fmt: skip
"""Smallest allowed values of fields that the libraries check late or not at all."""
BELOW_ONE = ("adam_beta1", "adam_beta2")
WIDER = {"fsdp": (bool, list)}
"""Fields that are declared as text only -> the types that transformers takes as well."""
WORDS = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
}
MOST = {"ref_model_mixup_alpha": 1, "seed": 2**32 - 1, "data_seed": 2**32 - 1}


OF_THE_LOSS = ("loss_type", "beta", "label_smoothing", "loss_weights", "discopop_tau")
"""Fields of trl.DPOConfig that define the loss; here the entry under train.methods does."""
OF_TOKENIZER = "a reward model trains and scores by the tokenizer in its model's folder; change it there"
SET_ELSEWHERE = {
    "chat_template_path": OF_TOKENIZER,
    "eos_token": OF_TOKENIZER,
    "model_init_kwargs": "weights are loaded as float32; bf16: true computes in 16 bits",
}
"""Fields of trl.RewardConfig that this program sets elsewhere -> the setting to use instead."""


def build_trainer_args(
    kind: type[Args],
    fields: dict[str, Any],
    *,
    path: str,
    forced: dict[str, Any],
    pairs_per_step: int | None = None,
    evaluates: bool = False,
) -> Args:
    """Build an instance of ``kind`` (trl.DPOConfig, trl.RewardConfig) from user fields.

    Text that YAML does not read as a number (``1e-5``) is converted if the field is one. Unless the user sets them,
    ``report_to`` is ``none``, and without a GPU ``bf16`` and pinned memory are off. On CPUs the processes of a launcher
    only find each other with ``use_cpu``, so it is set without a GPU; transformers loses ``ddp_timeout`` there, so the
    process group is started here.

    Args:
        kind: dataclass of training arguments.
        fields: what the user wrote.
        path: YAML path of ``fields``, for messages.
        forced: fields that the program sets itself; the user may not.
        pairs_per_step: pairs of an optimizer step over all processes, which determines
            ``gradient_accumulation_steps``; None leaves that to ``fields``.
        evaluates: the training has held-out pairs, so fields of evaluation have a meaning.

    Raises:
        ConfigError: unknown field (with the nearest known), wrong type, a field that the user may not set, anything
            that the class itself refuses, a field that has no effect here (``check_fields``), what this machine
            lacks (``check_arguments``), or a number of pairs per step that the processes cannot share evenly.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    values = _checked(kind, fields, path, forced, evaluates)
    defaults = DEFAULTS if _has_gpu() else DEFAULTS | WITHOUT_GPU | {"use_cpu": world_size() > 1}
    arguments = {**defaults, **forced, **values}
    if world_size() > 1 and arguments.get("use_cpu"):
        init_process_group(arguments.get("ddp_timeout"))
    with refusals(path):
        try:
            args = kind(**arguments)
        except FileNotFoundError as error:
            raise ValueError(f"no such file: {error.filename}") from error
        get_reporting_integration_callbacks(args.report_to)  # type: ignore[attr-defined]
    check_arguments(args, path)
    if pairs_per_step is not None:
        _set_accumulation(args, fields, pairs_per_step, path)
    return args


def _checked(kind: type, fields: dict[str, Any], path: str, forced: dict[str, Any], evaluates: bool) -> dict[str, Any]:
    """Return ``fields`` with values of the right types.

    Raises:
        ConfigError: every problem of the fields at once.
    """
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
        if field.init
    }
    known = list(defaults)
    hints = typing.get_type_hints(kind)
    choices = {field.name: list(field.metadata.get("choices") or ()) for field in dataclasses.fields(kind)}
    values, problems = {}, []
    for name, value in fields.items():
        problem = _refusal(name, path, kind.__name__, known, forced)
        if not problem:
            values[name], expected = _convert(name, value, hints[name])
            if not expected and choices[name] and values[name] not in (*choices[name], None):
                expected = f"one of {', '.join(choices[name])}{nearest(str(value), choices[name])}"
            problem = f": found {value!r}, expected {expected}" if expected else ""
        if problem:
            problems.append(f"{path}.{name}{problem}")
    problems += check_fields(values, defaults, path, evaluates=evaluates)
    if problems:
        raise ConfigError(listed(problems), code="trainer-key")
    return values


def _refusal(name: str, path: str, kind: str, known: list[str], forced: dict[str, Any]) -> str:
    """Return why the user may not set the field ``name``, empty if they may."""
    if name in OF_THE_LOSS and path.startswith("train."):
        return ": has no meaning here: name the loss and its parameters under train.methods"
    if name in SET_ELSEWHERE and path.startswith("reward."):
        return f": has no meaning here: {SET_ELSEWHERE[name]}"
    if name not in known:
        return f": not a field of {kind}{nearest(name, known)}"
    return ": set by the program, leave it out" if name in forced and name != "seed" else ""


def _convert(name: str, value: Any, hint: Any) -> tuple[Any, str]:
    """Return the value in the type of its field, and what was expected; the latter is empty if the value is allowed."""
    if isinstance(value, WIDER.get(name, ())):
        return value, ""
    if name.endswith("_strategy") and value is False:
        value = "no"  # YAML reads a bare no as false
    converted, expected = _typed(value, hint)
    return converted, _keys(name, converted) or expected or _in_range(name, converted)


def _keys(name: str, value: Any) -> str:
    """Return an empty string if a mapping is allowed as the value of a field, else what was expected."""
    by_name = "a mapping from names to values"
    if name == "model_init_kwargs" and not isinstance(value, dict | NoneType):
        return by_name
    return by_name if isinstance(value, dict) and not all(isinstance(key, str) for key in value) else ""


def _set_accumulation(args: Any, fields: dict[str, Any], pairs: int, path: str) -> None:
    """Set ``gradient_accumulation_steps`` such that all processes together use ``pairs`` per optimizer step."""
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
    """Turn an error of trl, transformers or peft about a setting into one that names its YAML path.

    An error in code of the user's own, such as a callback, stays what it is.

    Raises:
        ConfigError: a value is refused, or a package that it needs is not installed.
    """
    try:
        yield
    except AlignError:
        raise
    except (TypeError, ValueError, ImportError, NotImplementedError, ConnectionError, HfHubHTTPError) as error:
        if _in_other_code(error):
            raise
        log.debug("%s", path, exc_info=True)
        raise ConfigError(f"{path}: {' '.join(str(error).split())}", code="trainer-key") from error


def _in_other_code(error: BaseException) -> bool:
    """Whether an error passed through code that belongs neither to this program nor to an installed package.

    Code without a file, such as what is typed at a prompt, is the user's if its module is ``__main__``.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if name.startswith("<"):
            other = frame.f_globals.get("__name__") == "__main__"
        else:
            other = not any(Path(name).absolute().is_relative_to(home) for home in HOMES)
        if other:
            return True
    return False


def build_lora(fields: dict[str, Any] | None, *, path: str, task_type: str) -> Any:
    """Build a ``peft.LoraConfig`` from user fields; None if there are none.

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
    """Return an empty string if the value is allowed, else what was expected."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if name in LEAST and isinstance(value, int | float) and value < LEAST[name]:
        return f"at least {LEAST[name]}"
    if name in BELOW_ONE and isinstance(value, int | float) and value >= 1:
        return "a number below 1"
    if name in MOST and isinstance(value, int | float) and value > MOST[name]:
        return f"at most {MOST[name]}"
    return ""


def _typed(value: Any, hint: Any) -> tuple[Any, str]:
    """Return the value in the hint's type and an empty string, or the value and what was expected."""
    allowed = set(_members(hint))
    if value is None and NoneType in allowed:
        return value, ""
    if str in allowed or not allowed & {int, float, bool}:
        return value, _of_kinds(value, allowed)
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


def _of_kinds(value: Any, allowed: set[Any]) -> str:
    """Return an empty string if the value is of an allowed type, else what was expected."""
    kinds = {typing.get_origin(kind) or kind for kind in allowed}
    kinds |= {int} if float in kinds else set()
    if Any in kinds or any(isinstance(value, kind) for kind in kinds):
        return ""
    return " or ".join(sorted(WORDS.get(kind, kind.__name__) for kind in kinds if kind is not NoneType))


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; any other type by itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
