"""The reward model."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.config.base import Count, Fraction, Positive, Section
from align.config.data import PairsSection


class TiltSection(Section):
    """A weight of each pair from its loss, step by step (align/losses/pair_weights.py)."""

    kind: Literal["up", "down", "lin_upper", "quadratic", "extremes", "comp_sum"]
    """up, lin_upper: pairs of high loss count more; down, comp_sum: less; quadratic, extremes: the middle, the ends."""
    temperature: Positive = 1.0
    """The larger, the more alike the weights; of all kinds but comp_sum."""
    tau: Annotated[float, Field(ge=0.0)] = 1.5
    """comp_sum: weight sigmoid(z)^(tau - 1)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps with all weights alike before."""


class SharpnessSection(Section):
    """A penalty on how fast the margins change with the reward model's parameters (reward_models/sharpness.py)."""

    threshold: Positive = 0.1
    """radius * |gradient of the mean margin| above which the penalty grows."""
    radius: Positive = 0.05
    step: Positive = 0.05
    """Length of the step in parameter space between the two gradients that are compared."""
    start: Annotated[float, Field(ge=0.0)] = 1e-3
    """Multiplier of the penalty at the beginning."""
    rate: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the multiplier's change; 0 keeps it."""
    parameters: str | None = None
    """Regular expression: only trained parameters whose name matches; all where absent."""


class ObjectiveSection(Section):
    """One loss of reward_models/registry.py and its parameters."""

    name: str = "bradley_terry"
    parameters: dict[str, float | bool] = {}


class RewardSection(Section):
    """Training of the reward model whose margins weight the pairs."""

    model: str
    """Backbone: hub id or folder of any model that loads with a one-logit classification head."""
    pairs: PairsSection | None = None
    """Pairs to train on; the policy's own pairs where absent."""
    eval_pairs: PairsSection | None = None
    """Held-out pairs; a random ``eval_fraction`` of the prompts of ``pairs`` where absent."""
    eval_fraction: Fraction = 0.1
    folds: Annotated[int, Field(ge=0)] = 0
    """k >= 2: also train k models, each scoring only the pairs that it has not seen. 0: no cross-fitting."""
    objective: ObjectiveSection = ObjectiveSection()
    """What the reward model is trained to minimise (docs/reward-models.md)."""
    tilt: TiltSection | None = None
    """Weights of the pairs from their losses; absent: every pair alike."""
    sharpness: SharpnessSection | None = None
    """Absent: no such penalty. It costs two more forward and backward passes a step."""
    head: Literal["full", "logistic", "naive-bayes"] = "full"
    """full: fine-tuning; the others fit a linear head on the backbone's frozen features, in seconds."""
    ensemble: Count = 1
    """Models trained under different seeds: the margin is their mean, ``margin_std`` their spread."""
    calibrate: Literal["temperature", "isotonic"] | None = None
    """Fit a map on the held-out pairs that makes the margin the log-odds of the label, and apply it."""
    length_residual: bool = False
    """Take the part of the margin off that rises with the difference of lengths."""
    batch_tokens: Count = 4096
    """Padded tokens per scoring batch."""
    max_length: Count = 1024
    """Tokens per sequence; longer ones are cut from the right when training and scoring."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; full fine-tuning where absent."""
    pairs_per_step: Count | None = None
    """Pairs of an optimizer step over all processes, whatever their number; absent: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    async_checkpoints: bool = False
    """Where checkpoints are in parts (FSDP2, ``SHARDED_STATE_DICT``): write them while the training goes on, from a
    copy in the machine's memory. No effect elsewhere."""
    trainer: dict[str, Any] = {}
    """Fields of trl.RewardConfig, passed through unchanged; those of how the model is loaded and reads are refused."""

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True

    @model_validator(mode="after")
    def _folds_are_none_or_two(self) -> "RewardSection":
        if self.folds == 1:
            raise ValueError("folds must be 0 (no cross-fitting) or at least 2, got 1")
        return self

    @model_validator(mode="after")
    def _a_fitted_head_has_one_objective(self) -> "RewardSection":
        if self.head != "full" and (self.objective.name != "bradley_terry" or self.tilt or self.peft or self.sharpness):
            raise ValueError(
                f"head: {self.head} fits Bradley-Terry to frozen features: no objective, tilt, sharpness or peft"
            )
        return self
