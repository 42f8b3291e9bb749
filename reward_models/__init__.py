"""Reward models: training, scoring, ensembles, calibration, and judges that give a completion a score or a preference.

Imports ``align.training`` and the packages below it; never ``align.filtering``, ``align.evaluation``,
``align.commands``, ``align.api`` or ``align.run``.

The names below are for Python; each is imported on first use, so that importing this package loads nothing heavy:

    RewardTrainer(model, args=RewardConfig("rm"), train_dataset=pairs).train()
    RewardModel.from_pretrained("rm").score_pairs(pairs)
"""

from typing import TYPE_CHECKING

from align.io.lazy import lazy_names

if TYPE_CHECKING:
    from reward_models.arguments import RewardConfig
    from reward_models.registry import OBJECTIVES
    from reward_models.reward_model import RewardModel
    from reward_models.trainer import RewardTrainer

WHERE = {
    "OBJECTIVES": "reward_models.registry",
    "RewardConfig": "reward_models.arguments",
    "RewardModel": "reward_models.reward_model",
    "RewardTrainer": "reward_models.trainer",
}
"""Public name -> its module."""

__all__ = ["OBJECTIVES", "RewardConfig", "RewardModel", "RewardTrainer"]

__getattr__, __dir__ = lazy_names(globals(), WHERE)
