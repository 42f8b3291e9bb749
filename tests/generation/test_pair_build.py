"""Pairs from scored completions: which pairs, the guard against false negatives, provenance, bad input."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.commands.build_pairs import BuildSettings, build_pairs
from align.config import PairsSection
from align.data.completions import read_groups
from align.data.pair_selection import Guard, choose_pairs, draw_pair
from align.data.pairs import load_pairs
from align.errors import AlignError, ConfigError, DataError
from align.io.stage import check_output
from reward_models.judges import make_judge
from reward_models.scorers import ScorerSpec, score_in_chunks

SCORES = st.lists(st.floats(-5, 5), min_size=2, max_size=7)
PROBABILITIES = st.lists(st.floats(0, 1), min_size=2, max_size=7)
VADER = ScorerSpec(judge="vader")


@given(SCORES, st.floats(0, 2))
def test_all_is_every_ordered_pair_that_the_guard_passes(scores: list[float], margin: float) -> None:
    kept, dropped = choose_pairs(scores, "all", Guard(margin))
    count = len(scores)
    expected = {
        (i, j) for i in range(count) for j in range(count) if scores[i] > scores[j] and scores[i] - scores[j] >= margin
    }
    assert set(kept) == expected and len(kept) == len(expected)
    assert len(kept) + dropped == count * (count - 1) // 2


@given(SCORES, st.floats(0, 2))
def test_best_worst(scores: list[float], margin: float) -> None:
    kept, _ = choose_pairs(scores, "best_worst", Guard(margin))
    spread = max(scores) - min(scores)
    assert len(kept) == (spread > 0 and spread >= margin)
    for best, worst in kept:
        assert (scores[best], scores[worst]) == (max(scores), min(scores))


@given(SCORES, st.floats(0, 2), st.floats(0, 3))
def test_band_takes_the_hardest_inside(scores: list[float], low: float, width: float) -> None:
    kept, _ = choose_pairs(scores, "band", Guard(), band=(low, low + width))
    best = max(scores)
    inside = [s for s in scores if s < best and low <= best - s <= low + width]
    assert len(kept) <= 1
    if inside and not (low == 0 and scores.count(best) > 1):
        assert [(scores[a], scores[b]) for a, b in kept] == [(best, max(inside))]


@given(SCORES, st.floats(0, 2), st.floats(-100, 100))
def test_additive_guard_does_not_see_a_shift(scores: list[float], margin: float, shift: float) -> None:
    rounded = [round(s * 64) / 64 for s in scores]  # exact under a shift by a multiple of 1/64
    moved = [s + round(shift * 64) / 64 for s in rounded]
    guard = Guard(round(margin * 64) / 64)
    assert choose_pairs(rounded, "all", guard) == choose_pairs(moved, "all", guard)


def test_bounds_of_the_guard_are_inclusive() -> None:
    """A rejected score of exactly ``ratio`` times the chosen one passes, and a difference of exactly ``margin``."""
    assert Guard(ratio=0.5).passes(0.5, 0.25) and not Guard(ratio=0.5).passes(0.5, 0.2500001)
    assert Guard(margin=0.25).passes(0.5, 0.25) and not Guard(margin=0.25).passes(0.5, 0.2500001)
    assert not Guard().passes(0.5, 0.5)


@given(PROBABILITIES, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_stricter_ratio_never_adds_pairs(scores: list[float], first: float, second: float) -> None:
    strict, loose = sorted((first, second))
    kept = set(choose_pairs(scores, "all", Guard(ratio=strict))[0])
    assert kept <= set(choose_pairs(scores, "all", Guard(ratio=loose))[0])
    assert all(scores[rejected] <= strict * scores[chosen] for chosen, rejected in kept)
    correct = {(i, j) for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j]}
    assert len(choose_pairs(scores, "all", Guard(ratio=1.0))[0]) == len(correct)


def completions(path: Path, texts: dict[str, list[str]], **more: Any) -> Path:
    rows = [
        {"id": key, "prompt": f"it is {key}", "sample": k, "completion": text} | more
        for key, group in texts.items()
        for k, text in enumerate(group)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXTS = {
    "a": [" wonderful", " awful", " a table", " wonderful", "  "],
    "b": [" great", " great"],
    "c": [" good", " very good", " horrible"],
    "d": [" a chair", " a table"],
}


def test_pairs_with_provenance_that_load_as_they_are(tmp_path: Path) -> None:
    file = completions(tmp_path / "c.jsonl", TEXTS, group="g")
    build_pairs(file, BuildSettings(VADER, mode="all"), tmp_path / "out")
    pairs = load_pairs(PairsSection(path=str(tmp_path / "out" / "pairs.parquet")))
    judge = make_judge("vader")
    assert len(pairs) == 6
    for row in pairs:
        chosen, rejected = judge.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert (row["reward_chosen"], row["reward_rejected"]) == pytest.approx((chosen, rejected))
        assert row["margin"] == pytest.approx(chosen - rejected) and row["margin"] > 0
        assert row["group"] == "g"
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    first = next(row for row in table if row["id"] == "a:0-1")
    assert (first["prompt_id"], first["sample_chosen"], first["sample_rejected"]) == ("a", 0, 1)
    assert (first["scorer"], first["mode"]) == ("vader", "all")
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(row["id"], row["reason"]) for row in dropped] == [
        ("b", "fewer than two different completions"),
        ("d", "no two scores far enough apart"),
    ]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["completions_empty"], metrics["completions_repeated"]) == (1, 2)
    assert metrics["pairs_dropped_by_guard"] == 1 and metrics["prompts_without_pair"] == 2


def test_completions_without_numbers_are_numbered(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "it is", "completion": text} for text in (" fine", " awful", " great")]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_pairs(tmp_path / "c.jsonl", BuildSettings(VADER, mode="all"), tmp_path / "out")
    pairs = load_pairs(PairsSection(path=str(tmp_path / "out" / "pairs.parquet")))
    assert pairs["id"][:] == ["a:2-0", "a:2-1", "a:0-1"]


def test_temperature_scales_margins_and_not_the_pairs(tmp_path: Path) -> None:
    file = completions(tmp_path / "c.jsonl", TEXTS)
    tables = []
    for temperature in (1.0, 4.0):
        out = tmp_path / str(temperature)
        build_pairs(file, BuildSettings(VADER, mode="all", temperature=temperature), out)
        tables.append(load_pairs(PairsSection(path=str(out / "pairs.parquet"))))
    assert tables[0]["id"][:] == tables[1]["id"][:]
    assert np.allclose(np.array(tables[0]["margin"]), 4 * np.array(tables[1]["margin"]))


def test_scoring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_models.scorers.CHUNK", 3)
    scored: list[str] = []

    def load() -> Any:
        def score(prompts: Any, texts: Any) -> np.ndarray:
            if len(scored) >= 6:
                raise KeyboardInterrupt
            scored.extend(texts)
            return np.array([float(len(text)) for text in texts])

        return score

    texts = ["x" * k for k in range(8)]
    with pytest.raises(KeyboardInterrupt):
        score_in_chunks(load, [""] * 8, texts, tmp_path)
    first = list(scored)
    scored.clear()
    assert score_in_chunks(load, [""] * 8, texts, tmp_path).tolist() == [float(k) for k in range(8)]
    assert first == texts[:6] and scored == texts[6:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "bestworst"}, "expected best_worst, band or all"),
        ({"guard_ratio": 0.95}, "vader gives rewards, which have no zero"),
        ({"guard_margin": -1}, "expected numbers from 0 up"),
        ({"band": (2.0, 1.0), "mode": "band"}, "expected numbers from 0 up"),
        ({"band": (0.0, 1.0)}, "--band: means nothing under --mode best_worst"),
        ({"temperature": 0.0}, "one above 0"),
    ],
)
def test_options_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildSettings(VADER, **settings)


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either a reward model or a judge"):
        ScorerSpec()
    with pytest.raises(ConfigError, match="did you mean `vader`"):
        ScorerSpec(judge="vadder")
    BuildSettings(ScorerSpec(judge="yes-no:model"), guard_ratio=0.95)
    with pytest.raises(DataError, match="row 1: found no id, completion"):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n')
        read_groups(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="row 2: found another prompt than in the rows before with id 'a'"):
        (tmp_path / "two.jsonl").write_text(
            '{"id": "a", "prompt": "a", "completion": "x"}\n{"id": "a", "prompt": "b", "completion": "y"}\n'
        )
        read_groups(tmp_path / "two.jsonl")
    odd = [{"completion": 3}, {"completion": [{"role": "assistant"}]}, {"sample": "x"}, {"sample": 4}, {"sample": 4},
           {"completion": [{"role": "assistant", "content": "x"}]}]  # fmt: skip
    lines = [json.dumps({"id": "a", "prompt": "a", "completion": "x"} | more) + "\n" for more in odd]
    (tmp_path / "odd.jsonl").write_text("".join(lines))
    with pytest.raises(DataError) as caught:
        read_groups(tmp_path / "odd.jsonl")
    for said in (
        "row 1: completion: found 3, expected text or a list of messages",
        "row 2: completion[1]: found {'role': 'assistant'}, expected {role: ..., content: ...}",
        "row 3: sample: found 'x', expected a number from 0 up",
        "row 5: found sample 4 of 'a' again, expected each number once",
        "row 6: found both text and messages",
    ):
        assert said in str(caught.value)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        read_groups(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"no pair is left of 1 prompts"):
        build_pairs(completions(tmp_path / "c.jsonl", {"b": ["x", "x"]}), BuildSettings(VADER), tmp_path / "o")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep")
    with pytest.raises(AlignError, match="found other files there"):
        build_pairs(completions(tmp_path / "c.jsonl", TEXTS), BuildSettings(VADER), tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "keep"


def test_another_stage_is_not_replaced(tmp_path: Path) -> None:
    file = completions(tmp_path / "c.jsonl", TEXTS)
    build_pairs(file, BuildSettings(VADER), tmp_path / "out")
    check_output(tmp_path / "out", "pairs-build")
    check_output(tmp_path / "new", "generate")
    with pytest.raises(ConfigError, match="an earlier result of the same command"):
        check_output(tmp_path / "out", "generate")
    assert build_pairs(file, BuildSettings(VADER), tmp_path / "out").skipped
    assert not build_pairs(file, BuildSettings(VADER, mode="all"), tmp_path / "out").skipped


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_drawn_label_follows_bradley_terry(scale: float) -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_pair([0.3, 1.0, -0.2, 0.9], scale, rng) for _ in range(20_000)]
    assert set(drawn) == {(1, 2), (2, 1)}
    expected = 1 / (1 + np.exp(-scale * 1.2))
    assert abs(np.mean([pair == (1, 2) for pair in drawn]) - expected) < 4 * np.sqrt(0.25 / len(drawn))


def test_equal_rewards_make_a_pair_of_two_completions_with_a_coin() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_pair([1.0, 1.0, 1.0], 2.0, rng) for _ in range(2_000)]
    assert set(drawn) == {(0, 2), (2, 0)} and 900 < drawn.count((0, 2)) < 1_100


def test_the_mean_reward_is_that_of_the_samples(tmp_path: Path) -> None:
    """Repeated completions count as often as they were sampled, prompts without a pair too, in the scorer's unit."""
    texts = {f"a{k}": [" wonderful"] * 4 for k in range(20)} | {
        f"b{k}": [" wonderful"] * 3 + [" awful"] for k in range(20)
    }
    rows = [
        {"id": name, "prompt": f"prompt {name}", "sample": number, "completion": text}
        for name, samples in texts.items()
        for number, text in enumerate(samples)
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = make_judge("vader").score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    for temperature in (1.0, 2.0):
        build_pairs(file, BuildSettings(VADER, temperature=temperature), tmp_path / f"out-{temperature}")
        found = json.loads((tmp_path / f"out-{temperature}" / "metrics.json").read_text())["mean_reward"]
        assert found["value"] == pytest.approx(float(np.mean(rewards))) and found["n"] == 40
        assert found["low"] < found["value"] < found["high"]
