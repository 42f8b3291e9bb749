"""The policy's training: losses, what weights their pairs, what is measured on the way."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from align.config.base import Count, Name, Positive, Section
from align.config.reward import TiltSection


class RemedySection(Section):
    """What is done about gradient entanglement in each step of a method."""

    kind: Literal["hold_chosen", "hold_batch", "normalise", "calibrate"]
    """hold_chosen: less of the rejected gradient where a step on that pair would lower its chosen response; hold_batch:
    the same for a step on the whole batch; normalise: both gradients of a pair of one length; calibrate: one factor per
    batch from running averages (align/entanglement/remedies.py)."""
    keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """hold_chosen, hold_batch: share of its rise that a chosen response keeps."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """calibrate: of the running averages."""
    parameters: str | None = None
    """Regular expression: measure only parameters whose name matches; all trained ones where absent."""


class TokenMaskSection(Section):
    """A learned sparse mask over the tokens that the loss sees (align/training/token_mask.py)."""

    sparsity: Positive = 0.1
    """Price, in units of the loss, of letting every token of a pair through."""
    rate: Positive = 0.05
    """Learning rate of the mask."""


class DistanceSection(Section):
    """How the margin shrinks with the distance to the reward model's training pairs (column ``ood``)."""

    limit: Annotated[float, Field(ge=0.0)]
    """Distance up to which nothing shrinks; ``filter.json`` has that of held-back training pairs."""
    softness: Positive = 1.0
    """Distance beyond it over which the margin falls by the factor e."""


class WeightsSection(Section):
    """How much each pair counts beside the loss's own weight (docs/concepts.md)."""

    spread: bool = False
    """Moderate the margin by its ensemble spread ``margin_std``."""
    trust_by_spread: bool = False
    """Loss ``trust``: believe a margin less, the larger its ``margin_std``, and as far as before in the mean."""
    ood: DistanceSection | None = None
    """Shrink the margin towards 0 where the pair is unlike those that the reward model was trained on."""
    tilt: TiltSection | None = None
    """Weights from the losses of each step, over all processes."""
    normalise: bool = False
    """Divide the table's weights (MADPO's and the ``weight`` column's) by their mean."""


class LossSection(Section):
    """One loss of the registry in align/losses/pairwise.py and its parameters."""

    loss: str
    """Name in the registry: madpo, soft_madpo, dpo, ipo, ..."""
    parameters: dict[str, float | bool] = {}
    """Keyword parameters of the loss and, for madpo, of its weight."""
    weights: WeightsSection | None = None
    """Absent: the loss's own weight, and the pairs' ``weight`` column."""
    remedy: RemedySection | None = None
    """Absent: the loss as it is."""
    token_mask: TokenMaskSection | None = None
    """Absent: the loss sees every token of a response."""


class EntanglementSection(Section):
    """Gradient entanglement along training."""

    every: Count = 50
    """Optimizer steps from one measurement to the next."""
    probes: Count = 8
    """Pairs, the first of the table, that are measured each time."""


class TrainSection(Section):
    """Alignment of the policy: the same model, data and budget under each loss."""

    model: str
    """Policy and reference: hub id or folder."""
    methods: Annotated[dict[Name, LossSection], Field(min_length=1)]
    """Name of a method (a folder name and a label in the report) -> its loss."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; full fine-tuning where absent."""
    trust: Literal["auto"] | None = None
    """auto: methods with the loss ``trust`` get their slope, trust and strength from the pairs (docs/whom-to-trust.md),
    except those that their ``parameters`` give."""
    allow_in_sample: bool = False
    """Let ``trust: auto`` read margins of a reward model that has seen the pairs' labels."""
    layout: Literal["auto", "concatenated", "shared_prefix"] = "auto"
    """How log-probs are computed: prompts once for both responses wherever that is exact, or row by row as trl does."""
    max_tokens_per_device: Count | None = None
    """Tokens of one forward pass; a larger batch is split without changing its gradient."""
    entanglement: EntanglementSection | None = None
    """Measure probe pairs along training; absent: not measured."""
    pairs_per_step: Count | None = None
    """Pairs of an optimizer step over all processes, whatever their number; absent: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    async_checkpoints: bool = False
    """Where checkpoints are in parts (FSDP2, ``SHARDED_STATE_DICT``): write them while the training goes on, from a
    copy in the machine's memory. No effect elsewhere."""
    trainer: dict[str, Any] = {}
    """Fields of trl.DPOConfig, passed through unchanged."""

    @field_validator("methods")
    @classmethod
    def _no_method_is_the_reference(cls, methods: dict[str, LossSection]) -> dict[str, LossSection]:
        if "reference" in methods:
            raise ValueError("`reference` is the model that is trained from: give the method another name")
        return methods

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True
