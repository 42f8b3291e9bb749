"""The stages of a run, in order, and the names that stages share."""

from align.config import RunConfig

REVISIONS = (
    dict.fromkeys(("margins", "filter"), 4)
    | dict.fromkeys(("reward", "crossfit", "sample", "train", "evaluate", "trust"), 5)
    | {"pairs": 6, "generate": 6}
)
"""Revision of each kind of stage, part of its key: raise it when the same inputs give another result. The key of a kind
that is not listed has none."""
LOSS_REVISIONS = {"beta_dpo": 2}
"""Revision of a loss that gives another result than before, part of the key of trainings under it."""
PROBES_REVISION = 2
"""Revision of the pairs that ``train.entanglement`` measures, part of the key of trainings that have it."""
REFERENCE = "reference"
"""Name of the policy that training starts from."""
TRUST = "trust"
"""Name of a stage, and of the loss whose parameters it measures."""
REFERENCE_CACHE = "reference-logps"
"""Folder of the reference's log-probs, which the methods of a run share."""
HELD_OUT = "heldout"
"""Name of the stage that divides the policy's pairs into those to train on and those to evaluate on meanwhile."""
TRUST_NUMBERS = "parameters.json"
"""File of the stage ``trust`` with the parameters of the loss."""
TOGETHER = frozenset({"reward", "crossfit", "margins", HELD_OUT, "train"})
"""Kinds of stages that all processes of a launcher work on together; the first process does the others alone."""


def plan(config: RunConfig) -> list[str]:
    """Names of the stages of a run, in order; each stage has a folder of its name."""
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
    if holds_out(config):
        stages.append(HELD_OUT)
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
    """Whether a method's trust is measured on the pairs."""
    train = config.train
    return train is not None and train.trust == "auto" and any(TRUST in m.names for m in train.methods.values())


def holds_out(config: RunConfig) -> bool:
    """Whether a run holds pairs out of the policy's training."""
    return config.train is not None and config.train.eval_pairs is not None
