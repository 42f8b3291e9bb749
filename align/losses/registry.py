"""The losses of a policy by the names that YAML uses, with their parameters, defaults and ranges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.config.parameters import ANY, POSITIVE, Range
from align.errors import ConfigError
from align.losses import pairwise as losses
from align.losses.beta_dpo import BetaDpo, beta_dpo
from align.losses.margin_weights import MADPO_TAU, validate_madpo, validate_trust
from align.losses.pairwise import PairLogps
from align.losses.registry_base import BoundFunction, FunctionSpec, Registry

FLIP: Range = (-1e-12, 0.5)
SHARE: Range = (0.0, 1.0 + 1e-12)


@dataclass(frozen=True, slots=True)
class LossSpec(FunctionSpec):
    """One loss; ``function`` is (logps, [margin,] **parameters) -> [B]."""

    stateful: type[BetaDpo] | None = None
    """What a trainer calls instead of ``function``: it compares the pairs of a batch and remembers earlier batches."""

    @property
    def needs_margin(self) -> bool:
        """Whether every pair must have a reward margin."""
        return "margin" in self.columns

    @property
    def coupled(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of its batch, so that a single pair has no loss."""
        return self.stateful is not None


@dataclass(frozen=True, slots=True)
class BoundLoss(BoundFunction[LossSpec]):
    """A loss with all its parameters: (logps, margin) -> loss [B]."""

    @property
    def beta(self) -> float:
        """Strength of the pull to the reference; 1 / beta scales the implicit margin."""
        return float(self.parameters["beta"])

    def __call__(self, logps: PairLogps, margin: Tensor | None = None, trust: Tensor | None = None) -> Tensor:
        """Compute the loss [B].

        Args:
            logps: log-probs of B pairs.
            margin: reward margins [B], for a loss that needs them.
            trust: trust of each pair [B], in place of the parameter of that name; None: the parameter.

        Raises:
            ConfigError: the loss needs a margin and there is none.
            TypeError: the loss is coupled.
        """
        if self.spec.coupled:
            raise TypeError(f"{self.spec.name} has no loss for a single pair; use spec.stateful")
        if not self.spec.needs_margin:
            return self.spec.function(logps, **self.parameters)
        if margin is None:
            raise ConfigError(f"loss {self.spec.name} needs a margin for each pair", code="loss-needs-margin")
        per_pair: dict[str, Any] = {} if trust is None else {"trust": trust}
        return self.spec.function(logps, margin, **{**self.parameters, **per_pair})


MARGIN = ("margin",)
BETA: dict[str, Range] = {"beta": POSITIVE}
MADPO_SHAPE: dict[str, float | bool] = {"c_max": 2.0, "c_min": 0.5, "lam": 1.0, "tau": MADPO_TAU}
MADPO_DEFAULTS: dict[str, float | bool] = {"beta": 0.1, **MADPO_SHAPE}


def _madpo_check(*, c_max: float, c_min: float, lam: float, tau: float, **_: float) -> list[str]:
    return validate_madpo(c_max=c_max, c_min=c_min, lam=lam, tau=tau)


def _trust_check(*, slope: float, trust: float, strength: float, **madpo: float) -> list[str]:
    validate_trust(slope=slope, trust=trust, strength=strength)
    warnings = _madpo_check(**madpo)
    return warnings if strength > 0 and trust < 1 else []


SPECS = (
    LossSpec("dpo", losses.dpo, {"beta": 0.1}, "the same weight for every pair"),
    LossSpec(
        "madpo",
        losses.madpo,
        MADPO_DEFAULTS,
        "DPO weighted by the margin",
        BETA,
        columns=MARGIN,
        check=_madpo_check,
    ),
    LossSpec(
        "soft_madpo",
        losses.soft_madpo,
        MADPO_DEFAULTS,
        "MADPO's expectation over the label",
        BETA,
        columns=MARGIN,
        check=_madpo_check,
    ),
    LossSpec(
        "trust",
        losses.trust,
        {"beta": 0.1, "slope": 1.0, "trust": 0.5, "strength": 1.0, **MADPO_SHAPE},
        "label and margin, each believed as far as the data says",
        BETA,
        columns=MARGIN,
        check=_trust_check,
    ),
    LossSpec("ipo", losses.ipo, {"beta": 0.1, "length_normalize": True}, "squared distance to a fixed margin"),
    LossSpec(
        "beta_dpo",
        beta_dpo,
        {"beta": 0.1, "alpha": 0.6, "rho": 0.8, "momentum": 0.9},
        "one beta per batch, outliers left out",
        {"alpha": (-1e-12, math.inf), "rho": SHARE, "momentum": (-1e-12, 1.0)},
        stateful=BetaDpo,
    ),
    LossSpec(
        "odpo",
        losses.odpo,
        {"beta": 0.1, "alpha": 1.0, "log_offset": False},
        "an offset by the margin",
        {"alpha": ANY},
        columns=MARGIN,
    ),
    LossSpec("mmpo", losses.mmpo, {"beta": 0.1, "gamma": 1.0}, "soft labels from the margin", columns=MARGIN),
    LossSpec("rpo_sq", losses.rpo_sq, {"beta": 0.1, "eta": 1.0}, "margin distillation", columns=MARGIN),
    LossSpec("rpo_bwd_kl", losses.rpo_bwd_kl, {"beta": 0.1, "eta": 1.0}, "KL to the margin's label", columns=MARGIN),
    LossSpec("rpo_fwd_kl", losses.rpo_fwd_kl, {"beta": 0.1, "eta": 1.0}, "the KL reversed", columns=MARGIN),
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
        "pushes unlikely rejected responses no further",
    ),
    LossSpec(
        "simpo",
        losses.simpo,
        {"beta": 2.0, "gamma_beta_ratio": 0.25},
        "length-normalized, no reference",
        {"gamma_beta_ratio": ANY},
    ),
)
LOSSES = Registry("loss", SPECS)


def resolve(name: str, parameters: Mapping[str, Any]) -> BoundLoss:
    """Return the loss called ``name`` with its defaults and ``parameters``.

    Raises:
        ConfigError: unknown name or parameter (with the nearest known), wrong type, value out of range; all at once.
    """
    return BoundLoss(*LOSSES.bind(name, parameters))
