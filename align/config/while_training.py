"""Evaluation while a policy trains: held-out pairs, samples, which checkpoint is kept and when a training stops."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from align.config.base import Count, Positive, Section, Seed
from align.config.data import PairsSection, refuse_checked

Rule = Literal["held_out_loss", "win_rate", "gold_per_root_kl"]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
SOURCE_FIELDS = ("split", "subset", "columns", "drop_invalid", "limit", "overlap")


class EvalPairsSection(PairsSection):
    """Pairs that no policy of the run is trained on: a source of their own, or a share of the run's pairs."""

    path: str = ""
    """Source, as ``pairs.path``. Exactly one of ``path`` and ``share`` is given."""
    share: Share | None = None
    """Share of the run's own pairs to hold out; pairs that share a prompt or a response stay on one side."""
    seed: Seed | None = None
    """Seed of the split, with ``share``; default: the run's."""
    overlap: Literal["refuse", "remove"] = "refuse"
    """What happens to pairs of ``path`` with a prompt and response that is trained on: the run is refused, or they are
    left out of the held-out pairs."""

    @model_validator(mode="after")
    def _one_source(self) -> "EvalPairsSection":
        refuse_checked(self, "eval_pairs")
        if bool(self.path) == (self.share is not None):
            found = "both" if self.path else "neither"
            raise ValueError(f"expected `path` (a source of pairs) or `share` (of the run's own), found {found}")
        given = [name for name in SOURCE_FIELDS if name in self.model_fields_set]
        if self.share is not None and given:
            raise ValueError(f"`{given[0]}` belongs to `path`: a share has the columns of the run's own pairs")
        if self.share is None and self.seed is not None:
            raise ValueError("`seed` belongs to `share`: the pairs of a source are all held out")
        return self


class EvalSamplesSection(Section):
    """What the policy writes for held-out prompts while it trains."""

    prompts: str | None = None
    """A file with one ``prompt`` per row, as in ``pairs.path``; default: the prompts of ``eval_pairs``."""
    limit: Count = 48
    """Prompts to sample for, at most: a fair sample drawn by a hash of the prompts."""
    every: Count
    """Optimizer steps between two samplings; the start and the end are always sampled."""
    n: Count = 1
    """Samples per prompt."""
    max_new_tokens: Count = 64
    """Tokens per sample, at most."""
    temperature: Positive = 1.0
    """Divisor of the logits."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling: probability that the tokens sampled from hold together."""
    batch_size: Count = 32
    """Samples per forward pass."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Arguments of the chat template for all prompts of a file; a prompt's own come first."""

    @model_validator(mode="after")
    def _arguments_of_a_file(self) -> "EvalSamplesSection":
        if self.chat_template_kwargs and self.prompts is None:
            raise ValueError("`chat_template_kwargs` belongs to `prompts`: those of eval_pairs have their own")
        return self


class KeepSection(Section):
    """Which checkpoint becomes the trained model."""

    rule: Rule
    """held_out_loss: the lowest loss on ``eval_pairs``; win_rate: the highest win rate of ``eval_samples`` against the
    start; gold_per_root_kl: the highest gain by the judge / sqrt(2 KL) of ``eval_samples``."""
    kl_at_most: Positive | None = None
    """Largest KL to the reference, nats per response: along the held-out responses for held_out_loss, of the samples
    for the other rules. Default: no limit."""


class EarlyStoppingSection(Section):
    """End of a training that no longer improves (transformers' EarlyStoppingCallback)."""

    patience: Count = 3
    """Evaluations without improvement after which the training ends."""
    threshold: Annotated[float, Field(ge=0.0)] = 0.0
    """Change of the metric that counts as an improvement, at least."""
