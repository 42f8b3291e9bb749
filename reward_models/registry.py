"""Names in YAML (``reward.objective``) -> losses of a reward model with their parameters, defaults and ranges."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from align.config import ObjectiveSection, nearest
from align.config.columns import NAMES
from align.config.parameters import ANY, POSITIVE, Range, parameter_problems
from align.errors import ConfigError, DataError, listed
from reward_models import objectives

SHARE: Range = (-1e-12, 1.0 + 1e-12)


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """One entry of the registry."""

    name: str
    function: Callable[..., Tensor]
    """(reward_chosen, reward_rejected, columns by their names, **parameters) -> [B]."""
    defaults: Mapping[str, float | bool]
    summary: str
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Open intervals."""
    columns: tuple[str, ...] = ()
    """Columns of the pair table that the loss reads."""
    coupled: bool = False
    """The loss of a pair depends on the other pairs of the batch."""


@dataclass(frozen=True, slots=True)
class BoundObjective:
    """An objective with all its parameters."""

    spec: ObjectiveSpec
    parameters: Mapping[str, Any]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it reads."""
        return (*self.spec.columns, *(("group",) if self.parameters.get("within_group") else ()))

    def __call__(self, reward_chosen: Tensor, reward_rejected: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        """Loss [B] of rewards [B], [B]; ``columns`` [B] each."""
        own = {name: columns[name] for name in self.columns}
        return self.spec.function(reward_chosen, reward_rejected, **own, **self.parameters)


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
    ObjectiveSpec("bradley_terry", objectives.bradley_terry, {}, "every label alike"),
    ObjectiveSpec(
        "bradley_terry_margin",
        _with_margin,
        {"scale": 1.0},
        "Bradley-Terry that asks for a lead of scale * teacher_margin",
        {"scale": ANY},
        ("teacher_margin",),
    ),
    ObjectiveSpec(
        "comp_sum",
        objectives.comp_sum,
        {"tau": 1.5},
        "tau above 1 doubts labels it cannot explain",
        {"tau": (-1e-12, 4)},
    ),
    ObjectiveSpec(
        "margin_mse",
        objectives.margin_mse,
        {"scale": 1.0},
        "a teacher's margins, no label",
        {"scale": ANY},
        ("teacher_margin",),
    ),
    ObjectiveSpec(
        "auc",
        _auc,
        {"temperature": 1.0, "share": 1.0, "within_group": False},
        "every chosen response over every rejected one of the batch",
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
        "only the vote share of each bag of pairs is known; rho 0 bags, 1 pairs",
        {"rho": SHARE},
        ("bag", "vote_share"),
        coupled=True,
    ),
)
OBJECTIVES: dict[str, ObjectiveSpec] = {spec.name: spec for spec in SPECS}


def resolve_objective(config: ObjectiveSection) -> BoundObjective:
    """The objective that a configuration names, with its defaults.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    if config.name not in OBJECTIVES:
        raise ConfigError(
            f"reward.objective.name: {config.name!r} is not known{nearest(config.name, list(OBJECTIVES))}",
            code="objective-name",
        )
    spec = OBJECTIVES[config.name]
    problems = parameter_problems(spec.name, config.parameters, spec.defaults, spec.ranges)
    if problems:
        raise ConfigError(f"reward.objective.parameters:\n{listed(problems)}", code="objective-parameter")
    return BoundObjective(spec, {**spec.defaults, **config.parameters})


def objective_columns(pairs: Dataset, objective: BoundObjective) -> dict[str, list[float] | list[int]]:
    """What the objective reads of every pair: numbers as they are, names numbered in the order of their appearance.

    Raises:
        DataError: a column is missing or has gaps, a share is not in [0, 1] or differs within a bag.
    """
    made: dict[str, list[float] | list[int]] = {}
    for name in objective.columns:
        values = pairs[name] if name in pairs.column_names else []
        ids = pairs["id"] if "id" in pairs.column_names else range(len(pairs))
        gaps = [str(key) for key, value in zip(ids, values, strict=False) if value is None]
        if name not in pairs.column_names or gaps:
            found = f"none in pairs {', '.join(gaps[:3])}" if gaps else "no such column"
            raise DataError(
                f"{name}: found {found}, expected a value for every pair, for the objective {objective.spec.name}",
                code="objective-column",
                hint="map the column in `reward.pairs.columns`, or choose another `reward.objective`",
            )
        if name in NAMES:
            numbers: dict[str, int] = {}
            made[name] = [numbers.setdefault(str(value), len(numbers)) for value in values]
        else:
            made[name] = [float(value) for value in values]
    if "vote_share" in made:
        _check_shares(np.asarray(made["bag"]), np.asarray(made["vote_share"]), list(pairs["bag"]))
    return made


def _check_shares(bag: np.ndarray, share: np.ndarray, names: list[str]) -> None:
    outside = np.flatnonzero((share < 0) | (share > 1))
    first = np.full(bag.max() + 1, np.nan)
    first[bag[::-1]] = share[::-1]
    differing = np.flatnonzero(share != first[bag])
    for rows, found, expected in (
        (outside, "{:g}", "a share in [0, 1]"),
        (differing, "{:g} beside another share", "the same share in all pairs of a bag"),
    ):
        if rows.size:
            where = f"vote_share of bag {names[rows[0]]!r}"
            raise DataError(
                f"{where}: found {found.format(share[rows[0]])}, expected {expected}", code="objective-column"
            )
