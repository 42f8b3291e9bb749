"""Golden values of every loss, worked by hand from the formulas.

One pair with logp_w = -20, logp_l = -25, ref_w = -21, ref_l = -24, lengths 10 and 12 and the margin 1.5, so that h = 2,
c_w = 1, c_l = -1, x_w = -2, x_l = -25/12. A loss that compares the pairs of a step has this pair alone in its step; the
tokens of a loss that reads them are those of ``tests.losses.inputs.tokens``.
"""

from typing import Any

GOLDEN: list[tuple[str, dict[str, Any], float]] = [
    ("dpo", {}, 0.598139),
    ("madpo", {}, 0.696238),
    ("soft_madpo", {}, 0.607806),
    ("trust", {}, 0.665431),
    ("trust", {"slope": 2.0, "trust": 0.25, "strength": 0.0}, 0.600510),
    ("ipo", {"length_normalize": False}, 9.0),
    ("ipo", {}, 23.200278),
    ("odpo", {}, 1.541008),
    ("mmpo", {}, 0.634624),
    ("rpo_bwd_kl", {}, 0.159572),
    ("rpo_fwd_kl", {}, 0.188490),
    ("rpo_sq", {}, 1.69),
    ("cdpo", {}, 0.618139),
    ("robust", {}, 0.573139),
    ("dpop", {}, 0.598139),
    ("dpo_shift", {}, 0.609470),
    ("cal_dpo", {}, 16.126928),
    ("gated_dpo", {}, 0.598139),
    ("simpo", {}, 0.873639),
    ("nll", {}, 2.0),
    ("ln_dpo", {}, 0.336365),
    ("hinge", {}, 0.8),
    ("nca_pair", {}, 1.338793),
    ("bco_pair", {}, 1.288793),
    ("exo_pair", {}, 2.422015),
    ("sppo_hard", {}, 32.0),
    ("apo_zero", {}, 0.950042),
    ("apo_down", {}, 0.975145),
    ("discopop", {}, 0.814763),
    ("focalpo", {}, 0.580515),
    ("cpo", {}, 2.474077),
    ("alphapo", {}, 0.577216),
    ("orpo", {}, 2.064641),
    ("simper", {}, -0.010821),
    ("repo", {}, 0.416667),
    ("fdpo_js", {}, 0.644397),
    ("fdpo_forward_kl", {}, 0.582517),
    ("fdpo_alpha", {}, 0.594349),
    ("beta_dpo", {}, 0.506625),
    ("bco", {}, 1.288793),
    ("aot", {}, 0.598139),
    ("aot_unpaired", {}, 0.598139),
    ("alpha_dpo", {}, 1.534466),
    ("amapo", {}, 0.613283),
    ("gamma_po", {}, 1.343892),
    ("gamma_dpo", {}, 0.598139),
    ("kto", {}, 0.475021),  # desirable; c_l = -1 is the mismatched response, so that kl = 0
    ("kto", {"desirable_weight": 2.0}, 0.950042),
    ("bco_unpaired", {}, 0.693147),  # the only response so far: d = beta c
    ("wpo", {}, 0.362790),
    ("mallows_po", {}, 0.666928),
    ("ld_dpo", {}, 0.620957),
    ("sampo", {}, 0.644397),  # the first rejected token is left out, so that h = 1
]
