"""Settings of a policy's training: its arguments, and what is refused before the policy loads."""

import os
from pathlib import Path
from typing import Any

from trl import DPOConfig

from align.config import Section, TrainSection
from align.distributed import world_size
from align.errors import ConfigError
from align.losses.registry import BoundLoss
from align.models.folders import is_adapter
from align.training.base.arguments import build_trainer_args
from align.training.held_out_settings import check_evaluation, evaluation_fields, set_choice
from align.training.preference_config import PreferenceConfig, own_copy, refuse_unused_fields


def policy_args(
    config: TrainSection, method: str, loss: BoundLoss, forced: dict[str, Any], *, reference_cache: Path | None = None
) -> PreferenceConfig:
    """Return the arguments for the training of a policy under ``config.methods[method]``.

    Args:
        config: section ``train``.
        method: key of ``config.methods``.
        loss: its loss.
        forced: fields that the program sets itself.
        reference_cache: folder that caches reference log-probs.

    Raises:
        ConfigError: see ``build_trainer_args`` and ``check_evaluation``.
    """
    check_evaluation(config, loss)
    options = config.methods[method]
    # what reads the reference's tokens runs it in every step; without an adapter that needs the model in memory
    every_step = options.token_mask is not None or loss.spec.tokens == "reference"
    defaults = {
        "precompute_ref_log_probs": not every_step or config.peft is not None,
        "save_strategy": "no",
        "logging_steps": 1,
    } | evaluation_fields(config)
    args = build_trainer_args(
        DPOConfig,
        defaults | config.trainer,
        path="train.trainer",
        forced=forced,
        pairs_per_step=config.pairs_per_step,
        evaluates=config.eval_pairs is not None,
    )
    cached = reference_cache is not None and args.precompute_ref_log_probs
    made = own_copy(
        args,
        loss=loss.spec.name,
        loss_kwargs=dict(loss.parameters),
        beta=loss.beta,
        layout=_layout(config),
        turns=config.turns,
        max_tokens_per_device=config.max_tokens_per_device,
        group_by_prompt=bool(config.group_by_prompt),
        pairs_per_step=config.pairs_per_step,
        async_checkpoints=config.async_checkpoints,
        reference_cache=str(reference_cache) if cached else None,
        pair_weights=_fields(options.weights),
        gradient_remedy=_fields(options.remedy),
        token_mask=_fields(options.token_mask),
    )
    set_choice(made, config)
    return made


def _layout(config: TrainSection) -> str:
    """The layout of a run; steps that measure themselves keep their rows apart."""
    within_steps = config.entanglement is not None and config.entanglement.probes == 0
    return "concatenated" if within_steps and config.layout == "auto" else config.layout


def _fields(section: Section | None) -> dict[str, Any] | None:
    return None if section is None else section.model_dump()


def check_settings(config: TrainSection, loss: BoundLoss, args: PreferenceConfig) -> None:
    """Refuse settings of a run that do not go together or have no effect.

    Args:
        config: section ``train``.
        loss: loss of the method.
        args: from ``policy_args``.

    Raises:
        ConfigError: the first problem.
    """
    _check_adapter(config.peft or {})
    check_training(args, loss, adapter=config.peft is not None or is_adapter(config.model))
    if args.learning_rate == 0:
        raise ConfigError(
            "train.trainer.learning_rate: found 0, expected more than 0: no weight would move", code="trainer-key"
        )
    if config.entanglement is not None and isinstance(args.pair_weights, dict) and args.pair_weights.get("votes"):
        raise ConfigError(
            "train.entanglement: found it together with weights.votes, whose loss has two labels for a pair",
            code="weights-loss",
            hint="measure the trained policy: `align entangle report`",
        )
    if config.eval_pairs is not None and loss.spec.unpaired:
        raise ConfigError(
            f"train.eval_pairs: found it under the loss {loss.spec.name}, which has no loss of a held-out pair",
            code="thumbs",
            hint="leave it out; train.eval_samples, a run's `evaluate`, and evaluate() in Python measure its policies",
        )
    if config.entanglement is not None:
        check_probe(loss, processes=world_size(), precomputed=args.precompute_ref_log_probs)


def check_training(args: PreferenceConfig, loss: BoundLoss, *, adapter: bool) -> None:
    """Refuse arguments that do not go together or have no effect, whoever made them.

    Args:
        args: arguments of the training.
        loss: its loss.
        adapter: an adapter is trained.

    Raises:
        ConfigError: the first problem.
    """
    refuse_unused_fields(args)
    if args.precompute_ref_log_probs and not adapter:
        if args.token_mask is not None:
            refuse_precomputed_tokens("a token_mask")
        if loss.spec.tokens == "reference":
            refuse_precomputed_tokens(loss.spec.name)
    _check_synced_reference(args, adapter)
    if args.group_by_prompt and args.train_sampling_strategy != "random":
        raise ConfigError(
            f"train.group_by_prompt: found it together with train_sampling_strategy {args.train_sampling_strategy}, "
            "which is another order",
            code="trainer-key",
            hint="leave one of them out",
        )
    if args.max_tokens_per_device is not None and (launched("DEEPSPEED") or args.deepspeed):
        refuse_split_batches()
    if args.layout == "shared_prefix" and args.neftune_noise_alpha:
        raise ConfigError(
            "train.layout: found shared_prefix together with neftune_noise_alpha, whose noise depends on the length of "
            "a row",
            code="layout",
            hint="set `layout: concatenated`, or `auto` to let the program choose",
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


def _check_synced_reference(args: PreferenceConfig, adapter: bool) -> None:
    """Refuse ``sync_ref_model`` where there is no reference model that it could move, or none that is saved."""
    if not args.sync_ref_model:
        return
    if adapter:
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
