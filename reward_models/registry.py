"""The objectives of a reward model by the names that YAML uses (``reward.objective``), with parameters and ranges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from torch import Tensor

from align.config import ObjectiveSection
from align.config.columns import NAMES
from align.config.parameters import ANY, POSITIVE, Range
from align.errors import DataError
from align.losses.registry_base import BoundFunction, FunctionSpec, Registry
from reward_models import objectives

SHARE: Range = (-1e-12, 1.0 + 1e-12)


@dataclass(frozen=True, slots=True)
class ObjectiveSpec(FunctionSpec):
    """One objective; ``function`` is (reward_chosen, reward_rejected, columns by name, **parameters) -> [B]."""

    coupled: bool = False
    """The loss of a pair depends on the other pairs of the batch."""


@dataclass(frozen=True, slots=True)
class BoundObjective(BoundFunction[ObjectiveSpec]):
    """An objective with all its parameters."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the pair table that it reads with these parameters."""
        return (*self.spec.columns, *(("group",) if self.parameters.get("within_group") else ()))

    def __call__(self, reward_chosen: Tensor, reward_rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss [B] of rewards [B], [B]; ``columns`` [B] each, others than its own are ignored."""
        inputs = {name: columns[name] for name in self.columns}
        return self.spec.function(reward_chosen, reward_rejected, **inputs, **self.parameters)


def _with_margin(reward_chosen: Tensor, reward_rejected: Tensor, teacher_margin: Tensor, *, scale: float) -> Tensor:
    return objectives.bradley_terry(reward_chosen, reward_rejected, scale * teacher_margin)


def _auc(
    reward_chosen: Tensor,
    reward_rejected: Tensor,
    group: Tensor | None = None,
    *,
    temperature: float,
    share: float,
    within_group: bool,
) -> Tensor:
    assert within_group == (group is not None)
    return objectives.auc(reward_chosen, reward_rejected, group, temperature=temperature, share=share)


SPECS = (
    ObjectiveSpec("bradley_terry", objectives.bradley_terry, {}, "the same trust in every label"),
    ObjectiveSpec(
        "bradley_terry_margin",
        _with_margin,
        {"scale": 1.0},
        "Bradley-Terry that asks for a lead of scale * teacher_margin",
        {"scale": ANY},
        columns=("teacher_margin",),
    ),
    ObjectiveSpec(
        "comp_sum",
        objectives.comp_sum,
        {"tau": 1.5},
        "tau above 1 gives less weight to labels that the model contradicts",
        {"tau": (-1e-12, 4)},
    ),
    ObjectiveSpec(
        "margin_mse",
        objectives.margin_mse,
        {"scale": 1.0},
        "regression on a teacher's margins, without labels",
        {"scale": ANY},
        columns=("teacher_margin",),
    ),
    ObjectiveSpec(
        "auc",
        _auc,
        {"temperature": 1.0, "share": 1.0, "within_group": False},
        "every chosen response against every rejected one of the batch",
        {"temperature": POSITIVE, "share": SHARE},
        coupled=True,
    ),
    ObjectiveSpec(
        "ldr_kl",
        objectives.ldr_kl,
        {"lam": 1.0, "margin": 0.1, "adaptive": False, "alpha": 2.0},
        "softplus with a margin and a softness, one per pair if adaptive",
        {"lam": POSITIVE, "margin": ANY, "alpha": (1.0, math.inf)},
    ),
    ObjectiveSpec(
        "aggregated",
        objectives.aggregated,
        {"rho": 0.5},
        "labels known only as the vote share of each bag; rho 0: mean of the bag, 1: every pair",
        {"rho": SHARE},
        columns=("bag", "vote_share"),
        coupled=True,
    ),
)
OBJECTIVES = Registry("objective", SPECS, section="reward.objective")


def resolve_objective(config: ObjectiveSection) -> BoundObjective:
    """Return the objective that a configuration names, with its defaults.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    return BoundObjective(*OBJECTIVES.bind(config.name, config.parameters))


def objective_columns(pairs: Dataset, objective: BoundObjective) -> dict[str, list[float] | list[int]]:
    """Return the columns that the objective reads: numbers as they are, names numbered in order of appearance.

    Raises:
        DataError: a column is missing or has gaps, a share is not in [0, 1] or differs within a bag.
    """
    columns: dict[str, list[float] | list[int]] = {}
    for name in objective.columns:
        values = pairs[name] if name in pairs.column_names else []
        ids = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
        missing = [str(key) for key, value in zip(ids, values, strict=False) if value is None]
        if name not in pairs.column_names or missing:
            found = f"none in pairs {', '.join(missing[:3])}" if missing else "no such column"
            raise DataError(
                f"{name}: found {found}, expected a value for every pair, for the objective {objective.spec.name}",
                code="objective-column",
                hint="map the column in `reward.pairs.columns`, or choose another `reward.objective`",
            )
        if name in NAMES:
            numbers: dict[str, int] = {}
            columns[name] = [numbers.setdefault(str(value), len(numbers)) for value in values]
        else:
            columns[name] = [float(value) for value in values]
    if "vote_share" in columns:
        _check_shares(np.asarray(columns["bag"]), np.asarray(columns["vote_share"]), list(pairs["bag"]))
    return columns


def _check_shares(bag: np.ndarray, share: np.ndarray, names: list[str]) -> None:
    outside = np.flatnonzero((share < 0) | (share > 1))
    first = np.full(bag.max() + 1, np.nan)
    first[bag[::-1]] = share[::-1]
    differing = np.flatnonzero(share != first[bag])
    for rows, found, expected in (
        (outside, "{:g}", "a share in [0, 1]"),
        (differing, "{:g} and another share", "the same share in all pairs of a bag"),
    ):
        if rows.size:
            where = f"vote_share of bag {names[rows[0]]!r}"
            raise DataError(
                f"{where}: found {found.format(share[rows[0]])}, expected {expected}", code="objective-column"
            )
