"""Length, repetition, diversity: counted by hand, and invariant where they must be."""

import numpy as np
import pytest

from align.evaluation.text_statistics import Texts, changed, distinct, repetition, text_statistics


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0.0), ("one two", 0.0), ("a b c d", 0.0), ("a b c a b c", 0.25), ("no no no no no", 2 / 3)],
)
def test_repetition(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_distinct_counts_runs_that_do_not_cross_texts() -> None:
    texts = ["The cat sat.", "the cat sat", "a dog"]
    assert distinct(texts, 1, 100) == pytest.approx(5 / 8)
    assert distinct(texts, 2, 100) == pytest.approx(3 / 5)
    assert distinct(texts, 1, 6) == pytest.approx(3 / 6)
    assert distinct(["", "x"], 2, 9) is None


def test_policies_are_compared_over_equally_many_words() -> None:
    """Twice as many texts of the same kind do not look less diverse."""
    rng = np.random.default_rng(0)
    short = [" ".join(map(str, rng.integers(0, 50, 5))) for _ in range(40)]
    long = [f"{text} {' '.join(map(str, rng.integers(0, 50, 15)))}" for text in short]
    found = text_statistics(
        {name: Texts(texts, [1] * 40, [True] * 40) for name, texts in (("short", short), ("long", long))},
        baseline="short",
    )
    assert found["short"]["distinct_words"] == found["long"]["distinct_words"] == 200
    assert found["short"]["distinct"]["1"] == pytest.approx(found["long"]["distinct"]["1"], abs=0.05)
    assert distinct(long, 1, 10_000) < found["long"]["distinct"]["1"] / 2  # type: ignore[operator]


def test_changes_are_paired_and_only_those_seen_are_told() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 60, 100)
    base = Texts(["a b c d e f"] * 100, tokens.tolist(), [True] * 100)
    worse = Texts(["no no no no no"] * 100, (tokens + 1).tolist(), [k % 2 == 0 for k in range(100)])
    found = text_statistics({"before": base, "after": worse, "same": base}, baseline="before")
    assert found["before"]["change"] is None
    assert found["after"]["change"]["tokens"] == {"value": 1.0, "low": None, "high": None, "n": 100}
    said = {(item["policy"], item["what"]): item["said"] for item in changed(found)}
    assert said == {
        ("after", "tokens"): "writes more tokens",
        ("after", "repetition"): "repeats itself more",
        ("after", "unfinished"): "is cut off by the token limit more often",
    }
