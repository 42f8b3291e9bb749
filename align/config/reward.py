"""Training of the reward model, and what its margins become."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.config.base import Count, Fraction, Positive, Section
from align.config.data import PairsSection, refuse_checked
from align.config.judging import Dtype


class TiltSection(Section):
    """Weights of the pairs from their losses in each step (align/losses/pair_weights.py)."""

    kind: Literal["up", "down", "lin_upper", "quadratic", "extremes", "comp_sum"]
    """Which pairs count more. up, lin_upper: those with a high loss; down, comp_sum: with a low loss; quadratic: in the
    middle; extremes: at both ends."""
    temperature: Positive = 1.0
    """Temperature in units of the loss; the larger, the more equal the weights. Not used by comp_sum."""
    tau: Annotated[float, Field(ge=0.0)] = 1.5
    """comp_sum: the weight is sigmoid(z)^(tau - 1)."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps at the start in which all weights are equal."""


class SharpnessSection(Section):
    """A penalty on how fast the margins change with the reward model's parameters (reward_models/sharpness.py)."""

    threshold: Positive = 0.1
    """Value of radius * |gradient of the mean margin| above which the penalty grows."""
    radius: Positive = 0.05
    """Radius in parameter space within which margins should hardly change."""
    step: Positive = 0.05
    """Length of the finite-difference step in parameter space."""
    start: Annotated[float, Field(ge=0.0)] = 1e-3
    """Multiplier of the penalty at the beginning."""
    rate: Annotated[float, Field(ge=0.0)] = 1e-3
    """Learning rate of the multiplier; 0 keeps it constant."""
    parameters: str | None = None
    """Regular expression for the names of trained parameters to include; default: all."""


class ObjectiveSection(Section):
    """One loss of reward_models/registry.py and its parameters."""

    name: str = "bradley_terry"
    """Name in the registry."""
    parameters: dict[str, float | bool] = {}
    """Keyword parameters of the objective; the others keep their defaults."""


class RewardSection(Section):
    """Training of the reward model that gives the pairs their margins."""

    model: str
    """Backbone: hub id or folder of a model that loads with a one-logit classification head."""
    pairs: PairsSection | None = None
    """Pairs to train on; default: the policy's own pairs."""
    eval_pairs: PairsSection | None = None
    """Held-out pairs; default: a random ``eval_fraction`` of the prompts of ``pairs``."""
    eval_fraction: Fraction = 0.1
    """Share of the pairs to hold out, split by prompt; no effect if ``eval_pairs`` is given."""
    folds: Annotated[int, Field(ge=0)] = 0
    """k >= 2: also train k models, each of which scores only the pairs that it has not seen. 0: no cross-fitting."""
    objective: ObjectiveSection = ObjectiveSection()
    """Loss of the reward model (docs/reward-models.md)."""
    tilt: TiltSection | None = None
    """Weights of the pairs from their losses; default: all pairs weigh the same."""
    sharpness: SharpnessSection | None = None
    """Penalty on sharp margins, which costs two more forward and backward passes per step; default: none."""
    head: Literal["full", "logistic", "naive-bayes"] = "full"
    """full: fine-tuning; logistic, naive-bayes: a linear head fitted to the backbone's frozen features, in seconds."""
    covariates: list[str] = []
    """Known causes of the labels that should not count: ``length`` (in words), or columns of numbers with the
    difference of the two responses, chosen minus rejected. They are in the training and out of the score."""
    ensemble: Count = 1
    """Number of models, each with its own seed: ``margin`` is their mean, ``margin_std`` their standard deviation."""
    calibrate: Literal["temperature", "isotonic"] | None = None
    """Fit on the held-out pairs a map from margins to log-odds of the label, and apply it; default: no map."""
    length_residual: bool = False
    """Subtract the part of the margin that is linear in the difference of lengths (words)."""
    batch_tokens: Count = 4096
    """Padded tokens per scoring batch."""
    max_length: Count = 1024
    """Tokens per sequence; longer ones are truncated on the right in training and scoring."""
    dtype: Dtype | None = None
    """Dtype of the backbone's weights while it scores: pairs, samples, held-out pairs; the head is always in float32.
    Default: float32, and in 16 bits a margin may depend on the batch. Training has ``trainer.bf16``."""
    text_pair: bool = False
    """Encoders only: read prompt and response as a sentence pair, ``tokenizer(prompt, response)``. It is kept in the
    model's config.json, and a model that has it there needs no word here."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; default: full fine-tuning."""
    pairs_per_step: Count | None = None
    """Pairs per optimizer step over all processes, whatever their number; default: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    async_checkpoints: bool = False
    """Write sharded checkpoints (FSDP2, ``SHARDED_STATE_DICT``) from a copy in CPU memory while training continues. No
    effect on other checkpoints."""
    trainer: dict[str, Any] = {}
    """Fields of trl.RewardConfig, passed through unchanged; those that load the model or its tokenizer are refused."""

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: whether code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True

    @model_validator(mode="after")
    def _folds_are_none_or_two(self) -> "RewardSection":
        if self.folds == 1:
            raise ValueError("folds must be 0 (no cross-fitting) or at least 2, got 1")
        return self

    @model_validator(mode="after")
    def _covariates_have_labels_to_explain(self) -> "RewardSection":
        if len(set(self.covariates)) < len(self.covariates):
            raise ValueError("covariates: found a name twice")
        if self.covariates and self.head == "naive-bayes":
            raise ValueError("covariates have no effect on head: naive-bayes, which takes each feature by itself")
        return self

    @model_validator(mode="after")
    def _checked_pairs_are_trained_on(self) -> "RewardSection":
        refuse_checked(self.eval_pairs, "eval_pairs")
        return self

    @model_validator(mode="after")
    def _a_fitted_head_has_one_objective(self) -> "RewardSection":
        if self.head != "full" and (self.objective.name != "bradley_terry" or self.tilt or self.peft or self.sharpness):
            raise ValueError(
                f"head: {self.head} fits Bradley-Terry to frozen features: no objective, tilt, sharpness or peft"
            )
        return self
