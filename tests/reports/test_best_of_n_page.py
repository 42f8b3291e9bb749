"""The page of best-of-n: planted worlds in which the judge that chooses is right, is exploited, or says nothing."""

from typing import Any

import numpy as np
import pytest

from align.commands.best_of_n import best_of_n_curve, second_half
from align.generation.best_of_n import expected_best
from align.reports.best_of_n_page import render_best_of_n_page, verdict
from align.stats import interval

PROMPTS, SAMPLES = 80, 8


def found(gold: str, seed: int) -> dict[str, Any]:
    """Metrics of a world: whether another judge agrees with the one that chooses."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(PROMPTS, SAMPLES))
    other = {
        "agrees": scores + rng.normal(size=scores.shape),
        "exploited": scores - 0.9 * np.maximum(scores, 0) ** 2,
        "unrelated": rng.normal(size=scores.shape),
        "none": None,
    }[gold]
    return {
        "prompts": PROMPTS,
        "n": SAMPLES,
        "scorer": "proxy",
        "gold": None if other is None else "truth",
        "curve": best_of_n_curve(scores, other, seed=0),
        "second_half": second_half(scores, other),
    }


@pytest.mark.parametrize(
    ("world", "headline", "detail"),
    [
        ("agrees", "raises the reward by truth", "still rises"),
        ("exploited", "", "exploit proxy"),
        ("none", "The best of 8 by proxy scores", "rises with n by construction"),
    ],
)
def test_sentences_of_planted_worlds(world: str, headline: str, detail: str) -> None:
    for seed in range(10):
        sentence, details = verdict(found(world, seed))
        assert headline in sentence and detail in " ".join(details)


def test_a_judge_that_has_nothing_to_do_with_the_choice_claims_little() -> None:
    worlds = [verdict(found("unrelated", seed)) for seed in range(200)]
    assert sum("changes nothing" not in sentence for sentence, _ in worlds) <= 20
    assert sum("is not seen to change" not in details[0] for _, details in worlds) <= 20


def test_the_second_half_is_paired_over_prompts() -> None:
    rng = np.random.default_rng(3)
    scores, other = rng.normal(size=(2, 30, 6))
    got = second_half(scores, other)
    assert got is not None and (got["from"], got["to"]) == (3, 6)
    curve = expected_best(scores, other)
    assert got["gold"]["value"] == pytest.approx((curve[:, 5] - curve[:, 2]).mean()) and got["score"]["low"] > 0
    assert second_half(scores[:, :3], None) is None


def test_the_page_has_both_curves_and_escapes_texts() -> None:
    bad = "<script>alert(1)</script>"
    metrics = found("agrees", 0) | {"scorer": bad}
    shown = [{"prompt": bad, "completions": {"best": {"text": bad, "scores": {"score": 1.0, "gold": -1.0}}}}]
    page = render_best_of_n_page(metrics, shown)
    assert "<script" not in page and "http://" not in page and page.count('<svg class="plot"') == 2
    assert interval(metrics["curve"][-1]["gold_gain"]) in page
    assert render_best_of_n_page(found("none", 0), []).count("<figure>") == 1
