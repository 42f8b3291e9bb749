"""Entries of the losses that read no reference."""

from align.config.parameters import ANY
from align.losses import likelihood, pairwise
from align.losses.entries_reference import NOT_NEGATIVE
from align.losses.spec import LossSpec

LIKELIHOOD_SPECS = (
    LossSpec(
        "nll", likelihood.nll, {}, "supervised fine-tuning on the chosen response", reads_reference=False,
        formula="-x_w",
        source="trl sft, which averages over the tokens of a batch instead of each response",
        when="a term that keeps chosen responses up: {terms: {dpo: 1.0, nll: 0.1}}",
    ),
    LossSpec(
        "simpo", pairwise.simpo, {"beta": 2.0, "gamma_beta_ratio": 0.25}, "length-normalized, no reference",
        {"gamma_beta_ratio": ANY}, reads_reference=False,
        formula="-log s(beta (x_w - x_l - ratio))",
        source="arXiv 2405.14734", when="no memory for a reference; short trainings",
    ),
    LossSpec(
        "cpo", likelihood.cpo, {"beta": 0.1, "alpha": 1.0}, "DPO without a reference, and NLL",
        {"alpha": NOT_NEGATIVE}, reads_reference=False,
        formula="-log s(beta (logp_w - logp_l)) - alpha x_w",
        source="arXiv 2401.08417; trl CPOTrainer, which averages NLL over the tokens of a batch",
        when="translation and other tasks with good references as chosen responses",
    ),
    LossSpec(
        "alphapo", likelihood.alphapo, {"beta": 2.5, "alpha": 0.25, "gamma": 0.1}, "SimPO with a bent reward",
        {"gamma": ANY}, reads_reference=False,
        formula="-log s(beta (r_w - r_l) - gamma), r = (1 - e^(-alpha x)) / alpha",
        source="arXiv 2501.03884; trl CPOTrainer", when="SimPO lowers chosen responses too far",
    ),
    LossSpec(
        "orpo", likelihood.orpo, {"lam": 0.1}, "NLL and an odds ratio, no reference", reads_reference=False,
        formula="-x_w - lam log s(log odds(x_w) - log odds(x_l)), odds(x) = e^x / (1 - e^x)",
        source="arXiv 2403.07691, eq. 4 and 7; trl ORPOTrainer", when="from a base model, without a first fine-tuning",
    ),
    LossSpec(
        "simper", likelihood.simper, {}, "inverse perplexities, no parameter", reads_reference=False,
        formula="e^x_l - e^x_w",
        source="arXiv 2502.00883, its code", when="nothing should be tuned",
    ),
    LossSpec(
        "repo", likelihood.repo, {"gamma": 0.5}, "SimPO as a hinge", reads_reference=False,
        formula="max(0, gamma - (x_w - x_l))",
        source="arXiv 2503.07426, its code", when="SimPO with one parameter; pairs that are apart are left alone",
    ),
)  # fmt: skip
