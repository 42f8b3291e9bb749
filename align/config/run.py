"""One run, from pairs to report."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from align.config.base import Name, OutputFolder, Section, Seed
from align.config.cluster import ClusterSection
from align.config.data import FilterSection, PairsSection, SampleSection
from align.config.decoding import DecodingSection
from align.config.judging import Judges, JudgeSection
from align.config.reading import load_section
from align.config.reward import RewardSection
from align.config.train import TrainSection


class EvaluateSection(DecodingSection):
    """Evaluation of the policies on held-out prompts."""

    prompts: str
    """A file with one ``prompt`` per row, as in ``pairs.path``; none of them may have been trained on."""
    judge: Judges = []
    """The judge, or a list of judges of which the first is the main one: the folder or hub id of a reward model,
    ``yes-no:MODEL``, ``llm:MODEL``, ``server:MODEL`` or ``vader``. There is no default. A judge should be independent:
    neither trained on the pairs nor used for their labels."""
    samples_shown: Annotated[int, Field(ge=0)] = 20
    """Prompts whose completions the report shows."""

    @model_validator(mode="after")
    def _no_server(self) -> "EvaluateSection":
        if self.engine == "server" or self.base_url is not None or self.served_as is not None:
            raise ValueError(
                "engine: found a server, expected auto, vllm or transformers: the policies are those that this run "
                "trains, and no server has them"
            )
        return self

    @property
    def scoring(self) -> JudgeSection | None:
        """The first judge that gives scores, which also judges samples while a policy trains; None if all compare."""
        return next((judge for judge in self.judge if not judge.compares), None)


class RunConfig(Section):
    """One run from pairs to report."""

    name: Name
    """Name of the run, and of its folder."""
    output_dir: OutputFolder = "runs"
    """Folder in which the run writes its own, ``output_dir/name``."""
    seed: Seed = 0
    """Seed of every random number of the run."""
    pairs: PairsSection | None = None
    """The policy's preference pairs. Exactly one of ``pairs`` and ``sample`` is given."""
    sample: SampleSection | None = None
    """Prompts from which the policy's pairs are sampled."""
    reward: RewardSection | None = None
    """Reward model; default: the pairs bring their own ``margin`` column, or no method needs one."""
    filter: FilterSection | None = None
    """Filter of the pairs; default: the policy is trained on all of them."""
    train: TrainSection | None = None
    """Training of the policies; default: the run ends with the reward model and its margins."""
    evaluate: EvaluateSection | None = None
    """Evaluation of the policies; default: none."""
    cluster: ClusterSection | None = None
    """Ray cluster for scoring, filtering and sampling; default: this machine, or the processes of a launcher."""

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
