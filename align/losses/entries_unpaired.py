"""Entries of the losses of single responses with thumbs."""

from align.config.columns import THUMB
from align.losses import unpaired
from align.losses.entries_reference import NOT_NEGATIVE
from align.losses.spec import LossSpec
from align.losses.step_statistics import KtoBaseline, ThumbShift

WEIGHTS = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
RANGES = {"desirable_weight": NOT_NEGATIVE, "undesirable_weight": NOT_NEGATIVE}

UNPAIRED_SPECS = (
    LossSpec(
        "kto", unpaired.kto, WEIGHTS, "each response against the step's KL from the reference", RANGES,
        columns=(THUMB,), statistics=KtoBaseline,
        formula="desirable: 1 - s(beta (c - kl)); undesirable: 1 - s(beta (kl - c)); kl = mean of c over mismatched "
        "responses of the step, at least 0",
        source="arXiv 2402.01306, eq. 7; trl kto",
        when="thumbs, or pairs whose responses are good or bad by themselves",
    ),
    LossSpec(
        "bco_unpaired", unpaired.bco_unpaired, WEIGHTS, "each response classified against the mean reward", RANGES,
        columns=(THUMB,), statistics=ThumbShift,
        formula="desirable: -log s(beta c - d); undesirable: -log s(d - beta c); d = mean of beta c so far",
        source="arXiv 2404.04656, eq. 6, without its density ratio; BCOTrainer of earlier trl",
        when="as kto, with a gradient that does not vanish for responses that are far off; one pass less per response",
    ),
)  # fmt: skip
