"""Settings of a policy's training: its arguments, and what is refused before the policy loads."""

import os
from typing import Any

from trl import DPOConfig

from align.config import TrainSection
from align.distributed import world_size
from align.errors import ConfigError
from align.io.console import log
from align.losses.registry import BoundLoss
from align.models.folders import is_adapter
from align.training.base.arguments import build_trainer_args

UNUSED_FIELDS = {
    "ld_alpha": "`loss: ld_dpo` with `parameters: {ld_alpha: ...}`",
    "use_weighting": "`loss: wpo`; with `parameters: {clamp: false}` it is trl's",
    "f_divergence_type": "`loss: fdpo_forward_kl`, `fdpo_js` or `fdpo_alpha`",
    "f_alpha_divergence_coef": "`loss: fdpo_alpha` with `parameters: {alpha: ...}`",
    "loss_weights": "`loss_type` with `loss_weights`",
    "label_smoothing": "`parameters: {label_smoothing: ...}`",
    "discopop_tau": "`parameters: {discopop_tau: ...}`",
    "padding_free": "`layout` of the section train",
}
"""Fields of DPOConfig that only trl's losses read -> what to write instead."""


def policy_args(config: TrainSection, forced: dict[str, Any], *, masked: bool) -> DPOConfig:
    """Return trl's arguments for the training of a policy.

    Args:
        config: section ``train``.
        forced: fields that the program sets itself.
        masked: the method has a token mask or a loss that reads the reference's tokens, and runs the reference in
            every step; without an adapter that needs the reference model in memory.

    Raises:
        ConfigError: see ``build_trainer_args``.
    """
    defaults = {
        "precompute_ref_log_probs": not masked or config.peft is not None,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return build_trainer_args(
        DPOConfig,
        defaults | config.trainer,
        path="train.trainer",
        forced=forced,
        pairs_per_step=config.pairs_per_step,
    )


def check_settings(config: TrainSection, loss: BoundLoss, args: DPOConfig, *, masked: bool) -> None:
    """Refuse settings that do not go together or have no effect.

    Args:
        config: section ``train``.
        loss: loss of the method.
        args: from ``policy_args``.
        masked: the method runs the reference in every step, see ``policy_args``.

    Raises:
        ConfigError: the first problem.
    """
    refuse_unused_fields(args)
    _check_adapter(config.peft or {})
    if args.precompute_ref_log_probs and masked and config.peft is None and not is_adapter(config.model):
        refuse_precomputed_tokens("a token_mask" if loss.spec.tokens != "reference" else loss.spec.name)
    _check_synced_reference(config, args)
    _check_launcher(config, args)
    if args.learning_rate == 0:
        raise ConfigError(
            "train.trainer.learning_rate: found 0, expected more than 0: no weight would move", code="trainer-key"
        )
    if config.layout == "shared_prefix" and args.neftune_noise_alpha:
        raise ConfigError(
            "train.layout: found shared_prefix together with neftune_noise_alpha, whose noise depends on the length of "
            "a row",
            code="layout",
            hint="set `layout: concatenated`, or `auto` to let the program choose",
        )
    if config.entanglement is not None:
        check_probe(loss, processes=world_size(), precomputed=args.precompute_ref_log_probs)


def refuse_unused_fields(args: DPOConfig) -> None:
    """Refuse fields of DPOConfig that only trl's losses read.

    Raises:
        ConfigError: one of them has another value than its default.
    """
    for field, instead in UNUSED_FIELDS.items():
        if getattr(args, field) != DPOConfig.__dataclass_fields__[field].default:
            raise ConfigError(
                f"train.trainer.{field}: {getattr(args, field)!r} has no meaning for the losses of this program",
                code="trainer-key",
                hint=f"leave it out; write {instead}" + ("" if field == "padding_free" else " under train.methods"),
            )


def refuse_precomputed_tokens(what: str) -> None:
    """Refuse precomputed reference log-probs together with what reads the reference's tokens, and without an adapter.

    Args:
        what: a token mask, or the name of a loss.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"train.trainer.precompute_ref_log_probs: found true together with {what}, which runs the "
        "reference in every step: without an adapter there is no reference model left",
        code="trainer-key",
        hint="leave it out, or train an adapter",
    )


def check_probe(loss: BoundLoss, *, processes: int, precomputed: bool) -> None:
    """Refuse measurements of gradient entanglement where they cannot be made.

    Raises:
        ConfigError: several processes, reference log-probs that are not precomputed, or a loss that compares pairs or
            reads tokens.
    """
    if not loss.spec.from_logps or processes > 1 or not precomputed:
        raise ConfigError(
            "train.entanglement: needs one process, precomputed reference log-probs and a loss of the log-probs of one "
            f"pair, found {loss.spec.name}",
            code="entanglement-config",
            hint="leave it out, and measure the trained policy with `align entangle report`",
        )


def _check_adapter(peft: dict[str, Any]) -> None:
    """Refuse an adapter of which nothing is trained; ``check_adapter`` has the rest."""
    if peft.get("inference_mode"):
        raise ConfigError(
            "train.peft.inference_mode: found true, expected false: no weight would be trained", code="peft-key"
        )


def _check_synced_reference(config: TrainSection, args: DPOConfig) -> None:
    """Refuse ``sync_ref_model`` where there is no reference model that it could move, or none that is saved."""
    if not args.sync_ref_model:
        return
    if config.peft is not None or is_adapter(config.model):
        problem, hint = "an adapter: its reference is the model without it", "train all weights, or leave it out"
    elif args.precompute_ref_log_probs:
        problem, hint = "reference log-probs that are precomputed", "set `precompute_ref_log_probs: false`"
    elif launched("FSDP") or args.fsdp or launched("DEEPSPEED") or args.deepspeed:
        problem, hint = "FSDP or DeepSpeed: checkpoints do not hold the reference", "train without them"
    else:
        return
    raise ConfigError(
        f"train.trainer.sync_ref_model: found true together with {problem}", code="trainer-key", hint=hint
    )


def _check_launcher(config: TrainSection, args: DPOConfig) -> None:
    if config.max_tokens_per_device is not None and (launched("DEEPSPEED") or args.deepspeed):
        refuse_split_batches()


def refuse_split_batches() -> None:
    """Refuse a token budget under DeepSpeed.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "train.max_tokens_per_device: DeepSpeed makes an optimizer step after each backward pass, and a batch that is "
        "split over the budget has several",
        code="trainer-key",
        hint="leave it out; lower per_device_train_batch_size and raise gradient_accumulation_steps instead",
    )


def launched(kind: str) -> bool:
    """Whether ``accelerate launch`` started this process with a plugin: FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("1", "true")


def refuse_expert_balancing(args: DPOConfig, coefficient: float) -> None:
    """Refuse, or report, that the load-balancing loss of a mixture of experts, which trl adds, is not added here.

    Args:
        args: trl's arguments.
        coefficient: of the load-balancing loss, from ``args`` or the model's config.

    Raises:
        ConfigError: the arguments ask for it.
    """
    if args.router_aux_loss_coef is not None:
        raise ConfigError(
            f"train.trainer.router_aux_loss_coef: found {coefficient:g}, expected 0 or none: the losses of this "
            "program do not balance experts",
            code="trainer-key",
            hint="leave it out, and train an adapter that leaves the routers as they are",
        )
    log.warning("the experts' load-balancing loss of this model (%g in its config) is not added", coefficient)
