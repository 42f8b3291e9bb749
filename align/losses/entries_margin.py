"""Entries of the losses that read a reward margin."""

from align.config.parameters import ANY, POSITIVE, Range
from align.losses import pairwise
from align.losses.margin_weights import MADPO_TAU, validate_madpo, validate_trust
from align.losses.spec import LossSpec

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


MARGIN_SPECS = (
    LossSpec(
        "madpo", pairwise.madpo, MADPO_DEFAULTS, "DPO weighted by the margin", BETA,
        columns=MARGIN, check=_madpo_check,
        formula="w(m) * -log s(beta h), w(m) = s(c m) / s(m) for m > -tau, else 1",
        source="arXiv 2510.05342",
        when="margins of a reward model that you trust where the label is uncertain",
    ),
    LossSpec(
        "soft_madpo", pairwise.soft_madpo, MADPO_DEFAULTS, "MADPO's expectation over the label", BETA,
        columns=MARGIN, check=_madpo_check,
        formula="-p log s(beta h) - (1 - p) log s(-beta h), p = s(c m)",
        source="this project; its mean over labels is MADPO's (arXiv 2510.05342)",
        when="MADPO without the noise of labels that the reward model contradicts",
    ),
    LossSpec(
        "trust", pairwise.trust, {"beta": 0.1, "slope": 1.0, "trust": 0.5, "strength": 1.0, **MADPO_SHAPE},
        "label and margin, each believed as far as the data says", BETA, columns=MARGIN, check=_trust_check,
        formula="(1 - t) w(g b m) * -log s(beta h) + t * CE(s(b m))",
        source="this project; t is arXiv 1503.02531's mix, w MADPO's",
        when="margins and labels both err; `trust: auto` measures t, g and b",
    ),
    LossSpec(
        "odpo", pairwise.odpo, {"beta": 0.1, "alpha": 1.0, "log_offset": False}, "an offset by the margin",
        {"alpha": ANY}, columns=MARGIN,
        formula="-log s(beta h - alpha m); with log_offset alpha log m",
        source="arXiv 2402.10571",
        when="the gap should grow with the margin",
    ),
    LossSpec(
        "mmpo", pairwise.mmpo, {"beta": 0.1, "gamma": 1.0}, "soft labels from the margin", columns=MARGIN,
        formula="-p log s(beta h) - (1 - p) log s(-beta h), p = s(gamma m)",
        source="arXiv 2410.03145",
        when="calibrated margins that are better than the labels",
    ),
    LossSpec(
        "rpo_sq", pairwise.rpo_sq, {"beta": 0.1, "eta": 1.0}, "margin distillation", columns=MARGIN,
        formula="(beta h - eta m)^2",
        source="arXiv 2405.19316; RPO sq, arXiv 2502.00203",
        when="the policy should reproduce the margins themselves",
    ),
    LossSpec(
        "rpo_bwd_kl", pairwise.rpo_bwd_kl, {"beta": 0.1, "eta": 1.0}, "KL to the margin's label", columns=MARGIN,
        formula="KL(s(eta m) || s(beta h))",
        source="arXiv 2502.00203",
        when="as mmpo; its value is 0 where the policy agrees with the margin",
    ),
    LossSpec(
        "rpo_fwd_kl", pairwise.rpo_fwd_kl, {"beta": 0.1, "eta": 1.0}, "the KL reversed", columns=MARGIN,
        formula="KL(s(beta h) || s(eta m))",
        source="arXiv 2502.00203",
        when="as rpo_bwd_kl, with weaker pull where the margin is certain",
    ),
)  # fmt: skip
