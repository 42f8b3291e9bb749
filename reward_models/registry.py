"""The objectives of a reward model by the names that YAML uses (``reward.objective``), with parameters and ranges."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from align.config import ObjectiveSection, nearest
from align.config.columns import NAMES, NUMBERS, THUMB, VOTES
from align.config.parameters import ANY, POSITIVE, Range
from align.data.thumbs import refuse_thumbs
from align.data.votes import refuse_without_majority
from align.errors import AlignError, ConfigError, DataError
from align.io.console import log
from align.losses.registry_base import BoundFunction, FunctionSpec, Registry
from reward_models import objectives, vote_objectives

SHARE: Range = (-1e-12, 1.0 + 1e-12)
NOT_NEGATIVE: Range = (-1e-12, math.inf)
OWN = "own_objective"
"""Name of an objective that is a function without a name."""
VOTE_OBJECTIVES = "reward.objective: {name: davidson}, rao_kupper or binomial"
"""What reads votes, for messages."""


@dataclass(frozen=True, slots=True)
class ObjectiveSpec(FunctionSpec):
    """One objective; ``function`` is (reward_chosen, reward_rejected, columns by name, **parameters) -> [B]."""

    coupled: bool = False
    """The loss of a pair depends on the other pairs of the batch."""
    of_training: tuple[str, ...] = ()
    """Parameters that the training reads, and not the function."""
    reads_labels: bool = True
    """Whether which response is chosen means that it is the better one."""


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
        own = {name: value for name, value in self.parameters.items() if name not in self.spec.of_training}
        return self.spec.function(reward_chosen, reward_rejected, **inputs, **own)


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
        reads_labels=False,
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
        reads_labels=False,
    ),
    ObjectiveSpec(
        "thumbs",
        objectives.thumbs,
        {},
        "single responses with thumbs, by the sign of their reward, and pairs in one table",
        columns=(THUMB,),
    ),
    ObjectiveSpec(
        "binomial",
        vote_objectives.binomial,
        {"by_votes": False},
        "every vote of the raters; a tie is half a vote for each",
        columns=VOTES,
        reads_labels=False,
    ),
    ObjectiveSpec(
        "rao_kupper",
        vote_objectives.rao_kupper,
        {"tie": 0.5, "rate": 0.05, "by_votes": False},
        "votes and ties; a lead of less than `tie` is not noticed (learned, from this start)",
        {"tie": POSITIVE, "rate": NOT_NEGATIVE},
        columns=VOTES,
        of_training=("rate",),
        reads_labels=False,
    ),
    ObjectiveSpec(
        "davidson",
        vote_objectives.davidson,
        {"tie": 0.5, "rate": 0.05, "by_votes": False},
        "votes and ties; a third class, neither, of weight `tie` (learned, from this start)",
        {"tie": POSITIVE, "rate": NOT_NEGATIVE},
        columns=VOTES,
        of_training=("rate",),
        reads_labels=False,
    ),
)
OBJECTIVES = Registry("objective", SPECS, section="reward.objective")


def resolve_objective(config: ObjectiveSection) -> BoundObjective:
    """Return the objective that a configuration names, with its defaults.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    return bind_objective(config.name, config.parameters)


def bind_objective(
    objective: str | Callable[..., Tensor] | BoundObjective, parameters: Mapping[str, Any]
) -> BoundObjective:
    """The objective of a name or a function with these parameters; a bound one as it is.

    Raises:
        ConfigError: unknown name or parameter, wrong value, or a function that is no objective.
    """
    if isinstance(objective, BoundObjective):
        return objective
    if isinstance(objective, str):
        return BoundObjective(*OBJECTIVES.bind(objective, parameters))
    if not callable(objective):
        raise ConfigError(
            f"objective: found {objective!r}, expected a name or a function",
            code="objective-name",
            hint=f"names are {', '.join(OBJECTIVES)}",
        )
    return own_objective(objective, parameters)


def own_objective(function: Callable[..., Tensor], parameters: Mapping[str, Any]) -> BoundObjective:
    """An objective of the caller: (reward_chosen [B], reward_rejected [B], *columns [B], **parameters) -> loss [B].

    A parameter of the function after the first two is a column of the pair table if it has no default (``margin``,
    ``group``: names become numbers), else a parameter of the objective. The function is tried on two pairs, together
    and one by one: if the loss of a pair depends on the others, it sees those of all processes in one forward pass.

    Raises:
        ConfigError: a column is none of the pair table, a parameter is unknown, or the result is not one finite loss
            per pair with a gradient.
    """
    name = getattr(function, "__name__", type(function).__name__)
    name = name if name.isidentifier() else OWN
    try:
        found = list(inspect.signature(function).parameters.values())[2:]
    except (TypeError, ValueError):
        found = []  # a function of C without a signature: rewards alone
    found = [one for one in found if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    columns = tuple(one.name for one in found if one.default is one.empty)
    known = [*NUMBERS, *NAMES]
    if odd := [column for column in columns if column not in known]:
        raise ConfigError(
            f"objective {name}: reads {odd[0]!r}, expected columns of the pair table{nearest(odd[0], known)}",
            code="objective-column",
            hint="give a parameter that is no column a default",
        )
    defaults = {one.name: one.default for one in found if one.default is not one.empty}
    if unknown := [key for key in parameters if key not in defaults]:
        raise ConfigError(
            f"objective_kwargs: {unknown[0]}: not a parameter of {name}{nearest(unknown[0], list(defaults))}",
            code="objective-parameter",
        )

    def checked(reward_chosen: Tensor, reward_rejected: Tensor, **inputs: Any) -> Tensor:
        losses = function(reward_chosen, reward_rejected, **inputs)
        return _one_per_pair(losses, name, len(reward_chosen))

    spec = ObjectiveSpec(name, checked, defaults, "a function given to the trainer", columns=columns)
    bound = BoundObjective(spec, defaults | dict(parameters))
    return replace(bound, spec=replace(spec, coupled=_try(bound, name)))


def _try(objective: BoundObjective, name: str) -> bool:
    """Call an objective on the rewards of two pairs; return whether the loss of a pair depends on the other one.

    Raises:
        ConfigError: it fails, or its result is not one finite loss per pair with a gradient.
    """
    rewards = torch.tensor([0.5, -0.5], requires_grad=True), torch.tensor([0.0, 0.25], requires_grad=True)
    columns = {
        column: torch.arange(2, dtype=torch.int64 if column in NAMES else torch.float32) for column in objective.columns
    }

    def at(pairs: slice) -> Tensor:
        with torch.enable_grad():
            return objective(rewards[0][pairs], rewards[1][pairs], {key: one[pairs] for key, one in columns.items()})

    try:
        losses = at(slice(None))
    except AlignError:
        raise
    except Exception as error:
        raise ConfigError(f"objective {name}: raised {error!r} on two pairs", code="objective-parameter") from error
    if not bool(losses.isfinite().all()):
        raise ConfigError(
            f"objective {name}: returned {losses.tolist()} for two pairs of ordinary rewards, expected finite losses",
            code="objective-parameter",
        )
    if not losses.requires_grad:
        raise ConfigError(
            f"objective {name}: returned losses without a gradient, expected them to depend on the rewards",
            code="objective-parameter",
            hint="compute them with torch's functions from the rewards that it is given",
        )
    try:
        single = torch.cat([at(slice(k, k + 1)) for k in range(2)])
    except Exception:  # one pair alone has no loss under it
        return True
    return not torch.allclose(losses, single, rtol=1e-4, atol=1e-6)


def _one_per_pair(losses: Any, name: str, pairs: int) -> Tensor:
    """Return the losses of an objective of the caller's.

    Raises:
        ConfigError: they are not one number per pair.
    """
    if isinstance(losses, Tensor) and losses.shape == (pairs,) and losses.is_floating_point():
        return losses
    found = f"{tuple(losses.shape)} of {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ConfigError(
        f"objective {name}: found a result {found} for {pairs} pairs, expected one loss per pair, shape ({pairs},)",
        code="objective-parameter",
        hint="return the loss of each pair; the trainer takes the mean",
    )


def objective_columns(pairs: Dataset, objective: BoundObjective) -> dict[str, list[float] | list[int]]:
    """Return the columns that the objective reads: numbers as they are, names numbered in order of appearance.

    Raises:
        DataError: a column is missing or has gaps, a share is not in [0, 1] or differs within a bag.
    """
    columns: dict[str, list[float] | list[int]] = {}
    if objective.spec.reads_labels:
        refuse_without_majority(pairs, f"the objective {objective.spec.name} reads no votes", VOTE_OBJECTIVES)
    if THUMB not in objective.columns:
        refuse_thumbs(pairs, f"the objective {objective.spec.name}")
    for name in objective.columns:
        if name == THUMB:
            given: list[float | None] = list(pairs[name]) if name in pairs.column_names else [None] * len(pairs)
            columns[name] = [math.nan if value is None else float(value) for value in given]
            continue
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
    if VOTES[0] in columns:
        _check_votes(columns, pairs, objective)
    if "vote_share" in columns:
        _check_shares(np.asarray(columns["bag"]), np.asarray(columns["vote_share"]), list(pairs["bag"]))
    return columns


def _check_votes(columns: Mapping[str, Any], pairs: Dataset, objective: BoundObjective) -> None:
    counts = np.array([columns[name] for name in VOTES])
    ids = list(pairs["id"]) if "id" in pairs.column_names else list(range(len(pairs)))
    for row in np.flatnonzero((counts < 0).any(axis=0) | (counts.sum(axis=0) <= 0))[:1]:
        raise DataError(
            f"pair {ids[row]}: found {counts[0, row]:g} votes for chosen, {counts[1, row]:g} for rejected and "
            f"{counts[2, row]:g} for neither, expected numbers from 0 up, not all 0",
            code="objective-column",
        )
    if "tie" in objective.parameters and not counts[2].any():
        log.warning("votes_tie: no tie in %d pairs, so %s learns that there are none; binomial has no parameter for it",
                    len(pairs), objective.spec.name)  # fmt: skip


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
