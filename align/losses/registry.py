"""The losses of a policy by the names that YAML uses, with their parameters, defaults and ranges."""

from collections.abc import Mapping
from typing import Any

from align.losses.entries_likelihood import LIKELIHOOD_SPECS
from align.losses.entries_margin import MARGIN_SPECS
from align.losses.entries_reference import DPO_SPECS, RATIO_SPECS
from align.losses.entries_step import STEP_SPECS, TOKEN_SPECS
from align.losses.entries_unpaired import UNPAIRED_SPECS
from align.losses.registry_base import Registry
from align.losses.spec import BoundLoss, LossSpec

__all__ = ["ALIASES", "LOSSES", "BoundLoss", "LossSpec", "known_as", "resolve"]

LOSSES: Registry[LossSpec] = Registry(
    "loss", (*MARGIN_SPECS, *DPO_SPECS, *RATIO_SPECS, *LIKELIHOOD_SPECS, *STEP_SPECS, *TOKEN_SPECS, *UNPAIRED_SPECS)
)
ALIASES = {"sigmoid": "dpo", "sigmoid_norm": "ln_dpo", "sft": "nll", "dpo_norm": "ln_dpo"}
"""Names of other programs -> names here: trl's, and open-instruct's dpo_norm. trl's other names are the same."""


def known_as(name: str) -> str:
    """Name in the registry of a loss that another program calls ``name``; any other name is returned as it is."""
    return ALIASES.get(name, name)


def resolve(name: str, parameters: Mapping[str, Any]) -> BoundLoss:
    """Return the loss called ``name``, or that another program calls so, with its defaults and ``parameters``.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    return BoundLoss(*LOSSES.bind(known_as(name), parameters))
