"""The page of rounds: what was measured is shown, what was not is said, texts are escaped."""

from typing import Any

from align.reports.rounds_page import headline, render_rounds_page

BAD = "<script>alert(1)</script>"


def estimate(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 32}


def rounds(*kls: float | None, scorer: str = "rm") -> dict[str, Any]:
    """Rounds with the KL of the policy that each sampled from; None: not measured."""
    return {
        "name": "it",
        "start": "base",
        "scorer": scorer,
        "rounds": [
            {
                "round": k + 1,
                "sampled_from": "base" if k == 0 else f"round-{k}",
                "trained": f"round-{k + 1}",
                "kl_to_start": None if kl is None else estimate(kl),
                "generate": {"prompts": 10},
                "pairs": {"mean_reward": estimate(1.0 + k), "pairs": 9, "completions_cut_off_share": None},
            }
            for k, kl in enumerate(kls)
        ],
    }


def test_the_headline_has_the_last_policy_that_was_sampled() -> None:
    assert headline(rounds(None)) == "The samples of the start score 1.00 (0.90 to 1.10) by rm."
    said = headline(rounds(None, 0.5, 2.0))
    assert "those of the policy of round 2 3.00 (2.90 to 3.10), at a KL of 2.00 (1.90 to 2.10) nats" in said
    assert "KL" not in headline(rounds(None, 0.5, None))


def test_what_was_not_measured_is_said_and_not_drawn() -> None:
    page = render_rounds_page(rounds(None, 0.5, 2.0))
    assert page.count('<svg class="plot"') == 2 and "not measured" not in page
    partly = render_rounds_page(rounds(None, None, None))
    assert partly.count("not measured") == 2 and partly.count('<svg class="plot"') == 1


def test_texts_are_escaped() -> None:
    found = rounds(None, 1.0, scorer=BAD)
    found["rounds"][1]["sampled_from"] = found["start"] = found["name"] = BAD
    page = render_rounds_page(found)
    assert "<script" not in page and "&lt;script" in page
