"""Names in YAML -> loss functions with their parameters, defaults and ranges."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from align.config import nearest
from align.config.parameters import ANY, POSITIVE, Range, parameter_problems
from align.errors import ConfigError, listed
from align.losses import pairwise as losses
from align.losses.margin_weights import MADPO_TAU, validate_madpo, validate_trust
from align.losses.pairwise import PairLogps

FLIP: Range = (-1e-12, 0.5)
SHARE: Range = (0.0, 1.0 + 1e-12)


@dataclass(frozen=True, slots=True)
class LossSpec:
    """One entry of the registry."""

    name: str
    function: Callable[..., Tensor] | None
    """(logps, [margin,] **parameters) -> [B]; None for beta_dpo, which the trainer steps itself."""
    defaults: Mapping[str, float | bool]
    summary: str
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Open intervals."""
    needs_margin: bool = False
    check: Callable[..., list[str]] | None = None
    """Further validation; returns warnings."""


@dataclass(frozen=True, slots=True)
class BoundLoss:
    """A loss with all its parameters: (logps, margin) -> loss [B]."""

    spec: LossSpec
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference; 1 / beta scales the implicit margin."""
        return float(self.parameters["beta"])

    def __call__(self, logps: PairLogps, margin: Tensor | None = None, trust: Tensor | None = None) -> Tensor:
        """Loss [B]; ``trust`` [B], of the loss that has it, goes before the parameter.

        Raises:
            ConfigError: the loss needs a margin and there is none.
        """
        assert self.spec.function is not None
        if not self.spec.needs_margin:
            return self.spec.function(logps, **self.parameters)
        if margin is None:
            raise ConfigError(f"loss {self.spec.name} needs a margin for each pair", code="loss-needs-margin")
        own: dict[str, Any] = {} if trust is None else {"trust": trust}
        return self.spec.function(logps, margin, **{**self.parameters, **own})


MADPO_SHAPE: dict[str, float | bool] = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": MADPO_TAU}
MADPO_DEFAULTS: dict[str, float | bool] = {"beta": 0.1, **MADPO_SHAPE}


def _madpo_check(*, c_max: float, c_min: float, lam: float, tau: float, **_: float) -> list[str]:
    return validate_madpo(c_max=c_max, c_min=c_min, lam=lam, tau=tau)


def _trust_check(*, slope: float, trust: float, strength: float, **madpo: float) -> list[str]:
    validate_trust(slope=slope, trust=trust, strength=strength)
    warnings = _madpo_check(**madpo)
    return warnings if strength > 0 and trust < 1 else []


SPECS = (
    LossSpec("dpo", losses.dpo, {"beta": 0.1}, "every pair alike"),
    LossSpec(
        "madpo", losses.madpo, MADPO_DEFAULTS, "DPO weighted by the margin", needs_margin=True, check=_madpo_check
    ),
    LossSpec(
        "soft_madpo",
        losses.soft_madpo,
        MADPO_DEFAULTS,
        "MADPO's expectation over the label",
        needs_margin=True,
        check=_madpo_check,
    ),
    LossSpec(
        "trust",
        losses.trust,
        {"beta": 0.1, "slope": 1.0, "trust": 0.5, "strength": 1.0, **MADPO_SHAPE},
        "label and margin, each believed as far as the data says",
        needs_margin=True,
        check=_trust_check,
    ),
    LossSpec("ipo", losses.ipo, {"beta": 0.1, "length_normalize": True}, "squared distance to a fixed margin"),
    LossSpec(
        "beta_dpo",
        None,
        {"beta": 0.1, "alpha": 0.6, "rho": 0.8, "momentum": 0.9},
        "one beta per batch, outliers left out",
        {"alpha": (-1e-12, math.inf), "rho": SHARE, "momentum": (-1e-12, 1.0)},
    ),
    LossSpec(
        "odpo",
        losses.odpo,
        {"beta": 0.1, "alpha": 1.0, "log_offset": False},
        "an offset by the margin",
        {"alpha": ANY},
        needs_margin=True,
    ),
    LossSpec("mmpo", losses.mmpo, {"beta": 0.1, "gamma": 1.0}, "soft labels from the margin", needs_margin=True),
    LossSpec("rpo_sq", losses.rpo_sq, {"beta": 0.1, "eta": 1.0}, "margin distillation", needs_margin=True),
    LossSpec("rpo_bwd_kl", losses.rpo_bwd_kl, {"beta": 0.1, "eta": 1.0}, "KL to the margin's label", needs_margin=True),
    LossSpec("rpo_fwd_kl", losses.rpo_fwd_kl, {"beta": 0.1, "eta": 1.0}, "the KL reversed", needs_margin=True),
    LossSpec("cdpo", losses.cdpo, {"beta": 0.1, "label_smoothing": 0.1}, "smoothed labels", {"label_smoothing": FLIP}),
    LossSpec(
        "robust",
        losses.robust,
        {"beta": 0.1, "label_smoothing": 0.1},
        "unbiased under flips",
        {"label_smoothing": FLIP},
    ),
    LossSpec("dpop", losses.dpop, {"beta": 0.1, "penalty": 5.0}, "keeps the chosen log-prob up", {"penalty": ANY}),
    LossSpec("dpo_shift", losses.dpo_shift, {"beta": 0.1, "shift": 0.75}, "the rejected term scaled", {"shift": SHARE}),
    LossSpec("cal_dpo", losses.cal_dpo, {"beta": 0.1}, "DPO with targets for both implicit rewards"),
    LossSpec(
        "gated_dpo",
        losses.gated_dpo,
        {"beta": 0.1, "sharpness": 20.0, "threshold": 0.2},
        "unlikely rejected responses are let be",
    ),
    LossSpec(
        "simpo",
        losses.simpo,
        {"beta": 2.0, "gamma_beta_ratio": 0.25},
        "length-normalised, no reference",
        {"gamma_beta_ratio": ANY},
    ),
)
LOSSES: dict[str, LossSpec] = {spec.name: spec for spec in SPECS}


def resolve(name: str, parameters: Mapping[str, Any]) -> BoundLoss:
    """The loss called ``name`` with its defaults and ``parameters``.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss {name!r} is not known{nearest(name, list(LOSSES))}", code="loss-name")
    spec = LOSSES[name]
    ranges = {key: spec.ranges.get(key, POSITIVE) for key in spec.defaults if spec.check is None or key == "beta"}
    problems = parameter_problems(name, parameters, spec.defaults, ranges)
    if problems:
        raise ConfigError(f"parameters of {name}:\n{listed(problems)}", code="loss-parameter")
    bound = {**spec.defaults, **parameters}
    return BoundLoss(spec, bound, tuple(spec.check(**bound)) if spec.check else ())
