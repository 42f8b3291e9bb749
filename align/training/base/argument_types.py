"""Values of a trainer's arguments and of its config that have another type than the one they are declared with."""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import (
    HubStrategy,
    IntervalStrategy,
    SaveStrategy,
    SchedulerType,
    get_last_checkpoint,
)
from transformers.training_args import OptimizerNames

from align.errors import ConfigError, listed


class OpenConfig:
    """Mixin for a config of trl's, to be named before its class: ``to_dict`` makes an equal one again.

    transformers masks every field that is called a token, also the padding token, whose mask is a token of no
    tokenizer. Here only a secret that is set is masked.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; ``hub_token`` is masked if it is set."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        open_to_all = [name for name in found if name.endswith("_token") and name not in SECRETS]
        open_to_all += [name for name in SECRETS if getattr(self, name, None) is None and name in found]
        return found | {name: getattr(self, name) for name in open_to_all}


SECRETS = ("hub_token", "push_to_hub_token")


class TruncationMode(Enum):
    """Values of ``truncation_mode``, which trl's collator checks in the first step."""

    KEEP_START = "keep_start"
    KEEP_END = "keep_end"


CHOICES: Mapping[str, type[Enum]] = {
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "hub_strategy": HubStrategy,
    "truncation_mode": TruncationMode,
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
}
"""Fields whose values are names, of which transformers raises an error that does not say which field it is."""
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
KINDS: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    types.NoneType: (types.NoneType, "None"),
    dict: (Mapping, "a dict"),
    list: (list | tuple, "a list"),
    PathLike: (PathLike, "a path"),
}
"""Declared type -> the type that a value is checked for, and how messages call it."""
OTHERS: Mapping[str, tuple[Any, ...]] = {
    "output_dir": (str, PathLike, types.NoneType),
    "reference_cache": (str, PathLike, types.NoneType),
    "report_to": (str, list, types.NoneType),
    "model_init_kwargs": (dict, str, types.NoneType),
    "loss_type": (str, list),
    "loss_weights": (list, types.NoneType),
}
"""Fields that are no numbers or truth values and fail late, or with an error that does not name them -> their types."""


def check_field_types(args: TrainingArguments, owner: str) -> None:
    """Raise if fields of a config hold values of another type than they are declared with.

    Checked are numbers, truth values and the fields of ``OTHERS``. A whole number may stand for a number, a float
    without a fraction for a whole number, and 0 and 1 for a truth value.

    Args:
        args: the config, before or after its ``__post_init__``.
        owner: name of its class, for messages.

    Raises:
        ConfigError: names each such field, what it holds and what it may hold.
    """
    problems = []
    config: Any = type(args)
    for name, kinds in _declared(config).items():
        value = getattr(args, name)
        if not any(_fits(value, kind) for kind in kinds):
            problems.append(f"{owner}.{name}: found {value!r:.60}, expected {_named(kinds)}")
    for name, kind in CHOICES.items():
        value = getattr(args, name, None)
        known = [str(one.value) for one in kind]
        if value is not None and not isinstance(value, Enum) and value not in known:
            problems.append(f"{owner}.{name}: found {value!r:.60}, expected one of {', '.join(known[:12])}")
    for field in fields(config):
        known = list(field.metadata.get("choices") or ())
        value = getattr(args, field.name)
        if known and field.name not in CHOICES and value is not None and value not in known:
            problems.append(f"{owner}.{field.name}: found {value!r:.60}, expected one of {', '.join(known)}")
    problems += _broken_json(args, owner)
    problems += [f"{owner}.report_to: {unknown}" for unknown in _unknown_trackers(args.report_to)]
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if isinstance(value, Integral) and value < 1:
            problems.append(f"{owner}.{name}: found {value}, expected a whole number of at least 1")
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else listed(problems).lstrip(), code="trainer-key")


def _broken_json(args: TrainingArguments, owner: str) -> list[str]:
    """A message for each field whose text, from a command line, begins as an object in JSON and is none."""
    problems = []
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                problems.append(f"{owner}.{name}: found {value!r:.60}, expected an object in JSON ({error})")
    return problems


def _unknown_trackers(names: Any) -> list[str]:
    """What is wrong with names in ``report_to``; their type is checked elsewhere."""
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    given = [names] if isinstance(names, str) else names if isinstance(names, list | tuple) else []
    return [
        f"found {name!r:.60}, expected one of {', '.join(known)}"
        for name in given
        if not isinstance(name, str) or name not in known
    ]


@cache
def _declared(config: type[TrainingArguments]) -> dict[str, tuple[Any, ...]]:
    """Field -> the types that its values may have, for the fields that are checked."""
    hints = get_type_hints(config)
    declared = {}
    for one in fields(config):
        kinds = OTHERS.get(one.name) or _members(hints[one.name])
        if one.name in OTHERS or all(kind in (bool, int, float, types.NoneType) for kind in kinds):
            declared[one.name] = (*kinds, types.NoneType) if one.default is None else kinds
    return declared


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, without what their elements are."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for member in get_args(hint) for kind in _members(member))
    return (get_origin(hint) or hint,)


def _fits(value: Any, kind: Any) -> bool:
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))
    if kind is int:
        return isinstance(value, Integral) or (isinstance(value, float) and math.isfinite(value) and value.is_integer())
    return isinstance(value, KINDS[kind][0])


def _named(kinds: tuple[Any, ...]) -> str:
    names = list(dict.fromkeys(KINDS[kind][1] for kind in kinds))
    return " or ".join(names)


def check_optimizer_class(given: Any, optimizers: Any) -> None:
    """Raise if ``optimizer_cls_and_kwargs`` is no class with arguments that fit it, or comes with an optimizer.

    Raises:
        ConfigError: says what it is.
    """
    if given is None:
        return
    if (
        not isinstance(given, list | tuple)
        or len(given) != 2
        or not callable(given[0])
        or not isinstance(given[1], Mapping)
    ):
        raise _refused(
            "optimizer_cls_and_kwargs", given, "a class of optimizers and its arguments",
            "write optimizer_cls_and_kwargs=(torch.optim.SGD, {...})",
        )  # fmt: skip
    if any(one is not None for one in optimizers):
        raise ConfigError(
            "optimizer_cls_and_kwargs: found it together with `optimizers`, expected one of them",
            code="trainer-key",
            hint="leave one of them out",
        )
    kind, fields = given
    try:
        kind([torch.nn.Parameter(torch.zeros(1))], **fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer_cls_and_kwargs: {getattr(kind, '__name__', kind)} refused {dict(fields)!r:.60}: "
            f"{' '.join(str(error).split())}",
            code="trainer-key",
        ) from None


def check_function(given: Any, name: str, expected: str) -> None:
    """Raise if an argument that may be None is no function.

    Raises:
        ConfigError: names the argument, and the function that was expected.
    """
    if given is not None and not callable(given):
        raise _refused(name, given, f"a function {expected}")


def check_arguments(callbacks: Any, optimizers: Any, compute_metrics: Any, trainer: str) -> None:
    """Raise if callbacks, optimizers or the function of metrics are of another kind than a trainer takes.

    Raises:
        ConfigError: names the argument, what it is and what was expected.
    """
    if callbacks is not None:
        if not isinstance(callbacks, list | tuple):
            raise _refused("callbacks", callbacks, "a list of TrainerCallback", f"write {trainer}(callbacks=[...])")
        for k, one in enumerate(callbacks):
            kind = one if isinstance(one, type) else type(one)
            if not issubclass(kind, TrainerCallback):
                raise _refused(f"callbacks[{k}]", one, "a TrainerCallback or a class of it")
    if not isinstance(optimizers, list | tuple) or len(optimizers) != 2:
        raise _refused("optimizers", optimizers, "(optimizer, schedule), each of which may be None")
    optimizer, schedule = optimizers
    if optimizer is not None and not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
        raise _refused("optimizers[0]", optimizer, "an optimizer over the weights of the model, or None")
    if schedule is not None and not callable(getattr(schedule, "step", None)):
        raise _refused("optimizers[1]", schedule, "a schedule of the learning rate (torch.optim.lr_scheduler), or None")
    check_function(compute_metrics, "compute_metrics", "of transformers.EvalPrediction")


def check_named_table(tables: Any, name: str) -> None:
    """Raise unless the trainer's ``eval_dataset`` is a dict with the key ``name``.

    Raises:
        ConfigError: lists the keys that there are.
    """
    known = list(tables) if isinstance(tables, dict) else []
    if name not in known:
        expected = f"one of {', '.join(known)}" if known else "a table: the trainer was given no dict of tables"
        raise ConfigError(f"eval_dataset: found {name!r}, expected {expected}", code="data-type")


def check_checkpoint_argument(given: Any, output: Path) -> None:
    """Raise if ``resume_from_checkpoint`` is no folder and no truth value, or True and ``output`` has no checkpoint.

    Raises:
        ConfigError: says what it is.
    """
    if given is not None and not isinstance(given, bool | str | PathLike):
        raise _refused("resume_from_checkpoint", given, 'a folder, True, False or "auto"')
    if given is True and not (output.is_dir() and get_last_checkpoint(str(output))):
        raise ConfigError(
            f"resume_from_checkpoint: found True, and no checkpoint in {output}",
            code="trainer-key",
            hint='write "auto" to start where there is none',
        )


def _refused(name: str, found: Any, expected: str, hint: str = "") -> ConfigError:
    shown = f"the class {found.__name__}" if isinstance(found, type) else f"{found!r:.60}"
    return ConfigError(f"{name}: found {shown}, expected {expected}", code="trainer-key", hint=hint)
