"""One run, from pairs to report."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from align.config.base import Count, Name, OutputFolder, Positive, Section, Seed
from align.config.cluster import ClusterSection
from align.config.data import FilterSection, PairsSection, SampleSection
from align.config.reading import load_section
from align.config.reward import RewardSection
from align.config.train import TrainSection


class EvaluateSection(Section):
    """What is measured on held-out prompts."""

    prompts: str
    """A .jsonl file with one ``prompt`` per line, none of which was trained on."""
    judge: Literal["vader"] = "vader"
    """Independent gold judge; never trained, never used as a label."""
    max_new_tokens: Count = 24
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count = 64
    samples_shown: Annotated[int, Field(ge=0)] = 20


class RunConfig(Section):
    """One run from pairs to report."""

    name: Name
    output_dir: OutputFolder = "runs"
    """The run writes ``output_dir/name``."""
    seed: Seed = 0
    pairs: PairsSection | None = None
    """The policy's preference pairs. Exactly one of ``pairs`` and ``sample`` is given."""
    sample: SampleSection | None = None
    reward: RewardSection | None = None
    """Absent: the pairs bring their own ``margin`` column, or no method needs one."""
    filter: FilterSection | None = None
    """Absent: the policy is trained on all pairs."""
    train: TrainSection | None = None
    """Absent: the run ends with the reward model and its margins."""
    evaluate: EvaluateSection | None = None
    cluster: ClusterSection | None = None
    """Absent: this machine, or the processes of a launcher."""

    @model_validator(mode="after")
    def _one_source_of_pairs(self) -> "RunConfig":
        if (self.pairs is None) == (self.sample is None):
            raise ValueError("give exactly one of `pairs` (a dataset) and `sample` (prompts to sample pairs from)")
        if self.sample is not None and (self.reward is None or self.reward.pairs is None or self.train is None):
            raise ValueError("`sample` needs `train` and `reward.pairs`: the reward model is trained on other pairs")
        if self.evaluate is not None and self.train is None:
            raise ValueError("`evaluate` needs `train`: there is no policy to evaluate")
        if self.reward is None and self.train is None:
            raise ValueError("give `reward`, `train` or both: there is nothing to do")
        return self

    @property
    def folder(self) -> Path:
        """Folder that holds everything this run writes."""
        return Path(self.output_dir) / self.name


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML, apply ``a.b=c`` overrides, validate.

    Raises:
        ConfigError: file missing, not YAML, unknown key, ill-typed value; all problems of the file at once.
    """
    return load_section(path, overrides, RunConfig)
