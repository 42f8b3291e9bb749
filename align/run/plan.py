"""Which stages a run has, in which order, and what each depends on."""

from align.config import RunConfig

STAGES = dict.fromkeys(("pairs", "reward", "crossfit", "sample", "margins", "filter", "generate", "evaluate"), 2)
STAGES |= {"reward": 3, "crossfit": 3}
"""Stages of a run; others are in their first."""
REFERENCE = "reference"
TRUST = "trust"
REFERENCE_CACHE = "reference-logps"
TRUST_NUMBERS = "parameters.json"
TOGETHER = frozenset({"reward", "crossfit", "margins", "train"})
"""Kinds of stages that the processes of a launcher do together; the others the first does alone."""


def plan(config: RunConfig) -> list[str]:
    """Names of the stages of a run, in order; each is a folder of the run."""
    stages = []
    if config.pairs is not None:
        stages.append("pairs")
    if config.reward is not None:
        if config.reward.pairs is not None:
            stages.append("pairs-reward")
        stages.append("reward")
        if config.reward.folds:
            stages.append("crossfit")
    if config.sample is not None:
        stages.append("sample")
    stages.append("margins")
    if config.filter is not None:
        stages.append("filter")
    if config.train is not None:
        if measures_trust(config):
            stages.append("trust")
        stages += [f"train-{method}" for method in config.train.methods]
        if config.evaluate is not None:
            stages += [f"generate-{policy}" for policy in (REFERENCE, *config.train.methods)]
            stages.append("evaluate")
    return stages


def measures_trust(config: RunConfig) -> bool:
    """Whether a method takes its trust from the pairs."""
    train = config.train
    return train is not None and train.trust == "auto" and any(m.loss == TRUST for m in train.methods.values())
