"""What a few checked pairs are worth: their share of the weight, and which sources of the other pairs to doubt.

A checked pair is one whose label a person vouches for. The functions here work on feature differences alone.

Legend: N pairs, M checked pairs, D features. A row of x is the chosen response's features minus the rejected one's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import t as student

from align.data.checked_pairs import checked_weight, default_share
from align.stats import Estimate, cluster_codes, share_interval
from align.trust.linear_proxy import log_sigmoid
from align.trust.slope import calibrated_slope
from align.trust.weighted_heads import fit_weighted

HIGHER_SHARES = (0.5, 0.75, 0.9)
"""Shares that are tried beside the default one."""
GAIN_ERRORS = 2.0
"""Standard errors by which a higher share must lower the held-out loss."""
FOLDS = 10
FEWEST_CHECKED = 20
"""Fewest checked pairs that may raise their share."""
FEWEST_OF_SOURCE = 30
"""Fewest pairs of a source that is judged; with fewer, the interval is shown and no verdict is given."""
OUT_OF_FOLD = 2.0
"""Factor on the variance of a source's agreement: what is compared comes from heads that share most of their labels, as
in ``align.stats.out_of_fold``."""
FALSE_NAMES = 0.05
"""Share of worlds without a wrong source in which one may be named."""


@dataclass(frozen=True, slots=True)
class ShareChoice:
    """The share of the checked pairs and what it rests on."""

    share: float
    default: float
    gains: dict[float, tuple[float, float]]
    """Higher share -> (nats a checked pair gained over the default, its standard error), slope-calibrated, held out."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"gains": [{"share": k, "gain": v[0], "error": v[1]} for k, v in self.gains.items()]}


def choose_share(
    x: np.ndarray, checked: np.ndarray, fold: np.ndarray, penalty: float, *, default: float | None = None
) -> ShareChoice:
    """The default share, or a higher one if held-out checked pairs gain by two standard errors.

    The loss is that of checked pairs under heads that have not seen their fold, after one slope is fitted to all of
    them: without the slope, a higher weight would mostly repair the scale of a head that noisy labels made timid.

    Args:
        x: [N, D].
        checked: [M, D], scaled as x.
        fold: [M], checked pairs that share texts in one.
        penalty: of all pairs, see ``choose_penalty``.
        default: share to start from; None: ``default_share``.
    """
    start = default_share(len(checked), len(x)) if default is None else default
    higher = [share for share in HIGHER_SHARES if share > start]
    if len(checked) < FEWEST_CHECKED or len(np.unique(fold)) < 2 or not higher:
        return ShareChoice(start, start, {})
    shares = np.array([start, *higher])
    margins = np.empty((len(checked), len(shares)))
    for number in np.unique(fold):
        test = fold == number
        weights = np.ones((len(x) + int((~test).sum()), len(shares)))
        weights[len(x) :] = [checked_weight(int((~test).sum()), len(x), share) for share in shares]
        margins[test] = checked[test] @ fit_weighted(np.concatenate([x, checked[~test]]), weights, penalty)
    losses = np.stack([calibrated_loss(column) for column in margins.T], axis=1)
    gained = losses[:, :1] - losses[:, 1:]
    mean, error = gained.mean(axis=0), gained.std(axis=0, ddof=1) / np.sqrt(len(checked))
    gains = {share: (float(m), float(e)) for share, m, e in zip(higher, mean, error, strict=True)}
    sure = [share for share, (m, e) in gains.items() if m > GAIN_ERRORS * e]
    return ShareChoice(max(sure, key=lambda share: gains[share][0], default=start), start, gains)


def calibrated_loss(margins: np.ndarray) -> np.ndarray:
    """Log-loss [M] in nats of margins [M] times the slope that fits them best; 0 if none is below 0."""
    if not (margins < 0).any():
        return np.zeros(len(margins))
    losses: np.ndarray = -log_sigmoid(calibrated_slope(margins) * margins)
    return losses


@dataclass(frozen=True, slots=True)
class SourceVerdict:
    """How the labels of one source agree with a head of the other sources and the checked pairs."""

    source: str
    pairs: int
    agreement: Estimate
    """Share of its labels that the head agrees with, 95% interval."""
    expected: float
    """Share that would agree if its labels were as good as the others', from the sizes of its margins."""
    z: float | None
    """(agreement - expected, less that of the other sources) in standard errors; None: too few pairs."""
    named: bool
    """Whether its labels are worse than the others' beyond chance, at 5% for all sources together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"agreement": self.agreement.to_dict()}


def judge_sources(
    x: np.ndarray,
    sources: Sequence[str],
    checked: np.ndarray,
    penalty: float,
    *,
    share: float | None = None,
    clusters: np.ndarray | None = None,
) -> list[SourceVerdict]:
    """Judge every source by a head that has not seen it; sources in the order of their names.

    A source is compared with what the head expects of it: a head agrees less often with labels of pairs that are close,
    so agreement alone would name the source with the difficult pairs. The expectation is the mean sigmoid(b |margin|)
    with the slope b of the other sources' pairs. Bonferroni over the judged sources, one-sided, with Student's t: in a
    world without a wrong source none is named in about 95% of cases (docs/checked-pairs.md has the measured rates).

    Args:
        x: [N, D].
        sources: [N].
        checked: [M, D], scaled as x; M may be 0.
        penalty: of all pairs, see ``choose_penalty``.
        share: of the checked pairs in the total weight; None: ``default_share``.
        clusters: cluster [N] of every pair, for standard errors; None: each pair is one.
    """
    names, code = np.unique(np.asarray(sources, dtype=str), return_inverse=True)
    margins = _left_out_margins(x, code, checked, penalty, share)
    agree = np.where(margins == 0, 0.5, margins > 0)
    which = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    counts = np.bincount(code)
    judged = (counts >= FEWEST_OF_SOURCE) & (counts < len(x))
    verdicts = []
    for k, name in enumerate(names):
        own = code == k
        expected = _expected(margins, own)
        statistic, named = None, False
        if judged[k]:
            statistic, units = _difference(agree - expected, own, which)
            named = statistic < -float(student.ppf(1 - FALSE_NAMES / int(judged.sum()), max(units - 1, 1)))
        agreement = share_interval(agree[own], clusters=which[own])
        verdicts.append(
            SourceVerdict(str(name), int(own.sum()), agreement, float(expected[own].mean()), statistic, named)
        )
    return verdicts


def checked_agreement(x: np.ndarray, checked: np.ndarray, penalty: float) -> Estimate:
    """Share of the checked labels [M, D] that a head of the other pairs [N, D] agrees with.

    Below one half beyond its interval, most of the pairs are wrong, and no source can be judged by the others.
    """
    margins = checked @ fit_weighted(x, np.ones((len(x), 1)), penalty)[:, 0]
    return share_interval(np.where(margins == 0, 0.5, margins > 0))


def _left_out_margins(
    x: np.ndarray, code: np.ndarray, checked: np.ndarray, penalty: float, share: float | None
) -> np.ndarray:
    """Margins [N] of every pair under the head of the other sources and the checked pairs."""
    count = int(code.max()) + 1
    weights = np.ones((len(x) + len(checked), count))
    for k in range(count):
        weights[: len(x), k] = code != k
        if len(checked):
            others = int((code != k).sum())
            part = default_share(len(checked), others) if share is None else share
            weights[len(x) :, k] = checked_weight(len(checked), others, part) if others else 1.0
    if not len(checked):
        weights[: len(x), (code[:, None] == np.arange(count)).all(axis=0)] = 1.0
    heads = fit_weighted(np.concatenate([x, checked]), weights, penalty)
    margins: np.ndarray = np.einsum("nd,dn->n", x, heads[:, code])
    return margins


def _expected(margins: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Probability [N] that a label agrees with its margin, by the slope of the pairs outside a source."""
    others = margins[~own] if (~own).any() else margins
    slope = calibrated_slope(others) if (others < 0).any() else 1.0
    found: np.ndarray = expit(slope * np.abs(margins))
    return found


def _difference(residual: np.ndarray, own: np.ndarray, clusters: np.ndarray) -> tuple[float, int]:
    """(mean residual of a source minus that of the others in standard errors, number of the source's clusters)."""
    means, variances, units = [], [], []
    for part in (own, ~own):
        codes = cluster_codes(clusters[part])
        values = residual[part]
        centered = values - values.mean()
        sums = centered if codes is None else np.bincount(codes, weights=centered)
        means.append(float(values.mean()))
        units.append(len(sums))
        variances.append(float(np.square(sums).sum()) / len(values) ** 2 * len(sums) / max(len(sums) - 1, 1))
    error = np.sqrt(OUT_OF_FOLD * sum(variances))
    return (float((means[0] - means[1]) / error) if error > 0 else 0.0), units[0]
