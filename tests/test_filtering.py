"""Filtering: rules, neighbours, entropy, selection; against brute force and known distributions."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma
from scipy.stats import spearmanr

from align.filtering.neighbours import _exact, kth_distance
from align.filtering.rules import RULES, apply_rules, length_bias
from align.filtering.scores import DUPLICATE_DISTANCE, diversity, quality
from align.filtering.select import greedy, importance, standardise, top

VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=30)


def pair(prompt: str, chosen: str, rejected: str, name: str = "x") -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def unit(count: int, size: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, size))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("rule", "rows", "found"),
    [
        ("same_text", [pair("p", "Yes  it is", "yes it\nis"), pair("p", "yes", "no")], {0}),
        ("duplicate", [pair("p", "a", "b", "z"), pair("P", "a ", "b", "y"), pair("p", "a", "c", "w")], {0}),
        ("contradiction", [pair("p", "a", "b", "1"), pair("p", "b", "a", "2"), pair("q", "b", "a", "3")], {0, 1}),
        ("length", [pair("p", "...", "b"), pair("p", "a", "b")], {0}),
        (
            "pii",
            [pair("write to jo@example.org", "a", "b"), pair("call", "555-010-9999", "b"), pair("p", "a", "b")],
            {0, 1},
        ),
    ],
)
def test_rules(rule: str, rows: list[dict[str, Any]], found: set[int]) -> None:
    assert set(RULES[rule](rows)) == found


def test_near_duplicates_and_contamination() -> None:
    text = " ".join(f"word{k}" for k in range(300))
    rows = [
        pair(text, "a good answer", "a bad answer", "b"),
        pair(text + " more", "a good answer", "a bad answer", "a"),
    ]
    rows.append(pair("something else entirely here now", "yes of course", "no never at all", "c"))
    found = apply_rules(rows)
    assert {k: rule for k, (rule, _) in found.items()} == {0: "near_duplicate"} and "nearly the same as a" in found[0][
        1
    ]
    assert apply_rules(rows, skip=["near_duplicate"]) == {}
    overlap = apply_rules(
        rows, skip=["near_duplicate"], held_out=["before word3 word4 word5 word6 word7 word8 word9 word10 z"]
    )
    assert {k: rule for k, (rule, _) in overlap.items()} == {0: "contamination", 1: "contamination"}


def test_length_bias() -> None:
    assert length_bias([pair("p", "a b c", "a"), pair("p", "a b", "c"), pair("p", "a", "b")]) == 1.0
    assert length_bias([pair("p", "a", "b")]) == 0.5


@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 99))
def test_exact_neighbours_against_brute_force(count: int, k: int, seed: int) -> None:
    vectors = unit(count, 4, seed)
    found = kth_distance(vectors, k, seed=0)
    full = np.linalg.norm(vectors[:, None].astype(float) - vectors[None], axis=2)
    np.fill_diagonal(full, np.inf)
    expected = np.sort(full, axis=1)[:, min(k, count - 1) - 1]
    assert np.allclose(found.distance, expected, atol=1e-3) and found.recall == 1.0


def test_inverted_file_is_close_to_exact() -> None:
    """On clustered vectors: recall, rank of the scores, the same answer twice."""
    centres = unit(60, 32)
    noise = np.random.default_rng(1).normal(scale=0.08, size=(6000, 32))
    vectors = centres[np.arange(6000) % 60] + noise
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = kth_distance(vectors, 5, seed=0, exact_limit=1000)
    exact, _ = _exact(vectors, np.arange(6000), 5)
    assert found.method.startswith("IVF") and found.recall >= 0.95
    assert spearmanr(found.distance, exact).statistic >= 0.99
    assert np.array_equal(found.distance, kth_distance(vectors, 5, seed=0, exact_limit=1000).distance)


@pytest.mark.parametrize("scale", [0.2, 0.4])
def test_entropy_of_a_known_distribution(scale: float) -> None:
    """Kozachenko-Leonenko with these distances gives the entropy of a normal patch of the circle."""
    angle = np.random.default_rng(0).normal(scale=scale, size=1000)
    found = kth_distance(np.stack([np.cos(angle), np.sin(angle)], axis=1), 5, seed=0)
    estimate = np.log(found.distance).mean() + np.log(2) + digamma(1000) - digamma(5)
    assert estimate == pytest.approx(0.5 * np.log(2 * np.pi * np.e * scale**2), abs=0.1)


def test_duplicates_have_a_finite_score() -> None:
    vectors = np.repeat(unit(3, 4), 4, axis=0)
    scores = diversity(kth_distance(vectors, 2, seed=0))
    assert np.isfinite(scores).all() and scores.min() == pytest.approx(np.log(DUPLICATE_DISTANCE))


def test_quality() -> None:
    good = pair("p", "A clear and simple answer.", "Another plain sentence here.")
    looping = pair("p", "the same again the same again the same again the same again", "Another plain sentence here.")
    garbled = pair("p", "@@##$$%% 1234 ^^&&", "Another plain sentence here.")
    assert quality(good) > max(quality(looping), quality(garbled)) and 0 <= quality(garbled) <= 1


@given(VALUES, st.floats(0.1, 10), st.floats(-100, 100))
def test_standardising_forgets_scale_and_place(values: list[float], scale: float, shift: float) -> None:
    column = np.round(np.array(values), 3)
    assert np.allclose(standardise(column), standardise(scale * column + shift), atol=1e-6)
    assert np.median(standardise(column)) == pytest.approx(0, abs=1e-9)


@given(VALUES, st.integers(0, 999), st.data())
def test_selection_ignores_the_order_of_rows(values: list[float], seed: int, data: st.DataObject) -> None:
    column = np.round(np.array(values), 1)
    ids = [f"{k:03d}" for k in range(len(column))]
    count = data.draw(st.integers(1, len(column)))
    groups = data.draw(st.lists(st.sampled_from("ab"), min_size=len(column), max_size=len(column)))
    order = np.random.default_rng(seed).permutation(len(column))
    for chosen_groups in (None, groups):
        first = {ids[k] for k in top(column, ids, count, chosen_groups)}
        moved = None if chosen_groups is None else [chosen_groups[k] for k in order]
        second = {ids[order[k]] for k in top(column[order], [ids[k] for k in order], count, moved)}
        assert first == second and len(first) == count
    assert min(column[top(column, ids, count)]) >= max(
        [v for k, v in enumerate(column) if k not in top(column, ids, count)], default=-99
    )


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 6), st.floats(0, 3))
def test_lazy_greedy_is_plain_greedy(seed: int, count: int, weight: float) -> None:
    """And every gain that it used was the largest at that moment."""
    rng = np.random.default_rng(seed)
    base, vectors, ids = rng.normal(size=9), unit(9, 3, seed), [f"{k}" for k in range(9)]
    kept: list[int] = []
    for _ in range(count):

        def gain(k: int, kept: tuple[int, ...] = tuple(kept)) -> float:
            nearest = min((np.sqrt(max(2 - 2 * float(vectors[j] @ vectors[k]), 0)) for j in kept), default=2.0)
            return float(base[k] + weight * np.log(max(nearest, DUPLICATE_DISTANCE)))

        kept.append(max((k for k in range(9) if k not in kept), key=gain))
    assert set(greedy(base, vectors, ids, count, weight=weight)) == set(kept)


def test_greedy_spreads_more_than_the_one_shot_score() -> None:
    """Two tight far clusters: one-shot takes what is far from its own neighbours, greedy covers both."""
    vectors = np.concatenate([np.tile(unit(1, 8, 1), (6, 1)), np.tile(unit(1, 8, 2), (6, 1))])
    base, ids = np.array([1.0] * 6 + [0.9] * 6), [f"{k:02d}" for k in range(12)]
    assert set(top(base, ids, 2)) == {0, 1} and set(greedy(base, vectors, ids, 2, weight=0.5)) == {0, 6}

    def value(chosen: tuple[int, int]) -> float:
        distance = np.linalg.norm(vectors[chosen[0]] - vectors[chosen[1]])
        return float(base[list(chosen)].sum() + 0.5 * np.log(max(distance, DUPLICATE_DISTANCE)))

    assert set(max(combinations(range(12), 2), key=value)) == {0, 6}


def test_importance_is_the_weighted_sum() -> None:
    columns = {"margin": np.array([0.0, 1, 2, 3]), "quality": np.array([3.0, 2, 1, 0])}
    assert np.allclose(importance(columns, {"margin": 1.0, "quality": 1.0}), 0)
    assert np.array_equal(np.argsort(importance(columns, {"margin": 1.0, "quality": 0.2})), np.arange(4))


def align(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.cli", "filter", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.model
def test_command_line(assets: Path, tmp_path: Path) -> None:
    """Kept and dropped are a partition with scores and reasons; the kept file is a valid pair file; text is escaped."""
    topics = ["ships", "bread", "stars", "chess", "rivers", "paint", "bees", "trains", "snow", "maps"]
    rows = [
        pair(f"Tell me about {t}", f"{t} are well worth knowing, here is why.", f"No idea about {t} at all.", f"id{k}")
        | {"margin": float(k) - 3, "group": "ab"[k % 2]}
        for k, t in enumerate(topics)
    ]
    rows.append(rows[2] | {"id": "id99"})
    rows[4]["prompt"] += " <script>alert(1)</script>"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = str(assets / "minilm")
    done = align(
        "run", "pairs.jsonl", "--output", "out", "--keep", "0.5", "--embedding-model", encoder, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    kept, dropped = (Dataset.from_parquet(str(tmp_path / "out" / f"{name}.parquet")) for name in ("kept", "dropped"))
    assert len(kept) == 5 and len(dropped) == 6 and set(kept["id"]) | set(dropped["id"]) == {row["id"] for row in rows}
    assert all(dropped["reason"]) and {"quality", "diversity", "importance", "margin"} <= set(kept.column_names)
    reasons = dict(zip(dropped["id"], dropped["reason"], strict=True))
    assert reasons["id99"] == "duplicate: same as id2"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "Content-Security-Policy" in page
    checked = subprocess.run(
        [sys.executable, "-m", "align.cli", "data", "check", "out/kept.parquet"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert checked.returncode == 0
    explained = align("explain", "out", "id99", folder=tmp_path)
    assert explained.returncode == 0 and json.loads(explained.stdout)["reason"] == "duplicate: same as id2"
    for arguments, message in (
        (["run", "pairs.jsonl", "--output", "o", "--method", "best"], "expected top, greedy or threshold"),
        (["run", "pairs.jsonl", "--output", "o", "--skip", "all"], "no such rule"),
        (["run", "pairs.jsonl", "--output", "o", "--method", "threshold"], "needs --minimum"),
        (["run", "pairs.jsonl", "--output", "o", "--embedding-model", "nowhere"], "cannot be loaded as an encoder"),
        (["explain", "out", "nobody"], "no pair has id 'nobody'"),
        (["explain", "nowhere", "x"], "holds no filter.json"),
    ):
        wrong = align(*arguments, folder=tmp_path)
        assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr
