"""Training of the policies: losses, weights of the pairs, measurements along the way."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from align.config.base import Count, Name, Positive, Section
from align.config.reward import TiltSection
from align.config.while_training import EarlyStoppingSection, EvalPairsSection, EvalSamplesSection, KeepSection

QUANTIZES = ("quantization_config", "load_in_4bit", "load_in_8bit")
"""Arguments of ``from_pretrained`` that quantize a model."""


class RemedySection(Section):
    """Remedy against gradient entanglement, applied in each step of a method."""

    kind: Literal["hold_chosen", "hold_batch", "normalise", "calibrate"]
    """hold_chosen: scale the rejected gradient down if a step on that pair would lower its chosen response; hold_batch:
    the same for a step on the batch; normalise: scale both gradients of a pair to one norm; calibrate: one factor per
    batch from running averages (align/entanglement/remedies.py)."""
    keep: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """hold_chosen, hold_batch: share, in [0, 1), of the chosen response's own rise in log-prob that it keeps."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.98
    """calibrate: decay per step of the running averages."""
    parameters: str | None = None
    """Regular expression for the names of trained parameters to measure; default: all."""


class TokenMaskSection(Section):
    """A learned sparse mask over the tokens that the loss sees (align/training/token_mask.py)."""

    sparsity: Positive = 0.1
    """Penalty, in units of the loss, for letting every token of a pair through."""
    rate: Positive = 0.05
    """Learning rate of the mask."""


class DistanceSection(Section):
    """Shrinking of the margin with the distance to the reward model's training pairs (column ``ood``)."""

    limit: Annotated[float, Field(ge=0.0)]
    """Distance up to which the margin does not shrink; ``filter.json`` has that of held-out training pairs."""
    softness: Positive = 1.0
    """Distance beyond ``limit`` over which the margin falls by a factor of e."""


class WeightsSection(Section):
    """Weights of the pairs, in addition to the loss's own (docs/concepts.md)."""

    spread: bool = False
    """Moderate the margin by its ensemble spread ``margin_std`` (align/losses/pair_weights.py)."""
    trust_by_spread: bool = False
    """Loss ``trust``: trust a margin less, the larger its ``margin_std``; the mean trust does not change."""
    votes: bool = False
    """Label each pair by the votes of its raters: the mean of the loss over them, a tie half a vote for each."""
    ood: DistanceSection | None = None
    """Shrink the margin toward 0 for pairs far from the reward model's training pairs; default: no shrinking."""
    tilt: TiltSection | None = None
    """Weights from the losses of each step, over all processes; default: none."""
    normalise: bool = False
    """Divide the table's weights (MADPO's and the ``weight`` column's) by their mean."""


class LossTerms(Section):
    """A weighted sum of losses (align/losses/sums.py, which checks the terms)."""

    terms: Annotated[dict[str, Any], Field(min_length=1)]
    """Name in the registry -> its weight, above 0, or ``{weight: ..., parameters: {...}}``."""


def _name_or_terms(value: Any) -> Any:
    if value is None or isinstance(value, str | LossTerms):
        return value
    if isinstance(value, dict) and set(value) == {"terms"} and isinstance(value["terms"], dict) and value["terms"]:
        return value
    raise ValueError(f"expected the name of a loss, or `{{terms: {{name: weight, ...}}}}`, found {str(value)[:80]}")


class LossSection(Section):
    """One loss of the registry (docs/losses.md) or a weighted sum of several, and the parameters."""

    loss: Annotated[str | LossTerms | None, BeforeValidator(_name_or_terms)]
    """Name in the registry: madpo, soft_madpo, dpo, ipo, ...; or ``terms``, a weighted sum."""
    loss_type: str | list[str] | None = None
    """In place of ``loss``: trl's field of this name, with trl's defaults for the parameters."""
    loss_weights: list[float] | None = None
    """Weights of the names in ``loss_type``; default: 1 each."""
    parameters: dict[str, float | bool] = {}
    """Keyword parameters of the loss and, for madpo, of its weight; the others keep their defaults. Every term of a sum
    gets those that it knows."""
    weights: WeightsSection | None = None
    """Weights of the pairs; default: the loss's own weight and the ``weight`` column."""
    remedy: RemedySection | None = None
    """Remedy against gradient entanglement; default: none."""
    token_mask: TokenMaskSection | None = None
    """Learned mask over tokens; default: the loss sees every token of a response."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loss or of all terms, as they are written."""
        if self.loss_type is not None:
            return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)
        return (self.loss,) if isinstance(self.loss, str) else tuple(self.loss.terms if self.loss else ())

    @model_validator(mode="before")
    @classmethod
    def _loss_type_in_place_of_loss(cls, data: Any) -> Any:
        return {"loss": None} | data if isinstance(data, dict) and "loss_type" in data else data

    @model_validator(mode="after")
    def _one_way_to_name_it(self) -> "LossSection":
        if (self.loss is None) == (self.loss_type is None):
            found = "neither" if self.loss is None else "both"
            raise ValueError(f"expected `loss`, or trl's `loss_type`, found {found}")
        if self.loss_weights is not None and not isinstance(self.loss_type, list):
            raise ValueError("`loss_weights` belongs to a list in `loss_type`; write `loss: {terms: {dpo: 1.0}}`")
        if self.loss_type == []:
            raise ValueError("loss_type: expected at least one name, found []")
        return self


class EntanglementSection(Section):
    """Measurements of gradient entanglement during training."""

    every: Count = 50
    """Optimizer steps between two measurements."""
    probes: Annotated[int, Field(ge=0)] = 8
    """Number of pairs that are measured before and after these steps: a fair sample of the table, drawn by a hash of
    the ids. 0: only the batch of the step is measured, within the step itself if ``layout`` is ``concatenated`` (which
    ``auto`` then takes), so that ``every: 1`` costs a part of a step and not another one."""


class TrainSection(Section):
    """Alignment of the policy: the same model, data and budget under each loss."""

    model: str
    """Policy, and its reference unless ``reference`` names another: hub id or folder."""
    methods: Annotated[dict[Name, LossSection], Field(min_length=1)]
    """Name of a method (its folder and its label in the report) -> its loss."""
    reference: str | None = None
    """Another reference of the losses: hub id or folder of a model, or of an adapter, with the policy's tokenizer.
    Default: the model as it is before training."""
    peft: dict[str, Any] | None = None
    """Fields of peft.LoraConfig; default: full fine-tuning."""
    trust: Literal["auto"] | None = None
    """auto: methods with the loss ``trust`` get slope, trust and strength from the pairs (docs/whom-to-trust.md),
    unless their ``parameters`` give them."""
    allow_in_sample: bool = False
    """Allow ``trust: auto`` to read margins of a reward model that has seen the pairs' labels."""
    layout: Literal["auto", "concatenated", "shared_prefix"] = "auto"
    """How log-probs are computed. shared_prefix: each prompt once for both responses; concatenated: row by row, as trl
    does; auto: shared_prefix if it is exact for the model."""
    turns: Literal["assistant", "all", "last"] = "assistant"
    """Whose words count in responses of several messages. assistant: the assistant's; last: those of its last message;
    all: everybody's, as in trl."""
    max_tokens_per_device: Count | None = None
    """Tokens per forward pass; a larger batch is split without changing its gradient. Default: never split."""
    group_by_prompt: Literal[True] | None = None
    """Let the pairs of a prompt follow each other in an epoch: those in a batch share its tokens, and their own where
    they have a response in common (docs/performance.md). Default: any order."""
    eval_pairs: EvalPairsSection | None = None
    """Pairs to evaluate on while training; default: nothing is held out (docs/training.md)."""
    eval_samples: EvalSamplesSection | None = None
    """Sample the policy while it trains; default: not sampled."""
    keep: KeepSection | None = None
    """Which checkpoint becomes the trained model; default: the last step."""
    early_stopping: EarlyStoppingSection | None = None
    """Stop when the held-out metric no longer improves; default: all steps are made."""
    entanglement: EntanglementSection | None = None
    """Measure pairs during training; default: not measured."""
    pairs_per_step: Count | None = None
    """Pairs per optimizer step over all processes, whatever their number; default: per_device_train_batch_size x
    gradient_accumulation_steps x processes."""
    async_checkpoints: bool = False
    """Write sharded checkpoints (FSDP2, ``SHARDED_STATE_DICT``) from a copy in CPU memory while training continues. No
    effect on other checkpoints."""
    trainer: dict[str, Any] = {}
    """Fields of trl.DPOConfig; those that would have no effect here are refused. Weights are float32 unless
    ``model_init_kwargs`` has a ``dtype``."""

    @field_validator("methods")
    @classmethod
    def _no_method_is_the_reference(cls, methods: dict[str, LossSection]) -> dict[str, LossSection]:
        if "reference" in methods:
            raise ValueError("`reference` is the model that is trained from: give the method another name")
        return methods

    @property
    def trusts_remote_code(self) -> bool:
        """``trainer.trust_remote_code``: whether code that comes with the model may run."""
        return self.trainer.get("trust_remote_code") is True

    @property
    def quantization(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` that quantize the policy, and so its reference; empty if none do."""
        given = self.trainer.get("model_init_kwargs")
        if not isinstance(given, dict):
            return {}
        chosen = {name: given[name] for name in QUANTIZES if given.get(name)}
        return chosen and {"dtype": given.get("dtype", "float32")} | chosen

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` with which other stages load the policy or its reference, as training."""
        return ({"trust_remote_code": True} if self.trusts_remote_code else {}) | self.quantization
