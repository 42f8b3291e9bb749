"""Entries of the losses of log-ratios to the reference."""

import math

from align.config.parameters import ANY, POSITIVE, Range
from align.losses import pairwise, scores
from align.losses.spec import LossSpec

FLIP: Range = (-1e-12, 0.5)
SHARE: Range = (0.0, 1.0 + 1e-12)
NOT_NEGATIVE: Range = (-1e-12, math.inf)
BETA = {"beta": 0.1}
SMOOTHED = {"beta": 0.1, "label_smoothing": 0.1}


def _not_one(*, alpha: float, **_: float) -> list[str]:
    return [f"fdpo_alpha: alpha = {alpha} is nearly 1, where it is dpo up to rounding"] if abs(alpha - 1) < 0.01 else []


def _reversed(*, discopop_tau: float, **_: float) -> list[str]:
    """The slope at h = 0 is (1 - log 2) / (4 tau) - 3 / 4 times beta."""
    if discopop_tau >= (1 - math.log(2)) / 3:
        return []
    return [f"discopop: at tau {discopop_tau:g} its value rises with h at h = 0, so first steps lower chosen responses"]


DPO_SPECS = (
    LossSpec(
        "dpo", pairwise.dpo, BETA, "the same weight for every pair",
        formula="-log s(beta h)", source="arXiv 2305.18290, eq. 7", when="the baseline",
    ),
    LossSpec(
        "cdpo", pairwise.cdpo, SMOOTHED, "smoothed labels", {"label_smoothing": FLIP},
        formula="-(1 - e) log s(beta h) - e log s(-beta h)",
        source="conservative DPO, label smoothing in trl's DPO", when="a known share e of wrong labels",
    ),
    LossSpec(
        "robust", pairwise.robust, SMOOTHED, "unbiased under flips", {"label_smoothing": FLIP},
        formula="(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)",
        source="arXiv 2403.00409", when="a known share e of flipped labels; unbounded below",
    ),
    LossSpec(
        "dpop", pairwise.dpop, {"beta": 0.1, "penalty": 5.0}, "keeps the chosen log-prob up", {"penalty": ANY},
        formula="-log s(beta (h - penalty max(0, -c_w)))",
        source="arXiv 2402.13228", when="chosen responses lose probability, most of all on near-equal pairs",
    ),
    LossSpec(
        "dpo_shift", pairwise.dpo_shift, {"beta": 0.1, "shift": 0.75}, "the rejected term scaled", {"shift": SHARE},
        formula="-log s(beta (c_w - shift c_l))",
        source="arXiv 2502.07599", when="chosen responses lose probability",
    ),
    LossSpec(
        "cal_dpo", pairwise.cal_dpo, BETA, "DPO with targets for both implicit rewards",
        formula="-log s(h) + ((c_w - 1/(2 beta))^2 + (c_l + 1/(2 beta))^2) / 2",
        source="Cal-DPO (NeurIPS 2024), its code", when="implicit rewards should have a scale",
    ),
    LossSpec(
        "gated_dpo", pairwise.gated_dpo, {"beta": 0.1, "sharpness": 20.0, "threshold": 0.2},
        "pushes unlikely rejected responses no further",
        formula="-log s(beta h), the rejected gradient times s(sharpness (e^x_l - threshold))",
        source="arXiv 2605.02626", when="rejected responses are pushed far below anything sampled",
    ),
    LossSpec(
        "focalpo", scores.focalpo, {"beta": 0.1, "gamma": 0.05}, "less weight for pairs ranked wrongly",
        {"gamma": NOT_NEGATIVE},
        formula="-p^gamma log p, p = s(beta h)",
        source="arXiv 2501.06645, read in a published review; its repository has no code",
        when="wrongly ranked pairs are mostly wrong labels",
    ),
    LossSpec(
        "discopop", scores.discopop, {"beta": 0.1, "discopop_tau": 0.05}, "a loss found by search",
        {"beta": POSITIVE, "discopop_tau": SHARE}, check=_reversed,
        formula="-log s(z) (1 - u) + e^-z u, z = beta h, u = s(z / tau)",
        source="arXiv 2406.08414, eq. 5; trl discopop",
        when="comparison with published runs; near h = 0, where trainings start, its gradient lowers h",
    ),
    LossSpec(
        "fdpo_forward_kl", scores.fdpo_forward_kl, BETA, "DPO under the forward KL",
        formula="-log s(beta (e^-c_l - e^-c_w))",
        source="arXiv 2309.16240; trl f_divergence_type forward_kl", when="the policy should keep all of the reference",
    ),
    LossSpec(
        "fdpo_js", scores.fdpo_js, BETA, "DPO under the Jensen-Shannon divergence",
        formula="-log s(beta (log s(c_w) - log s(c_l)))",
        source="arXiv 2309.16240; trl f_divergence_type js_divergence", when="between both KL divergences",
    ),
    LossSpec(
        "fdpo_alpha", scores.fdpo_alpha, {"beta": 0.1, "alpha": 0.5}, "DPO under an alpha divergence",
        {"beta": (0.0, math.inf), "alpha": (-1e-12, 1.0)}, check=_not_one,
        formula="-log s(beta (f(c_w) - f(c_l))), f(c) = (e^((alpha-1) c) - 1) / (alpha - 1)",
        source="arXiv 2309.16240; trl f_divergence_type alpha_divergence", when="a choice between forward KL and dpo",
    ),
)  # fmt: skip

RATIO_SPECS = (
    LossSpec(
        "ipo", pairwise.ipo, {"beta": 0.1, "length_normalize": True}, "squared distance to a fixed margin",
        formula="(h - 1/(2 beta))^2, of log-probs per token with length_normalize",
        source="arXiv 2310.12036, eq. 17; trl ipo", when="few pairs, labels without noise, no growing margins",
    ),
    LossSpec(
        "ln_dpo", scores.ln_dpo, {"beta": 5.0}, "length-normalized DPO",
        formula="-log s(beta (c_w/|y_w| - c_l/|y_l|))",
        source="arXiv 2411.15124; trl sigmoid_norm", when="responses grow longer under dpo; the Tulu 3 recipe",
    ),
    LossSpec(
        "hinge", scores.hinge, BETA, "a hinge instead of the logistic loss",
        formula="max(0, 1 - beta h)",
        source="arXiv 2305.10425, 2309.06657; trl hinge", when="pairs that are apart should be left alone",
    ),
    LossSpec(
        "exo_pair", scores.exo_pair, {"beta": 0.1, "label_smoothing": 1e-3}, "the KL to the labels reversed",
        {"label_smoothing": (0.0, 0.5)},
        formula="s(z) (log s(z) - log(1 - e)) + s(-z) (log s(-z) - log e), z = beta h",
        source="arXiv 2402.00856, eq. 16; trl exo_pair", when="mode-seeking instead of mode-covering",
    ),
    LossSpec(
        "nca_pair", scores.nca_pair, BETA, "each reward against 0, the chosen one regularized",
        formula="-log s(beta c_w) - log s(-beta c_w)/2 - log s(-beta c_l)/2",
        source="arXiv 2402.05369; trl nca_pair", when="chosen responses lose probability",
    ),
    LossSpec(
        "bco_pair", scores.bco_pair, BETA, "each response classified on its own",
        formula="-log s(beta c_w) - log s(-beta c_l)",
        source="arXiv 2404.04656 without its shift; trl bco_pair", when="in sums, as in MPO; alone rather bco",
    ),
    LossSpec(
        "sppo_hard", scores.sppo_hard, BETA, "squared distance of both log-ratios to targets",
        formula="(c_w - 1/(2 beta))^2 + (c_l + 1/(2 beta))^2",
        source="arXiv 2405.00675, eq. 4.7; trl sppo_hard", when="rounds of self-play with labels by a judge",
    ),
    LossSpec(
        "apo_zero", scores.apo_zero, BETA, "chosen up, rejected down",
        formula="1 - s(beta c_w) + s(beta c_l)",
        source="arXiv 2408.06266, eq. 7; trl apo_zero", when="chosen responses better than the policy's own",
    ),
    LossSpec(
        "apo_down", scores.apo_down, BETA, "both down, rejected further",
        formula="s(beta c_w) + 1 - s(beta h)",
        source="arXiv 2408.06266, eq. 8; trl apo_down", when="chosen responses worse than the policy's own",
    ),
)  # fmt: skip
