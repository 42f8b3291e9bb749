"""RewardConfig: the arguments of RewardTrainer; trl's, and those of the objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import trl
from pydantic import BaseModel, ValidationError

from align.config import SharpnessSection, TiltSection
from align.errors import ConfigError, listed, python_words
from align.training.base.argument_types import OpenConfig, check_field_types
from align.training.base.arguments import WITHOUT_GPU, refusals
from align.training.base.settings import check_machine

S = TypeVar("S", bound=BaseModel)
SET_BY_CALLER = {"chat_template_path": "set processing_class.chat_template"}
"""Fields of trl.RewardConfig that are refused, because pairs are tokenized before trl reads them -> what to do."""
INIT_KWARGS = ("attn_implementation", "dtype", "revision", "trust_remote_code")
"""Keys of ``model_init_kwargs`` that are taken."""


@dataclass
class RewardConfig(OpenConfig, trl.RewardConfig):
    """trl's RewardConfig with the parameters of the objective.

    Every field of trl's keeps its meaning, but ``max_length``: a longer text is truncated on the right, as scoring
    truncates it, where trl drops the pair. On a machine without a GPU ``bf16`` is off by default.

    Raises:
        ConfigError: a section has an unknown key or a wrong value, or a field is set that has no effect here.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *trl.RewardConfig._VALID_DICT_FIELDS,
        "objective_kwargs",
        "tilt",
        "sharpness",
    ]

    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the objective; the others keep their defaults."}
    )
    tilt: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weights of the pairs from their losses: fields of the section `reward.tilt`."}
    )
    sharpness: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Penalty on sharp margins: fields of the section `reward.sharpness`."}
    )
    covariates: list[str] | None = field(
        default=None,
        metadata={
            "help": "Known causes of the labels, in the training and out of the score: length, or columns of numbers "
            "with the difference of the responses."
        },
    )
    async_checkpoints: bool = field(
        default=False, metadata={"help": "Write sharded checkpoints from a copy in memory while training continues."}
    )

    def __post_init__(self) -> None:
        if getattr(self, "bf16", None) is None and not torch.cuda.is_available():
            self.bf16 = WITHOUT_GPU["bf16"]
        check_field_types(self, "RewardConfig")
        with refusals("RewardConfig"):
            super().__post_init__()
        check_config(self)
        read_section(TiltSection, self.tilt, "tilt")
        read_section(SharpnessSection, self.sharpness, "sharpness")


def check_config(args: trl.RewardConfig) -> None:
    """Check that no field is set that the trainer cannot obey.

    Raises:
        ConfigError: names each of them.
    """
    if not isinstance(getattr(args, "objective_kwargs", None), Mapping | None):
        raise ConfigError(
            f"objective_kwargs: found {args.objective_kwargs!r:.60}, expected a dict of parameters of the objective",
            code="trainer-key",
        )
    problems = [
        f"{name}: found {getattr(args, name)!r}, which has no effect here: {instead}"
        for name, instead in SET_BY_CALLER.items()
        if getattr(args, name, None) is not None
    ]
    given = getattr(args, "model_init_kwargs", None)
    keys: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    problems += [
        f"model_init_kwargs.{name}: found {keys[name]!r:.60}, expected only {', '.join(INIT_KWARGS)}; a model that is "
        "loaded with others can be given in place of its name"
        for name in keys
        if name not in INIT_KWARGS
    ]
    if problems:
        raise ConfigError(listed(problems), code="trainer-key")


def read_section(kind: type[S], values: Any, name: str) -> S | None:
    """A section of the configuration from its fields; None for None.

    Raises:
        ConfigError: an unknown field or a wrong value; all of them are named.
    """
    if values is None or isinstance(values, kind):
        return values
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join([name, *(str(part) for part in item['loc'])])}: found {item['input']!r}; {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(listed(problems), code="trainer-key") from None


def as_reward_config(args: trl.RewardConfig | None, model: str) -> trl.RewardConfig:
    """The arguments, or the default ones for a model of this name, as trl has them.

    Raises:
        ConfigError: they are of another class, or see ``check_config``.
    """
    if args is None:
        return RewardConfig(f"{model.rstrip('/').rpartition('/')[2]}-Reward")
    if not isinstance(args, trl.RewardConfig):
        raise ConfigError(
            f"args: found a {type(args).__name__}, expected reward_models.RewardConfig or trl.RewardConfig",
            code="trainer-key",
            hint="reward_models.RewardConfig(output_dir) has trl's fields and the parameters of the objective",
        )
    check_config(args)
    with python_words():
        check_machine(args)
    return args
