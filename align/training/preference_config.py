"""PreferenceConfig: trl's DPOConfig with the fields of this program's trainer."""

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from align.distributed import world_size
from align.errors import ConfigError, python_words
from align.models.turns import TURNS
from align.training.base.argument_types import OpenConfig, check_field_types
from align.training.base.arguments import refusals
from align.training.loss_choice import choose_loss

LAYOUTS = ("auto", "concatenated", "shared_prefix")
UNUSED_FIELDS = {
    "ld_alpha": "write `loss: ld_dpo` with `parameters: {ld_alpha: ...}` under train.methods",
    "use_weighting": "write `loss: wpo` under train.methods; with `parameters: {clamp: false}` it is trl's",
    "f_divergence_type": "write `loss: fdpo_forward_kl`, `fdpo_js` or `fdpo_alpha` under train.methods",
    "f_alpha_divergence_coef": "write `loss: fdpo_alpha` with `parameters: {alpha: ...}` under train.methods",
    "padding_free": "`train.layout` packs the pairs",
    "label_smoothing_factor": "it smooths the labels of a language model's own loss, not those of pairs",
    "label_names": "a batch of pairs has no labels",
    "ignore_data_skip": "a resumed training goes on with the pairs that are left",
}
"""Fields of DPOConfig that nothing here reads -> why, or what to write instead."""


@dataclass
class PreferenceConfig(OpenConfig, DPOConfig):
    """Arguments of ``PreferenceTrainer``: every field of ``trl.DPOConfig``, with its meaning, and those below.

    Without a GPU for it ``bf16`` is off unless ``use_cpu`` or ``bf16`` is set, where trl's default could not be made.
    A field of DPOConfig that only trl's own losses read is refused by name if it is set; ``loss_type``,
    ``loss_weights``, ``label_smoothing`` and ``discopop_tau`` are taken: they name losses here and their parameters.

    Args:
        beta: strength of the pull to the reference. None: that of ``loss_kwargs``, else the loss's own default.
        loss: name in ``align.LOSSES``, or ``{"terms": {name: weight, ...}}``, a weighted sum (docs/losses.md);
            ``loss_type`` with ``loss_weights`` may give it in trl's way instead, with trl's defaults.
        loss_kwargs: parameters of the loss; the others keep their defaults.
        layout: how log-probs are computed. ``shared_prefix``: each prompt once for both responses; ``concatenated``:
            row by row, as trl does; ``auto``: ``shared_prefix`` if it is exact for the model.
        turns: whose words count in responses of several messages. ``assistant``: the assistant's; ``last``: its
            last message's; ``all``: everybody's, as in trl.
        max_tokens_per_device: tokens per forward pass; a larger batch is split, with the same gradient. None: never.
        group_by_prompt: let the pairs of a prompt follow each other in an epoch, so that those in a batch share its
            tokens under ``shared_prefix``. The order of the pairs is another one than trl's.
        pairs_per_step: pairs per optimizer step over all processes, which sets ``gradient_accumulation_steps``.
        async_checkpoints: write sharded checkpoints (FSDP2, ``SHARDED_STATE_DICT``) while training continues.
        reference_cache: folder that keeps precomputed reference log-probs for the next training of the same model and
            pairs; needs ``precompute_ref_log_probs``.
        pair_weights: fields of ``align.config.WeightsSection``: spread, trust_by_spread, votes, ood, tilt, normalise.
        gradient_remedy: fields of ``align.config.RemedySection``: kind, keep, decay, parameters.
        token_mask: fields of ``align.config.TokenMaskSection``: sparsity, rate; ``{}`` takes their defaults.

    Raises:
        ConfigError: an unknown loss or parameter, a value out of range, two different losses or betas, a field without
            meaning here. ``PreferenceTrainer`` checks again what was changed afterwards.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012  as in trl: transformers reads these from JSON on a command line
        *DPOConfig._VALID_DICT_FIELDS, "loss", "loss_kwargs", "pair_weights", "gradient_remedy", "token_mask",
    ]  # fmt: skip

    beta: float | None = field(
        default=None, metadata={"help": "Pull to the reference; default: that of the loss in `align.LOSSES`."}
    )
    loss: dict[str, Any] | str | None = field(
        default="dpo",
        metadata={"help": 'Name of the loss in `align.LOSSES` (None: dpo), or {"terms": {name: weight}}.'},
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the loss; the others keep their defaults."}
    )
    layout: str = field(default="auto", metadata={"help": "How log-probs are computed.", "choices": list(LAYOUTS)})
    turns: str = field(
        default="assistant",
        metadata={"help": "Whose words count in responses of several messages.", "choices": list(TURNS)},
    )
    max_tokens_per_device: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass; a larger batch is split, with the same gradient."}
    )
    group_by_prompt: bool = field(
        default=False, metadata={"help": "Let the pairs of a prompt follow each other, to compute it once."}
    )
    pairs_per_step: int | None = field(
        default=None, metadata={"help": "Pairs per optimizer step over all processes, whatever their number."}
    )
    async_checkpoints: bool = field(
        default=False, metadata={"help": "Write sharded checkpoints (FSDP2) while training continues."}
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps precomputed reference log-probs between trainings."}
    )
    pair_weights: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Weights of the pairs in addition to the loss's own (WeightsSection)."}
    )
    gradient_remedy: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Remedy against gradient entanglement in each step (RemedySection)."}
    )
    token_mask: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "A learned mask over the tokens that the loss sees (TokenMaskSection)."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.use_cpu and not is_torch_bf16_gpu_available():
            self.bf16: bool | None = False  # trl's default asks for a GPU here and refuses to be made
        self.loss = "dpo" if self.loss is None else self.loss
        with python_words():
            check_field_types(self, "PreferenceConfig")
            self._share_pairs()
            with refusals("PreferenceConfig"):
                super().__post_init__()
            check_own_fields(self)
            choose_loss(self)
            refuse_unused_fields(self)

    def _share_pairs(self) -> None:
        """Set ``gradient_accumulation_steps`` such that all processes together take ``pairs_per_step`` pairs."""
        if self.pairs_per_step is None:
            return
        pairs: Any = self.pairs_per_step
        if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 0:
            raise ConfigError(
                f"PreferenceConfig.pairs_per_step: found {pairs!r}, expected a whole number of at least 1",
                code="trainer-key",
            )
        batch = self.per_device_train_batch_size * world_size()
        steps, rest = divmod(self.pairs_per_step, batch)
        if rest or not steps:
            raise ConfigError(
                f"PreferenceConfig.pairs_per_step: found {self.pairs_per_step}, expected a multiple of the {batch} "
                "pairs of a batch over all processes",
                code="trainer-key",
                hint="choose a per_device_train_batch_size that divides it for every number of processes",
            )
        if self.gradient_accumulation_steps not in (1, steps):
            raise ConfigError(
                f"PreferenceConfig.gradient_accumulation_steps: found {self.gradient_accumulation_steps}, and "
                f"{steps} follows from pairs_per_step",
                code="trainer-key",
                hint="leave one of them out",
            )
        self.gradient_accumulation_steps: int = steps


def check_own_fields(args: PreferenceConfig) -> None:
    """Raise if a field that DPOConfig does not have holds a value that it cannot have.

    Raises:
        ConfigError: names the field.
    """
    if args.layout not in LAYOUTS:
        raise ConfigError(
            f"PreferenceConfig.layout: found {args.layout!r}, expected one of {', '.join(LAYOUTS)}", code="trainer-key"
        )
    if args.turns not in TURNS:
        raise ConfigError(
            f"PreferenceConfig.turns: found {args.turns!r}, expected one of {', '.join(TURNS)}", code="trainer-key"
        )
    budget = args.max_tokens_per_device
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ConfigError(
            f"PreferenceConfig.max_tokens_per_device: found {budget!r}, expected a whole number of at least 1",
            code="trainer-key",
        )
    if args.reference_cache is not None and not args.precompute_ref_log_probs:
        raise ConfigError(
            f"PreferenceConfig.reference_cache: found {args.reference_cache!r} and no log-probs to keep in it",
            code="trainer-key",
            hint="set precompute_ref_log_probs=True, or leave it out",
        )


def refuse_unused_fields(args: DPOConfig) -> None:
    """Refuse fields of DPOConfig that nothing here reads.

    Raises:
        ConfigError: one of them has another value than its default.
    """
    for name, hint in UNUSED_FIELDS.items():
        if getattr(args, name) != DPOConfig.__dataclass_fields__[name].default:
            raise ConfigError(
                f"train.trainer.{name}: {getattr(args, name)!r} has no meaning for the losses of this program",
                code="trainer-key",
                hint=f"leave it out; {hint}",
            )


def own_copy(args: DPOConfig, **own: Any) -> PreferenceConfig:
    """A PreferenceConfig of the same values that a trainer may change; ``args`` stays as it is.

    Args:
        args: trl's arguments or this program's, whose ``__post_init__`` has run.
        own: values of fields that DPOConfig does not have.
    """
    made = object.__new__(PreferenceConfig)
    for one in dataclasses.fields(PreferenceConfig):
        if one.init and not hasattr(args, one.name):
            factory = one.default_factory
            setattr(made, one.name, one.default if factory is dataclasses.MISSING else factory())
    for name, value in vars(args).items():
        setattr(made, name, copy.copy(value) if isinstance(value, dict | list) else value)
    made.accelerator_config = copy.copy(args.accelerator_config)
    for name, value in own.items():
        setattr(made, name, value)
    return made
