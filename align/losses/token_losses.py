"""Losses that read a response token by token. Shapes: B pairs, T tokens of the longest sequence.

``PairTokens`` is what such a loss gets in addition to the sums; its rows are the B chosen, then the B rejected
responses.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.losses.numerics import at_least_float32
from align.losses.pairwise import PairLogps, dpo

SMALLEST_ENTROPY = 1e-6
"""Share of the largest entropy; a reference that is certain of every token has 0, whose logarithm has no bound."""


@dataclass(frozen=True, slots=True)
class PairTokens:
    """Scores of the completion tokens of B pairs; every tensor is [2B, T - 1] and 0 outside of ``mask``."""

    mask: Tensor
    """Bool, completion tokens."""
    logps: Tensor
    """log p(y_t) of the policy, nats."""
    log_sum_squares: Tensor
    """log sum_v p(v)^2 of the policy, nats; carries no gradient."""
    ref_logps: Tensor | None = None
    """log p(y_t) of the reference, nats."""
    ref_entropy: Tensor | None = None
    """Entropy of the reference's distribution as a share of log V, in [0, 1]."""
    seed: int = 0
    step: int = 0
    """Finished optimizer steps; together with the seed and the row of a pair it fixes what is drawn for the pair."""
    rows: tuple[int, ...] | None = None
    """Row of each pair in the table; None: its place in the batch."""

    def weighted(self, weight: Tensor) -> PairLogps:
        """Sums of weight_t * log p(y_t) under policy and reference, with the lengths sum_t weight_t.

        Args:
            weight: [2B, T - 1], without gradient.
        """
        if self.ref_logps is None:
            raise TypeError("a weighted sum needs the reference's tokens")
        weight = weight * self.mask
        chosen, rejected = (weight * at_least_float32(self.logps)).sum(dim=1).chunk(2)
        ref_chosen, ref_rejected = (weight * at_least_float32(self.ref_logps)).sum(dim=1).chunk(2)
        return PairLogps(chosen, rejected, ref_chosen, ref_rejected, *weight.sum(dim=1).chunk(2))

    def means(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the tokens of the chosen and of the rejected response, each [B]."""
        mask = self.mask.to(values.dtype)
        return tuple(((values * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)).chunk(2))  # type: ignore[return-value]


def wpo(logps: PairLogps, tokens: PairTokens, *, beta: float, clamp: bool) -> Tensor:
    """DPO times min(1, exp(u_w + u_l)), u = mean_t [log p(y_t) - log sum_v p(v)^2] (arXiv 2406.11827, eq. 2).

    The weight is large for responses that the policy might have written itself; it has no gradient. Without ``clamp``
    it may exceed 1, as in trl.
    """
    with torch.no_grad():
        u_w, u_l = tokens.means(at_least_float32(tokens.logps) - at_least_float32(tokens.log_sum_squares))
        exponent = u_w + u_l
        weight = torch.exp(exponent.clamp_max(0.0) if clamp else exponent)
    return weight * dpo(logps, beta=beta)


def mallows_po(logps: PairLogps, tokens: PairTokens, *, beta: float, phi: float) -> Tensor:
    """-log sigmoid(beta h (-phi log E)), E the reference's entropy as a share of log V (arXiv 2405.14953).

    E is the mean over the tokens of each response and over both responses: where the reference is certain, the pair
    counts for more.
    """
    if tokens.ref_entropy is None:
        raise TypeError("mallows_po needs the reference's entropies")
    entropy_w, entropy_l = tokens.means(at_least_float32(tokens.ref_entropy))
    dispersion = -phi * ((entropy_w + entropy_l) / 2).clamp(SMALLEST_ENTROPY, 1.0).log()
    return -F.logsigmoid(beta * logps.log_ratio_gap * dispersion)


def ld_dpo(logps: PairLogps, tokens: PairTokens, *, beta: float, ld_alpha: float) -> Tensor:
    """DPO in which tokens beyond the length of the shorter response count ``ld_alpha`` (arXiv 2409.06411)."""
    return dpo(tokens.weighted(tail_weight(tokens.mask, ld_alpha)), beta=beta)


def sampo(logps: PairLogps, tokens: PairTokens, *, beta: float) -> Tensor:
    """DPO on as many tokens of both responses: the longer one is sampled down, without replacement (arXiv 2406.10957).

    Policy and reference are summed over the same tokens, as in the paper's equation; its code draws them separately.
    """
    return dpo(tokens.weighted(sampled_tokens(tokens)), beta=beta)


def tail_weight(mask: Tensor, ld_alpha: float) -> Tensor:
    """1 for the first tokens of each response, ``ld_alpha`` beyond the length of its pair's shorter one.

    Args:
        mask: bool [2B, T - 1].
        ld_alpha: in [0, 1].
    """
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    tail = mask.cumsum(dim=1) > shorter[:, None]
    return torch.where(tail, ld_alpha, 1.0) * mask


def sampled_tokens(tokens: PairTokens) -> Tensor:
    """1 for the tokens that SamPO keeps, 0 for the others, [2B, T - 1].

    The draw of a pair depends on the seed, the step and the pair's row, not on the rest of its batch.
    """
    kept = tokens.mask.float()
    pairs = len(kept) // 2
    lengths = tokens.mask.sum(dim=1).tolist()
    for k in range(pairs):
        short, long = min(lengths[k], lengths[k + pairs]), max(lengths[k], lengths[k + pairs])
        if short == long:
            continue
        row = k if lengths[k] == long else k + pairs
        name = k if tokens.rows is None else tokens.rows[k]
        drawn = np.random.default_rng([tokens.seed, tokens.step, name]).permutation(long)[: long - short]
        places = tokens.mask[row].nonzero().flatten()
        kept[row, places[torch.from_numpy(drawn).to(places.device)]] = 0.0
    return kept
