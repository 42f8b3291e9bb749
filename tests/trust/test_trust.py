"""Trust: slope, proxy, evidence and choice against general optimizers and planted errors."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from scipy.optimize import minimize
from scipy.special import expit

from align.reports.run_page import render_run_page
from align.trust import evidence
from align.trust.analysis import analyze, labels_worth, overtaken_at
from align.trust.evidence import fit_evidence
from align.trust.features import uncentered_pca
from align.trust.linear_proxy import DPO, MADPO, SOFT, Family, HeldOut, Setting, fit, held_out, scaled, without_leak
from align.trust.newton import minimize_by_newton
from align.trust.selection import Selection, bootstrap, by_evidence, by_labels, choose, undecided
from align.trust.sentences import sentences
from align.trust.shared_errors import shared_error_signs
from align.trust.slope import calibrated_slope
from tests.reports.test_report import report

SMALL = Family(grid=(DPO, MADPO, Setting(0.5, 0.5), SOFT), spreads=(0.5, 4.0))


def arena(count: int, size: int = 6, *, flips: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, D] of pairs with Bradley-Terry labels, gold margins [N] (sd 2), gold direction [D]."""
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=size)
    gold *= 2 / np.linalg.norm(gold)
    x = rng.normal(size=(count, size))
    first = (rng.random(count) < expit(x @ gold)) ^ (rng.random(count) < flips)
    x *= np.where(first, 1.0, -1.0)[:, None]
    return x, x @ gold, gold


def loss_of(target: float, weight: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda z: weight * (target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z))


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=40))
def test_slope_has_the_maximum_likelihood(values: list[float]) -> None:
    """No slope on a fine grid has a higher likelihood; margins that contradict most labels get 0."""
    margin = np.array([*values, -1.0])
    slope = calibrated_slope(margin)
    assert slope >= 0

    def loss(b: float) -> float:
        return float(np.logaddexp(0, -b * margin).mean())

    others = [loss(b) for b in (0.0, *(slope * np.linspace(0.5, 1.5, 21)), slope + 0.01)]
    assert loss(slope) <= min(others) + 1e-12


def test_slope_of_scaled_margins_and_of_planted_ones() -> None:
    _, gold, _ = arena(20000)
    assert calibrated_slope(gold) == pytest.approx(1.0, abs=0.05)
    assert calibrated_slope(gold / 10) == pytest.approx(10 * calibrated_slope(gold), rel=1e-6)
    assert calibrated_slope(-gold) == 0.0


def test_fit_is_the_minimum_of_the_loss_that_training_uses() -> None:
    """Against a general optimizer on the sum of trusted_label's cross-entropies, for every setting."""
    x, gold, _ = arena(60)
    x = scaled(x)
    margin = gold + np.random.default_rng(1).normal(size=60)
    theta = fit(x, margin, 0.7, SMALL)
    for k, setting in enumerate(SMALL.grid):
        for j, spread in enumerate(SMALL.spreads):
            m = 0.7 * margin
            t, p = setting.trust, expit(m)
            c = 0.5 + 1.5 / (1 + 2 * np.exp(np.abs(setting.strength * m) - np.log(999)))
            w = np.where(
                setting.strength * m > -np.log(999), expit(c * setting.strength * m) / expit(setting.strength * m), 1
            )

            def total(v: np.ndarray, t: float = t, w: np.ndarray = w, p: np.ndarray = p, s: float = spread) -> float:
                z = x @ v
                hard, soft = np.logaddexp(0, -z), np.logaddexp(0, z)
                per_pair = (1 - t) * w * hard + t * (p * hard + (1 - p) * soft)
                return float(per_pair.sum() + x.shape[1] / s**2 * (v @ v) / 2)

            slow = minimize(total, np.zeros(x.shape[1]), method="BFGS", options={"gtol": 1e-7}).x
            assert theta[:, k, j] == pytest.approx(slow, abs=1e-4)


def test_held_out_labels_are_held_out() -> None:
    """Fold by fold in plain loops; changing the margins of one fold does not change the policies that it tests."""
    x, gold, _ = arena(50)
    x, margin = scaled(x), gold + np.random.default_rng(2).normal(size=50)
    fold = np.arange(50) % 5
    found = held_out(x, margin, [fold], SMALL)
    for number in range(5):
        train, test = fold != number, fold == number
        slope = calibrated_slope(margin[train])
        z = np.tensordot(x[test], fit(x[train], margin[train], slope, SMALL), axes=1)
        assert found.loglik[test] == pytest.approx(-np.logaddexp(0, -z), abs=1e-9)
        assert found.margin_alone[test] == pytest.approx(-np.logaddexp(0, -slope * margin[test]))
    changed = margin.copy()
    changed[fold == 0] *= -1
    other = held_out(x, changed, [fold], SMALL)
    assert other.loglik[fold == 0] == pytest.approx(found.loglik[fold == 0])
    assert other.loglik[fold == 1] != pytest.approx(found.loglik[fold == 1])


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_order_and_scale_change_nothing(seed: int) -> None:
    x, gold, _ = arena(40, 3, seed=seed)
    margin = gold - 1
    order = np.random.default_rng(seed).permutation(40)
    one = fit(scaled(x), margin, 0.5, SMALL)
    assert fit(scaled(7 * x[order]), margin[order], 0.5, SMALL) == pytest.approx(one, abs=1e-6)
    assert fit(scaled(x), 10 * margin, 0.05, SMALL) == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("prior_mean", [0.0, -30.0])
def test_newton_converges_where_labels_are_separable(prior_mean: float) -> None:
    """All labels agree along one direction and the penalty is tiny; also from a start without curvature."""
    x = np.abs(np.random.default_rng(0).normal(size=(80, 1)))

    def derivatives(z: np.ndarray, settings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = expit(z)
        return p - 1, p * (1 - p)

    theta = minimize_by_newton(x, derivatives, np.full((1, 1), prior_mean), np.full((1, 1), 1e-3))
    gradient = x.T @ (expit(x @ theta) - 1) + 1e-3 * (theta - prior_mean)
    assert abs(float(gradient[0, 0])) < 1e-5 and float(theta[0, 0]) > 5


def test_choice_has_the_highest_likelihood_and_bootstrap_contains_it() -> None:
    rng = np.random.default_rng(0)
    loglik = rng.normal(size=(200, 4, 2)) * 0.1
    loglik[:, 2, 1] += 0.5
    assert by_labels(loglik) == Selection(2, 1)
    assert by_labels(loglik, np.array([True, False, False, True])).setting in (0, 3)
    left = undecided(loglik, Selection(2, 1), 1.0)
    assert left[2, 1] and left.sum() == 1
    assert undecided(loglik, Selection(2, 1), 1e6).all()
    assert bootstrap(loglik, SMALL.grid, seed=0) == {"trust": (0.5, 0.5), "strength": (0.5, 0.5)}


def test_evidence_selects_the_policy_with_the_highest_correlation() -> None:
    rng = np.random.default_rng(0)
    x, theta = rng.normal(size=(50, 5)), rng.normal(size=(5, 4, 2))
    proposal = 3 * theta[:, 1, 0] + 0.01 * rng.normal(size=5)
    everything = np.ones((4, 2), dtype=bool)
    assert by_evidence(theta, proposal, x, everything) == Selection(1, 0)
    without = everything.copy()
    without[1, 0] = False
    correlations = {
        (k, j): np.corrcoef(x @ theta[:, k, j], x @ proposal)[0, 1]
        for k in range(4)
        for j in range(2)
        if (k, j) != (1, 0)
    }
    assert by_evidence(theta, proposal, x - x.mean(axis=0), without) == Selection(
        *max(correlations, key=correlations.get)
    )


def test_labels_or_evidence_decide() -> None:
    """Slope 0: always DPO. Cross-fitted margins: labels, corrected for the leak. Otherwise evidence breaks ties."""
    rng = np.random.default_rng(0)
    loglik = -0.6 + 0.01 * rng.normal(size=(100, 4, 2))
    loglik[:, 3] += 0.05
    theta, x = rng.normal(size=(5, 4, 2)), rng.normal(size=(50, 5))

    def chosen(slope: float, alone: float, proposal: np.ndarray, same_labels: bool) -> Setting:
        found = HeldOut(loglik, np.full(100, alone), slope)
        return SMALL.grid[choose(found, theta, proposal, x, SMALL, same_labels=same_labels).setting]

    assert chosen(0.0, -0.6, theta[:, 3, 0], same_labels=False) == DPO
    assert chosen(0.5, -0.5, theta[:, 0, 0], same_labels=True) == SOFT
    assert chosen(0.5, -0.65, theta[:, 3, 0], same_labels=True) == DPO
    assert chosen(0.5, -0.6, theta[:, 3, 1], same_labels=False) == SOFT
    loglik[:, 3] -= 0.05
    loglik += 3 * rng.normal(size=(100, 4, 2))
    assert chosen(0.5, -0.6, theta[:, 1, 0], same_labels=False) == MADPO


def test_the_leak_is_subtracted_by_the_weight_of_the_margin() -> None:
    """Soft labels end at the likelihood of the margins alone, DPO is unchanged, MADPO loses as much as soft labels."""
    loglik = np.log(np.full((10, 4, 2), 0.5))
    loglik[:, 3, 1] += 0.04
    fair = without_leak(HeldOut(loglik, np.full(10, np.log(0.5) + 0.01), 1.0), SMALL)
    assert fair[:, 3, 1] == pytest.approx(np.log(0.5) + 0.01)
    assert fair[:, 0] == pytest.approx(loglik[:, 0])
    assert (loglik - fair)[:, 1] == pytest.approx(0.03) and (loglik - fair)[:, 2] == pytest.approx(0.75 * 0.03)
    honest = HeldOut(loglik, np.full(10, np.log(0.5) + 0.2), 1.0)
    assert without_leak(honest, SMALL) == pytest.approx(loglik)


def test_uncentered_pca_keeps_signs_and_the_mean() -> None:
    """All directions keep inner products; fewer are the least-squares best; the mean difference is not removed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 8)) + 2
    whole = uncentered_pca(x, 8)
    assert whole @ whole.T == pytest.approx(x @ x.T)
    few = uncentered_pca(x, 3)
    singular = np.linalg.svd(x, compute_uv=False)
    assert np.square(few).sum() == pytest.approx(np.square(singular[:3]).sum())
    assert abs(few[:, 0].mean()) > 3 and uncentered_pca(-x, 3) == pytest.approx(-few)


def test_evidence_policy_is_the_posterior_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """One point of the grid, in the original coordinates, against a general optimizer."""
    spread, flip, rms = 0.8, 0.2, 1.2
    for name, value in (("SLOPES", rms), ("SHARED", spread), ("FLIPS", flip)):
        monkeypatch.setattr(evidence, name, (value,))
    x, gold, _ = arena(200, 5, flips=flip)
    x, margin = scaled(x), gold + np.random.default_rng(1).normal(size=200)
    mu = np.linalg.lstsq(x, margin, rcond=None)[0]
    a = rms / np.sqrt(np.square(x @ mu).mean())
    noise = np.square(margin - x @ mu).sum() / (200 - 5)
    covariance = spread**2 / 5 * np.eye(5) + a**2 * noise * np.linalg.inv(x.T @ x)

    def cost(theta: np.ndarray) -> float:
        away = theta - a * mu
        return float(
            away @ np.linalg.solve(covariance, away) / 2 - np.log(flip + (1 - 2 * flip) * expit(x @ theta)).sum()
        )

    found = fit_evidence(x, margin)
    slow = minimize(cost, a * mu, method="BFGS", options={"gtol": 1e-7}).x
    assert found.theta == pytest.approx(slow, abs=1e-3)
    assert (found.slope, found.flip_rate) == pytest.approx((a, flip))


@pytest.mark.parametrize(
    ("error", "shared", "flips"), [(0.5, 0.0, 0.0), (2.0, 0.0, 0.0), (1.0, 2.0, 0.0), (1.0, 0.0, 0.2), (1.0, 0.0, 0.4)]
)
def test_evidence_finds_planted_errors(error: float, shared: float, flips: float) -> None:
    """The independent error, the flip rate, the slope and the shared error, each within its sampling error.

    With gold margins of sd 2 and a shared error of sd S the best slope is 4 / (4 + S^2), and its error has standard
    deviation 2 S / sqrt(4 + S^2).
    """
    found = []
    for seed in range(4):
        x, gold, _ = arena(1500, 12, flips=flips, seed=seed)
        rng = np.random.default_rng([seed, 9])
        wrong = rng.normal(size=12)
        margin = gold + shared * (x @ wrong) / np.linalg.norm(wrong) + error * rng.normal(size=1500)
        found.append(fit_evidence(scaled(x), margin))
    assert np.mean([e.independent_error for e in found]) == pytest.approx(error, rel=0.05)
    least = flips if flips < 0.3 else 0.3  # many flips are underestimated, see docs/whom-to-trust.md
    assert least - 0.06 <= np.mean([e.flip_rate for e in found]) <= flips + 0.06
    assert np.mean([e.slope for e in found]) == pytest.approx(4 / (4 + shared**2), abs=0.3)
    missed = 2 * shared / np.sqrt(4 + shared**2)
    assert np.mean([e.shared_error for e in found]) == pytest.approx(missed, abs=0.5 if flips < 0.3 else 1.0)


@pytest.mark.parametrize(("kind", "believed"), [("gold", True), ("noise", False)])
def test_analysis_believes_gold_and_not_noise(kind: str, believed: bool) -> None:
    x, gold, _ = arena(400, 12, seed=3)
    rng = np.random.default_rng(4)
    margin = gold + 0.3 * rng.normal(size=400) if kind == "gold" else 2 * rng.normal(size=400)
    folds = [rng.permutation(400) % 5]
    found = analyze(x, margin, folds, Family(), same_labels=False, seed=0)
    assert (found["chosen"]["trust"] >= 0.5) == believed
    assert found["gains"]["labels"]["low"] > 0
    assert (found["gains"]["margin"]["low"] > 0) == believed
    assert len(found["grid"]) == 19 and min(one["error"] for one in found["grid"]) == 0


def test_learning_curve_arithmetic() -> None:
    """gain = limit - cost / share by hand: labels 0.30 - 0.10 / s, chosen 0.28 - 0.02 / s."""
    curve = [{"share": s, "labels": 0.30 - 0.10 / s, "chosen": 0.28 - 0.02 / s} for s in (0.25, 0.5, 1.0)]
    assert labels_worth(curve) == pytest.approx(0.10 / 0.04 - 1)
    assert labels_worth([{**point, "chosen": point["labels"] - 0.01} for point in curve]) == 0.0
    assert labels_worth([{**point, "chosen": point["labels"] + 0.11} for point in curve]) is None
    assert overtaken_at(curve) == pytest.approx(0.08 / 0.02)
    assert overtaken_at([{**point, "labels": point["labels"] - 0.1} for point in curve]) is None


def test_signs_of_a_shared_error() -> None:
    """It finds a reward model that prefers length, unlike the labels, and a group with margins of pure noise."""
    rng = np.random.default_rng(0)
    _, gold, _ = arena(2000, 4)
    lengths = np.round(5 * rng.normal(size=2000))
    clean = shared_error_signs(gold, lengths)
    assert not clean["length"]["clear"]
    biased = shared_error_signs(gold + 0.3 * lengths, lengths)["length"]
    assert biased["clear"] and biased["z"] < 0 and biased["correlation"] > 0.3
    group = np.where(np.arange(2000) % 2, "film", "food")
    margin = np.where(group == "food", rng.normal(size=2000), gold)
    found = shared_error_signs(margin, lengths, group.tolist())
    assert found["group food"]["clear"] and found["group food"]["z"] < 0
    assert found["group film"]["slope"] == pytest.approx(1.0, abs=0.15)
    assert abs(found["group food"]["slope"]) < 0.2


def test_the_report_says_what_was_measured() -> None:
    """The section next to the reward model has every sentence and the plot; a run without trust has no section."""
    x, gold, _ = arena(120, 4)
    rng = np.random.default_rng(0)
    found = analyze(x, gold + rng.normal(size=120), [rng.permutation(120) % 5], SMALL, same_labels=True, seed=0)
    found["signs"] = shared_error_signs(gold, np.round(rng.normal(size=120)))
    found["sentences"] = sentences(found, "cross-fitted")
    page = render_run_page(report() | {"trust": found})
    assert all(str(escape(sentence)) in page for sentence in found["sentences"].values())
    assert page.count("<svg") > render_run_page(report()).count("<svg")
    assert "Whom to believe" in page and "Whom to believe" not in render_run_page(report())
