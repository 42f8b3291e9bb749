"""The YAML of ``align iterate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config import Count, OutputFolder, PairsSection, Positive, Section, Seed, TrainSection
from align.config.data import LoadingSection
from align.config.decoding import CutsSection


class GenerateSection(CutsSection):
    """Sampling in each round."""

    n: Annotated[int, Field(ge=2)] = 4
    """Completions per prompt."""
    max_new_tokens: Count = 256
    """Tokens per completion, at most."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """``auto``: vLLM if it is installed and there is a GPU, else transformers."""
    batch_size: Count = 32
    """Completions per forward pass of the transformers engine."""
    options: dict[str, Any] = Field(default={})
    """Options that are passed to the engine."""

    @field_validator("engine", mode="before")
    @classmethod
    def _no_server(cls, value: Any) -> Any:
        if value == "server":
            raise ValueError(
                "found server, which serves one model, and each round samples from the policy that the round before "
                "has trained; use vllm, or make the rounds by hand: align generate --base-url, pairs build, train"
            )
        return value


class BuildSection(LoadingSection):
    """How completions become pairs; see ``align pairs build``."""

    reward_model: str | None = None
    """Hub id or folder of the reward model that scores completions."""
    judge: str | None = None
    """Exactly one of ``reward_model`` and ``judge`` is given."""
    mode: Literal["best_worst", "band", "all"] = "best_worst"
    """best_worst: the best completion against the worst; band: against the best of those within ``band`` below it; all:
    every two completions."""
    guard_margin: Annotated[float, Field(ge=0.0)] = 0.0
    """Drop a pair whose scores differ by less than this."""
    guard_ratio: float | None = None
    """Judge only: drop a pair whose rejected P(yes) exceeds this share, in (0, 1], of the chosen one."""
    band: tuple[float, float] | None = None
    """Least and largest difference of the scores, for ``mode: band``."""
    temperature: Positive = 1.0
    """Divisor of the scores in the margins that are written."""
    batch_tokens: Count = 4096
    """Padded tokens per scoring batch."""
    max_length: Count = 2048
    """Tokens per text that is scored; longer ones are truncated on the right."""


class IterateConfig(Section):
    """Rounds of sampling, pairing and training."""

    name: str
    """Name of the run, and of its folder."""
    output_dir: OutputFolder = "runs"
    """Folder in which the run writes its own, ``output_dir/name``."""
    seed: Seed = 0
    """Seed of every random number of the run."""
    rounds: Count = 3
    """Number of rounds."""
    prompts: PairsSection
    """Where prompts come from; they are split over the rounds."""
    generate: GenerateSection = GenerateSection()
    """Sampling of completions from the policy."""
    pairs: BuildSection
    """Building of pairs from the completions."""
    kl_prompts: Annotated[int, Field(ge=0)] = 32
    """Prompts of each round, at most, on which the KL of the policy that it samples from to the first one is measured;
    0: none. It takes one more sample of each prompt and one pass of both models. Not under a launcher."""
    train: TrainSection
    """Training with one method; ``model`` is the policy that the first round starts from."""

    @model_validator(mode="after")
    def _checked_together(self) -> "IterateConfig":
        if len(self.train.methods) != 1:
            raise ValueError(f"train.methods: found {len(self.train.methods)} methods, expected one")
        if self.prompts.near_copies:
            raise ValueError("prompts.near_copies: found true, which has no effect on prompts; leave it out")
        return self

    @property
    def folder(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output_dir) / self.name
