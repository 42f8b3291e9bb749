"""Entries of the losses that compare the pairs of a step, and of those that read tokens."""

import math

from align.config.parameters import ANY, Range
from align.losses import step_losses, token_losses
from align.losses.entries_reference import BETA, FLIP, NOT_NEGATIVE, SHARE
from align.losses.spec import LossSpec
from align.losses.step_statistics import (
    AlphaDpoScore,
    AmapoOffset,
    AotMatches,
    AotTarget,
    BcoShift,
    BetaDpo,
    GammaDpoTarget,
    GammaTarget,
)

FROM_ZERO: Range = (-1e-12, 1.0 + 1e-12)

STEP_SPECS = (
    LossSpec(
        "beta_dpo", step_losses.beta_dpo_of_step, {"beta": 0.1, "alpha": 0.6, "rho": 0.8, "momentum": 0.9},
        "one beta per step, outliers left out",
        {"alpha": NOT_NEGATIVE, "rho": SHARE, "momentum": (-1e-12, 1.0)}, statistics=BetaDpo,
        formula="-log s(beta_t h) of the pairs kept, beta_t = beta (1 + alpha (mean of kept h - mean))",
        source="arXiv 2407.08639, its code", when="pairs of very different quality",
    ),
    LossSpec(
        "bco", step_losses.bco, BETA, "each response classified against the mean reward", statistics=BcoShift,
        formula="-log s(beta c_w - d) - log s(d - beta c_l), d = mean of beta c so far",
        source="arXiv 2404.04656, with trl's running mean of earlier versions", when="each response counts on its own",
    ),
    LossSpec(
        "aot", step_losses.aot, {"beta": 0.1, "label_smoothing": 0.0}, "sorted log-ratios against the reference's",
        {"label_smoothing": FLIP}, statistics=AotTarget,
        formula="-log s(beta (q_(k) - q_ref,(k))), q = logp_w - logp_l, (k) the k-th smallest of the step",
        source="arXiv 2406.05882; trl aot", when="the distribution of gaps should move, not each pair",
    ),
    LossSpec(
        "aot_unpaired", step_losses.aot_unpaired, {"beta": 0.1, "label_smoothing": 0.0},
        "sorted chosen against sorted rejected", {"label_smoothing": FLIP}, statistics=AotMatches,
        formula="-log s(beta (c_w,(k) - c_l,(k)))",
        source="arXiv 2406.05882; trl aot_unpaired", when="chosen and rejected responses of different prompts",
    ),
    LossSpec(
        "alpha_dpo", step_losses.alpha_dpo,
        {"beta": 2.5, "alpha": 0.2, "gamma_beta_ratio": 0.6, "length_normalize": True},
        "SimPO with a target by the standardized h", {"alpha": ANY, "gamma_beta_ratio": ANY},
        statistics=AlphaDpoScore,
        formula="-log s(beta (x_w - x_l - [alpha z + ratio])), z = (h - mean) / sd, h per token",
        source="arXiv 2410.10148, its code", when="SimPO that drifts too far from the reference",
    ),
    LossSpec(
        "amapo", step_losses.amapo, {"beta": 2.0}, "a larger target for pairs below the mean",
        reads_reference=False, statistics=AmapoOffset,
        formula="-log s(beta x - offset), offset = beta e^((mu - x) mu / sd) if x < mu else 0, x = x_w - x_l",
        source="arXiv 2511.09385, its code", when="pairs that are ranked wrongly matter most",
    ),
    LossSpec(
        "gamma_po", step_losses.gamma_po, {"beta": 2.5, "gamma_beta_ratio": 0.5, "tau": 10.0},
        "SimPO with a target for each pair", reads_reference=False, statistics=GammaTarget,
        formula="-log s(beta x - g_i), g = mirror descent over the last 256 gaps, x = x_w - x_l",
        source="arXiv 2506.03690, its code", when="SimPO on noisy labels",
    ),
    LossSpec(
        "gamma_dpo", step_losses.gamma_dpo, {"beta": 0.1, "gamma_beta_ratio": 0.5, "tau": 10.0},
        "DPO with a target for each pair", statistics=GammaDpoTarget,
        formula="-log s(beta h - (g_i - g0))",
        source="arXiv 2506.03690, its code (gm-dpo)", when="dpo on noisy labels",
    ),
)  # fmt: skip

TOKEN_SPECS = (
    LossSpec(
        "wpo", token_losses.wpo, {"beta": 0.1, "clamp": True}, "DPO weighted by how likely the policy writes the pair",
        tokens="policy",
        formula="min(1, e^(u_w + u_l)) * -log s(beta h), u = mean_t [log p(y_t) - log sum_v p(v)^2]",
        source="arXiv 2406.11827, eq. 2, its code; trl use_weighting, without the limit 1 (clamp: false)",
        when="pairs written by other models",
    ),
    LossSpec(
        "mallows_po", token_losses.mallows_po, {"beta": 0.1, "phi": 0.29}, "DPO scaled by the reference's certainty",
        tokens="reference",
        formula="-log s(beta h (-phi log E)), E = mean entropy of the reference / log V",
        source="arXiv 2405.14953, its code", when="prompts with one right answer next to open ones",
    ),
    LossSpec(
        "ld_dpo", token_losses.ld_dpo, {"beta": 0.1, "ld_alpha": 0.5}, "tokens beyond the shorter length count less",
        {"ld_alpha": FROM_ZERO, "beta": (0.0, math.inf)}, tokens="reference",
        formula="-log s(beta h) of log-probs sum_t a_t log p(y_t), a_t = 1 up to min(|y_w|, |y_l|), then ld_alpha",
        source="arXiv 2409.06411; trl ld_alpha", when="responses grow longer under dpo",
    ),
    LossSpec(
        "sampo", token_losses.sampo, BETA, "as many tokens of both responses", tokens="reference",
        formula="-log s(beta h) over min(|y_w|, |y_l|) tokens of each response, drawn anew in every step",
        source="arXiv 2406.10957", when="responses grow longer under dpo, without a parameter",
    ),
)  # fmt: skip
