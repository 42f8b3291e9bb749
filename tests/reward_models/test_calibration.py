"""Calibrated margins and length bias: known maps are recovered, maps are odd and agree with scikit-learn, bad files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

from align.errors import ModelError
from reward_models.calibration import (
    COLDEST,
    FILE,
    HOTTEST,
    MarginMap,
    best_temperature,
    calibrated_out_of_fold,
    fit_map,
    isotonic,
)
from reward_models.length_bias import length_probe, length_slope, word_difference
from reward_models.margin_metrics import evaluate_margins
from tests.helpers.builders import rows

margins_of = st.lists(st.floats(-8, 8), min_size=1, max_size=40).map(np.array)


def labelled(true: np.ndarray, shown: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Margins with the sign of a label that is drawn with the true log-odds."""
    return np.where(rng.random(len(true)) < expit(true), shown, -shown)


@pytest.mark.parametrize("scale", [0.2, 1.0, 6.0])
def test_temperature_is_recovered_and_a_margin_of_2_means_88_percent(scale: float) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 40_000)
    margins = labelled(true, scale * true, rng)
    assert best_temperature(margins) == pytest.approx(scale, rel=0.03)
    mapped = fit_map(margins, np.zeros(len(margins)), "temperature", length=False)(margins, np.zeros(len(margins)))
    near = np.abs(np.abs(mapped) - 2) < 0.1
    assert np.mean(mapped[near] > 0) == pytest.approx(0.88, abs=0.02)
    assert evaluate_margins(mapped).ece < 0.01 and (scale == 1.0 or evaluate_margins(margins).ece > 0.05)


@given(margins_of)
def test_temperature_minimizes_the_log_loss(margins: np.ndarray) -> None:
    right = (len(margins) + 1) / (len(margins) + 2)

    def loss(t: float) -> float:
        p = np.clip(expit(margins / t), 1e-300, 1)
        q = np.clip(expit(-margins / t), 1e-300, 1)
        return float(-np.mean(right * np.log(p) + (1 - right) * np.log(q)))

    found = best_temperature(margins)
    assert COLDEST * 0.99 <= found <= HOTTEST * 1.01
    for other in (0.01, 0.1, 1.0, 10.0, 100.0):
        assert loss(found) <= loss(other) + 1e-6


def test_margins_that_are_always_right_or_worse_than_chance_have_a_temperature() -> None:
    assert math.isfinite(best_temperature(np.full(50, 3.0)))
    assert expit(3.0 / best_temperature(np.full(50, 3.0))) == pytest.approx(51 / 52, abs=1e-3)
    assert best_temperature(np.full(50, -3.0)) == pytest.approx(HOTTEST, rel=0.02)


@given(margins_of)
def test_isotonic_against_scikit_learn(margins: np.ndarray) -> None:
    margins = margins.round(2)  # scikit-learn takes margins closer than floats' resolution for equal
    knots, odds = isotonic(margins)
    least = 1 / (2 * len(margins) + 2)
    theirs = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
    doubled = np.concatenate([margins, -margins])
    theirs.fit(doubled, np.repeat([1.0, 0.0], len(margins)))
    assert expit(np.interp(doubled, knots, odds)) == pytest.approx(theirs.predict(doubled), abs=1e-6)


@example(np.array([2.2e-309]), "isotonic", False, 0.0, 0)
@given(
    margins_of,
    st.sampled_from(["temperature", "isotonic", None]),
    st.booleans(),
    st.floats(-9, 9),
    st.integers(-20, 20),
)
def test_every_map_is_odd_and_never_falls(
    margins: np.ndarray, kind: str | None, length: bool, margin: float, words: int
) -> None:
    difference = np.arange(len(margins)) % 7 - 3.0
    fitted = fit_map(margins, difference, kind, length=length)  # type: ignore[arg-type]
    there, back = (float(fitted(np.array([s * margin]), np.array([float(s * words)]))[0]) for s in (1, -1))
    assert there == pytest.approx(-back, abs=1e-9)
    line = fitted(np.linspace(-10, 10, 50), np.zeros(50))
    assert (np.diff(line) >= -1e-12).all()


def test_isotonic_fixes_what_no_temperature_can() -> None:
    """Margins of any size that agree with 90% of the labels."""
    rng = np.random.default_rng(1)
    size = rng.uniform(0.05, 8, 6000)
    margins = np.where(rng.random(6000) < 0.9, size, -size)
    fold, words = np.arange(6000) % 5, np.zeros(6000)
    raw, warm, steps = (
        evaluate_margins(m).ece
        for m in (
            margins,
            calibrated_out_of_fold(margins, words, fold, "temperature", length=False),
            calibrated_out_of_fold(margins, words, fold, "isotonic", length=False),
        )
    )
    assert steps < 0.02 < 0.05 < min(raw, warm)


def test_maps_out_of_fold_do_not_see_their_fold() -> None:
    margins, words, fold = np.array([1.0, 2.0, -1.0, 3.0]), np.zeros(4), np.array([0, 0, 1, 1])
    changed = margins.copy()
    changed[0] = -50.0
    first, second = (calibrated_out_of_fold(m, words, fold, "temperature", length=False) for m in (margins, changed))
    assert first[1] == second[1] and first[2] != second[2]


def test_one_fold_alone_is_calibrated_on_itself() -> None:
    """There is no other fold to fit to."""
    margins, words = np.array([1.0, 2.0, -1.0, 3.0]), np.zeros(4)
    found = calibrated_out_of_fold(margins, words, np.zeros(4, dtype=int), "temperature", length=False)
    assert found == pytest.approx(margins / best_temperature(margins))


def test_the_length_part_is_found_and_removed() -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(-30, 31, 4000).astype(float)
    honest = rng.normal(1, 1, 4000)
    margins = honest + 0.2 * words
    probe = length_probe(margins, words)
    assert probe["slope"] == pytest.approx(0.2, abs=0.01) and probe["explained"] > 0.7
    assert probe["correlation"]["low"] > 0.8 and probe["longer_preferred"]["low"] > 0.8
    assert probe["accuracy_longer"]["value"] > 0.9 > 0.5 > probe["accuracy_shorter"]["value"]
    left = fit_map(margins, words, None, length=True)(margins, words)
    assert abs(length_slope(left, words)) < 1e-12 and np.std(left - honest) < 0.2
    assert fit_map(margins, words, None, length=True).length_slope == pytest.approx(length_slope(margins, words))
    for kind in ("temperature", "isotonic"):
        assert fit_map(margins, words, kind, length=False).length_slope == 0.0  # type: ignore[arg-type]
        kept = fit_map(margins - length_slope(margins, words) * words, np.zeros_like(words), kind, length=False)  # type: ignore[arg-type]
        both = fit_map(margins, words, kind, length=True)  # type: ignore[arg-type]
        assert both(margins, words) == pytest.approx(kept(margins - length_slope(margins, words) * words, 0 * words))
        assert (both.kind, both.pairs) == (kind, len(margins))
    clean = length_probe(honest, words)
    assert clean["correlation"]["low"] < 0 < clean["correlation"]["high"] and clean["explained"] < 0.01


def test_a_probe_of_pairs_that_say_nothing() -> None:
    probe = length_probe(np.zeros(3), np.zeros(3))
    assert probe["slope"] == 0 and probe["correlation"] is None and probe["accuracy_longer"] is None


def test_words_are_counted_in_text_and_messages() -> None:
    plain = {"chosen": "one two three", "rejected": "one"}
    chat = {name: [{"role": "assistant", "content": text}] for name, text in plain.items()}
    assert word_difference(Dataset.from_list([plain])).tolist() == [2.0]
    assert word_difference(Dataset.from_list([chat])).tolist() == [2.0]


@pytest.mark.parametrize("kind", ["temperature", "isotonic"])
def test_a_saved_map_is_the_same_and_a_table_keeps_its_sense(kind: str, tmp_path: Path) -> None:
    table = Dataset.from_list(rows(12))
    margin = np.asarray(table["margin"])
    table = table.add_column("reward_chosen", (margin + 0.25).tolist()).add_column("reward_rejected", [0.25] * 12)
    table = table.add_column("margin_std", [0.5] * 12)
    fitted = fit_map(margin, word_difference(table), kind, length=True)  # type: ignore[arg-type]
    fitted.save(tmp_path)
    assert MarginMap.load(tmp_path) == fitted and fitted.pairs == 12
    mapped = fitted.apply(table)
    assert np.asarray(mapped["margin"]) == pytest.approx(fitted(margin, word_difference(table)))
    gap = np.asarray(mapped["reward_chosen"]) - np.asarray(mapped["reward_rejected"])
    assert gap == pytest.approx(np.asarray(mapped["margin"]))
    assert np.asarray(mapped["reward_chosen"]) + np.asarray(mapped["reward_rejected"]) == pytest.approx(margin + 0.5)
    words = word_difference(table)
    if kind == "temperature":
        expected = np.full(12, 0.5 / fitted.temperature)
    else:
        expected = np.abs(fitted(margin + 0.25, words) - fitted(margin - 0.25, words))
        assert not np.allclose(expected, 0.5)
    assert np.asarray(mapped["margin_std"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"calibration-file.*no such file"),
        ("{", "not a calibration"),
        ("[]", "not a calibration"),
        (json.dumps({"kind": "temperature", "length_slope": 0, "temperature": 0}), "not a calibration"),
        (json.dumps({"kind": "magic", "length_slope": 0, "temperature": 1}), r"kind 'magic'"),
        (json.dumps({"kind": "isotonic", "length_slope": 0, "temperature": 1}), "not a calibration"),
    ],
)
def test_calibration_files_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(ModelError, match=message):
        MarginMap.load(tmp_path)
