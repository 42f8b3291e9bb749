"""The YAML of ``align iterate``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from align.config import Count, OutputFolder, PairsSection, Positive, Section, Seed, TrainSection


class GenerateSection(Section):
    """Sampling of every round."""

    n: Annotated[int, Field(ge=2)] = 4
    """Completions of each prompt."""
    max_new_tokens: Count = 256
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    batch_size: Count = 32
    options: dict[str, Any] = Field(default={})
    """Passed to the engine."""

    @field_validator("engine", mode="before")
    @classmethod
    def _no_server(cls, value: Any) -> Any:
        if value == "server":
            raise ValueError(
                "found server, which serves one model, and each round samples from the policy that the round before "
                "has trained; use vllm, or make the rounds by hand: align generate --base-url, pairs build, train"
            )
        return value


class BuildSection(Section):
    """How completions become pairs; see ``align pairs build``."""

    reward_model: str | None = None
    judge: str | None = None
    """Exactly one of ``reward_model`` and ``judge`` is given."""
    mode: Literal["best_worst", "band", "all"] = "best_worst"
    guard_margin: Annotated[float, Field(ge=0.0)] = 0.0
    guard_ratio: float | None = None
    band: tuple[float, float] | None = None
    temperature: Positive = 1.0
    batch_tokens: Count = 4096
    max_length: Count = 2048


class IterateConfig(Section):
    """Rounds of sampling, pairing and training."""

    name: str
    output_dir: OutputFolder = "runs"
    seed: Seed = 0
    rounds: Count = 3
    prompts: PairsSection
    """Where prompts come from; they are dealt out to the rounds."""
    generate: GenerateSection = GenerateSection()
    pairs: BuildSection
    train: TrainSection
    """With one method; ``model`` is where the first round starts."""

    @model_validator(mode="after")
    def _one_method(self) -> "IterateConfig":
        if len(self.train.methods) != 1:
            raise ValueError(f"train.methods: found {len(self.train.methods)} methods, expected one")
        return self

    @property
    def folder(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output_dir) / self.name
