"""Losses of a policy: log-probabilities (and margin) -> one loss per pair. Weight and mean are applied elsewhere.

Shapes: B pairs; every tensor is [B]. Log-probabilities are sums over completion tokens, in nats; margins m are in
reward units. h = (logp_w - ref_logp_w) - (logp_l - ref_logp_l) is the implicit margin divided by beta. Computation is
in float32 or better, finite for h and m in [-1e6, 1e6].

Adding a loss: one function in a module like this one, one entry in align/losses/entries_*.py, a golden value in
tests/losses/golden.py.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.margin_weights import MADPO_TAU, madpo_coefficient, madpo_weight, trusted_label
from align.losses.numerics import at_least_float32


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of a batch of pairs under policy and reference, and the completions' lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    thumb: Tensor | None = None
    """1 where ``chosen`` is a single desirable response, 0 where an undesirable one, for losses of single responses.

    Its ``rejected`` is then another prompt's response, or only the first token of ``chosen``. None: all desirable."""

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        shapes = {name: tuple(value.shape) for name, value in values.items() if value is not None}
        if len(set(shapes.values())) != 1 or self.chosen.dim() != 1:
            raise ValueError(f"PairLogps: every tensor must be [B], got {shapes}")

    @property
    def swapped(self) -> "PairLogps":
        """The same pairs with chosen and rejected exchanged."""
        return PairLogps(
            self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_length, self.chosen_length
        )

    @property
    def chosen_ratio(self) -> Tensor:
        """logp_w - ref_logp_w [B], float32 or better."""
        return at_least_float32(self.chosen) - at_least_float32(self.ref_chosen)

    @property
    def rejected_ratio(self) -> Tensor:
        """logp_l - ref_logp_l [B], float32 or better."""
        return at_least_float32(self.rejected) - at_least_float32(self.ref_rejected)

    @property
    def log_ratio_gap(self) -> Tensor:
        """h [B]."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def reference_gap(self) -> Tensor:
        """ref_logp_w - ref_logp_l [B], float32 or better."""
        return at_least_float32(self.ref_chosen) - at_least_float32(self.ref_rejected)

    @property
    def chosen_mean(self) -> Tensor:
        """x_w = logp_w / |y_w| [B], float32 or better."""
        return at_least_float32(self.chosen) / self.chosen_length.clamp_min(1)

    @property
    def rejected_mean(self) -> Tensor:
        """x_l = logp_l / |y_l| [B], float32 or better."""
        return at_least_float32(self.rejected) / self.rejected_length.clamp_min(1)

    @property
    def mean_ratio_gap(self) -> Tensor:
        """h of mean log-probs: (logp_w - ref_w) / |y_w| - (logp_l - ref_l) / |y_l| [B]."""
        chosen = self.chosen_ratio / self.chosen_length.clamp_min(1)
        return chosen - self.rejected_ratio / self.rejected_length.clamp_min(1)


def dpo(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(beta h) (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(beta * logps.log_ratio_gap)


def cdpo(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO under a label that is wrong with probability ``label_smoothing`` (conservative DPO)."""
    return smoothed(beta * logps.log_ratio_gap, label_smoothing)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """rDPO, the unbiased loss under label flips of probability ``label_smoothing`` < 1/2 (arXiv 2403.00409)."""
    x = beta * logps.log_ratio_gap
    clean, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(logps: PairLogps, *, beta: float, length_normalize: bool) -> Tensor:
    """(h - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17); with ``length_normalize`` on mean log-probs, as trl does."""
    gap = logps.mean_ratio_gap if length_normalize else logps.log_ratio_gap
    return (gap - 1 / (2 * beta)) ** 2


def odpo(logps: PairLogps, margin: Tensor, *, beta: float, alpha: float, log_offset: bool) -> Tensor:
    """-log sigmoid(beta h - offset) (arXiv 2402.10571).

    offset = alpha m, or with ``log_offset`` alpha log m as in the paper's code; there m <= 0 gets the offset 0.
    """
    m = at_least_float32(margin)
    positive = m > 0
    logarithm = torch.where(positive, torch.log(torch.where(positive, m, torch.ones_like(m))), torch.zeros_like(m))
    return -F.logsigmoid(beta * logps.log_ratio_gap - alpha * (logarithm if log_offset else m))


def mmpo(logps: PairLogps, margin: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Cross-entropy against the soft label sigmoid(gamma m) (arXiv 2410.03145)."""
    return _soft_label(beta * logps.log_ratio_gap, torch.sigmoid(gamma * at_least_float32(margin)))


def rpo_sq(logps: PairLogps, margin: Tensor, *, beta: float, eta: float) -> Tensor:
    """Margin distillation (beta h - eta m)^2 (arXiv 2405.19316; RPO "sq", arXiv 2502.00203)."""
    return (beta * logps.log_ratio_gap - eta * at_least_float32(margin)) ** 2


def rpo_bwd_kl(logps: PairLogps, margin: Tensor, *, beta: float, eta: float) -> Tensor:
    """KL(Bernoulli(sigmoid(eta m)) || Bernoulli(sigmoid(beta h))) (arXiv 2502.00203)."""
    return _bernoulli_kl(eta * at_least_float32(margin), beta * logps.log_ratio_gap)


def rpo_fwd_kl(logps: PairLogps, margin: Tensor, *, beta: float, eta: float) -> Tensor:
    """KL(Bernoulli(sigmoid(beta h)) || Bernoulli(sigmoid(eta m))) (arXiv 2502.00203)."""
    return _bernoulli_kl(beta * logps.log_ratio_gap, eta * at_least_float32(margin))


def dpop(logps: PairLogps, *, beta: float, penalty: float) -> Tensor:
    """-log sigmoid(beta (h - penalty max(0, ref_logp_w - logp_w))) (DPO-positive, arXiv 2402.13228)."""
    decrease = (-logps.chosen_ratio).clamp_min(0)
    return -F.logsigmoid(beta * (logps.log_ratio_gap - penalty * decrease))


def dpo_shift(logps: PairLogps, *, beta: float, shift: float) -> Tensor:
    """-log sigmoid(beta ((logp_w - ref_w) - shift (logp_l - ref_l))), 0 < shift <= 1 (DPO-Shift, arXiv 2502.07599)."""
    return -F.logsigmoid(beta * (logps.chosen_ratio - shift * logps.rejected_ratio))


def cal_dpo(logps: PairLogps, *, beta: float) -> Tensor:
    """-log sigmoid(r_w - r_l) + ((r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2) / 2 with r = logp - ref.

    Cal-DPO (NeurIPS 2024) as its code computes it: r carries no beta, which only sets the targets +-1/(2 beta).
    """
    chosen, rejected, target = logps.chosen_ratio, logps.rejected_ratio, 1 / (2 * beta)
    return -F.logsigmoid(chosen - rejected) + 0.5 * ((chosen - target) ** 2 + (rejected + target) ** 2)


def gated_dpo(logps: PairLogps, *, beta: float, sharpness: float, threshold: float) -> Tensor:
    """DPO whose rejected gradient is multiplied by sigmoid(sharpness (p - threshold)) (Gate-DPO, arXiv 2605.02626).

    p is the rejected response's probability per token (geometric mean), detached: a response that is already unlikely
    is pushed no further. The value is DPO's. The paper gives no numbers for sharpness and threshold.
    """
    probability = torch.exp(at_least_float32(logps.rejected.detach()) / logps.rejected_length.clamp_min(1))
    gate = torch.sigmoid(sharpness * (probability - threshold))
    rejected = scale_gradient(at_least_float32(logps.rejected), gate) - at_least_float32(logps.ref_rejected)
    return -F.logsigmoid(beta * (logps.chosen_ratio - rejected))


def simpo(logps: PairLogps, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """-log sigmoid(beta (logp_w/|y_w| - logp_l/|y_l| - ratio)) (arXiv 2405.14734); no reference."""
    return -F.logsigmoid(beta * (logps.chosen_mean - logps.rejected_mean - gamma_beta_ratio))


def madpo(
    logps: PairLogps,
    margin: Tensor,
    *,
    beta: float,
    c_max: float = 2.0,
    c_min: float = 0.5,
    lam: float = 1.0,
    tau: float = MADPO_TAU,
) -> Tensor:
    """w(m) times DPO's loss, without gradient through the weight (arXiv 2510.05342)."""
    return madpo_weight(margin, c_max=c_max, c_min=c_min, lam=lam, tau=tau).detach() * dpo(logps, beta=beta)


def soft_madpo(
    logps: PairLogps,
    margin: Tensor,
    *,
    beta: float,
    c_max: float = 2.0,
    c_min: float = 0.5,
    lam: float = 1.0,
    tau: float = MADPO_TAU,
) -> Tensor:
    """MADPO with the exact expectation over the label: cross-entropy against sigmoid(c(|m|) m).

    For |m| < tau this is the mean of MADPO's loss over a Bradley-Terry label with margin m. Beyond tau, MADPO gives a
    label that contradicts the reward model the weight 1 instead of sigmoid(-c m) / sigmoid(-m); this loss keeps the
    soft label there as well.
    """
    m = at_least_float32(margin)
    c = madpo_coefficient(m, c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    return _soft_label(beta * logps.log_ratio_gap, torch.sigmoid(c * m).detach())


def trust(
    logps: PairLogps,
    margin: Tensor,
    *,
    beta: float,
    slope: float,
    trust: float | Tensor,
    strength: float,
    c_max: float = 2.0,
    c_min: float = 0.5,
    lam: float = 1.0,
    tau: float = MADPO_TAU,
) -> Tensor:
    """(1 - t) w(g b m) * -log sigmoid(beta h) + t * cross-entropy against sigmoid(b m); t trust, g strength, b slope.

    (t, g) = (0, 0) is DPO, (0, 1) MADPO on the margin b m, t = 1 MMPO with gamma = b; g = 0 with t between 0 and 1 is
    knowledge distillation's mix of hard and soft targets (arXiv 1503.02531). t may be one value per pair, [B].
    align/trust estimates t, g and b from the data.
    """
    target, weight = trusted_label(
        margin, slope=slope, trust=trust, strength=strength, c_max=c_max, c_min=c_min, lam=lam, tau=tau
    )
    return weight * _soft_label(beta * logps.log_ratio_gap, target)


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """Return ``values`` [B] unchanged, with their gradient multiplied by ``factor`` [B]."""
    factor = factor.detach()
    return factor * values + (1 - factor) * values.detach()


def gradient_weights(per_pair: Tensor, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Compute d_w = -dL/dlogp_w and d_l = dL/dlogp_l [B] of a loss of ``logps``, by autograd; 0 where it reads none."""
    inputs = (logps.chosen, logps.rejected)
    chosen_gradient, rejected_gradient = torch.autograd.grad(per_pair.sum(), inputs, materialize_grads=True)
    return -chosen_gradient, rejected_gradient


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x) [B] under a label that is wrong with probability ``label_smoothing``."""
    return _soft_label(x, torch.full_like(x, 1 - label_smoothing))


def _soft_label(x: Tensor, p: Tensor) -> Tensor:
    """-p log sigmoid(x) - (1 - p) log sigmoid(-x) [B]."""
    return -p * F.logsigmoid(x) - (1 - p) * F.logsigmoid(-x)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(a)) || Bernoulli(sigmoid(b))) [B] from logits."""
    positive = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return positive + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))
