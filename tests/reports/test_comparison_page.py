"""The comparison page: escaped, one script with its hash, sentences that agree with the intervals, one color per policy."""

import base64
import hashlib
import re
from typing import Any

import pytest

from align.reports.comparison_page import headline, percent, render_comparison_page
from tests.reports.test_report import EVIL, Balanced, est


def texts(change: float | None) -> dict[str, Any]:
    values = {"tokens": est(20, 1), "repetition": est(0.1, 0.02), "unfinished": est(0.9, 0.1), "empty": est(0, 0)}
    moved = None if change is None else {key: est(change, 0.01) for key in values}
    return {**values, "change": moved, "distinct": {"1": 0.5, "2": 0.8, "3": None}, "distinct_words": 100}


def run(*policies: str) -> dict[str, Any]:
    return {
        "command": f"align eval {EVIL}", "prompts": EVIL, "n_prompts": 200, "judge": EVIL, "seconds": 1.0,
        "policies": dict.fromkeys(policies, EVIL), "decoding": {"temperature": 1.0},
    }  # fmt: skip


def report(rate: float = 0.6, half: float = 0.05, controlled: float = 0.58, gain: float = 0.3) -> dict[str, Any]:
    samples = [
        {
            "prompt": f"{EVIL} {k}",
            "completions": {n: {"text": EVIL, "reward": 1.0} for n in ("reference", "dpo", "mine")},
        }
        for k in range(3)
    ]
    policies = {
        "reference": {"reward": est(0.8, 0.1), "gain": None, "kl": None, "gain_per_root_kl": None, "texts": texts(None)},
        "dpo": {"reward": est(1.1, 0.1), "gain": est(gain, 0.1), "kl": est(1, 0.1), "gain_per_root_kl": est(0.2, 0.1), "texts": texts(0.1)},
        "mine": {"reward": est(1.0, 0.1), "gain": est(0.05, 0.1), "kl": est(2, 0.1), "gain_per_root_kl": None, "texts": texts(0.0)},
    }  # fmt: skip
    moved = [{"policy": "dpo", "what": "repetition", "said": "repeats itself more", "change": est(0.1, 0.02)}]
    win = {
        "rate": est(rate, half), "wins": 100, "ties": 40, "losses": 60, "position_bias": est(0.1, 0.02), "consistent": 0.7,
        "length_controlled": {"rate": est(controlled, half), "slope": 0.5, "extrapolated": False},
        "length_difference": est(3, 2),
    }  # fmt: skip
    compared = [
        {"prompt": f"{EVIL} {k}", "completions": {n: {"text": EVIL, "reward": None} for n in ("mine", "dpo")}, "preference": p}
        for k, p in enumerate((1.0, 0.5, 0.0))
    ]  # fmt: skip
    base = {"gain": est(0.1, 0.1), "gain_per_root_kl": None, "reward": est(1, 0.1)}
    points = [{"policy": "reference", "temperature": 1.0, "step": None, "kl": None, **base}]
    points += [{"policy": "dpo", "temperature": t, "step": None, "kl": est(3 - t, 0.1), **base} for t in (0.5, 1.0)]
    points += [{"policy": "dpo", "temperature": 1.0, "step": s, "kl": est(s / 10, 0.1), **base} for s in (20, 10)]
    comparison = {
        "a": "mine", "b": "dpo", "judge": EVIL, "both_orders": True, "win_rate": win, "changed": [], "samples": compared,
        "texts": {"mine": texts(0.0), "dpo": texts(None)}, "run": run("mine", "dpo"),
    }  # fmt: skip
    return {
        "reward": {"policies": policies, "comparisons": [{"a": "mine", "b": "dpo", "difference": est(0, 1)}],
                   "changed": moved, "run": run("reference", "dpo", "mine"), "samples": samples},
        "comparisons": {"x": comparison},
        "frontier": {"points": points, "run": run("reference", "dpo")},
    }  # fmt: skip


def test_the_only_script_is_the_one_that_the_policy_names() -> None:
    page = render_comparison_page(report())
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert len(scripts) == 1 and page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert "unsafe-inline" not in policy.split("script-src")[1] and "innerHTML" not in scripts[0]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page) and not re.search(r"\son\w+\s*=", page)
    assert 'type="search" hidden' in page  # without scripts there is no field that does nothing


def test_texts_are_escaped_and_elements_closed() -> None:
    page = render_comparison_page(report())
    assert "alert('x')" not in page and page.count("alert(&#39;x&#39;)") > 10
    parser = Balanced()
    parser.VOID = parser.VOID | {"input"}
    parser.feed(page)
    assert parser.open == []


def test_completions_of_all_policies_stand_side_by_side_once() -> None:
    page = render_comparison_page(report())
    articles = re.findall(r"<article>.*?</article>", page, flags=re.S)
    assert len(articles) == 3
    assert all([f'class="{shade}"><h4>' in article for shade in ("c0", "c1", "c4")] for article in articles)
    assert [re.search(r": (mine before DPO|a tie of mine and DPO|DPO before mine)", a)[1] for a in articles] == [  # type: ignore[index]
        "mine before DPO", "a tie of mine and DPO", "DPO before mine",
    ]  # fmt: skip


def test_the_frontier_goes_in_order_and_checkpoints_are_dashed_in_the_color_of_their_method() -> None:
    page = render_comparison_page(report())
    (solid,) = re.findall(r'<polyline class="c1 line" points="([^"]*? [^"]*)"', page)
    (dashed,) = re.findall(r'<polyline class="c1 line dash" points="([^"]*)"', page)
    steps = [float(point.split(",")[0]) for point in dashed.split()]
    assert len(steps) == 3 and steps == sorted(steps)  # the reference, step 10, step 20
    heats = [float(point.split(",")[0]) for point in solid.split()]
    assert len(heats) == 2 and heats == sorted(heats, reverse=True)  # temperature 0.5 is further away


def test_points_of_the_frontier_say_their_temperature() -> None:
    page = render_comparison_page(report())
    assert re.findall(r'<text class="mark"[^>]*>([^<]*)<', page) == ["1", "0.5", "1", "10", "step 20"]


def test_a_verdict_is_shown_with_the_texts_that_were_judged() -> None:
    """The policies wrote other texts for the comparison than for the rewards: two entries, the verdict in one."""
    other = report()
    for sample in other["comparisons"]["x"]["samples"]:
        sample["completions"]["dpo"]["text"] = "decoded otherwise"
    articles = re.findall(r"<article>.*?</article>", render_comparison_page(other), flags=re.S)
    assert len(articles) == 6
    assert [("decoded otherwise" in a, ": mine before DPO" in a) for a in articles[:2]] == [
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize("missing", ["reward", "comparisons", "frontier"])
def test_a_part_that_was_not_measured_is_named(missing: str) -> None:
    partial = report()
    del partial[missing]
    page = render_comparison_page(partial)
    assert "</html>" in page and "Not measured: run `align eval" in page


def test_only_a_frontier_is_a_page() -> None:
    page = render_comparison_page({"frontier": report()["frontier"]})
    assert "<script" not in page and "Reward against KL was measured." in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "mine beats DPO: mine wins 60.0% (55.0 to 65.0), 58.0% (53.0 to 63.0) at equal lengths; judge"),
        ({"rate": 0.52}, "mine against DPO: no difference seen, mine wins 52.0% (47.0 to 57.0)"),
        ({"rate": 0.4, "controlled": 0.4}, "mine loses to DPO"),
        ({"controlled": 0.51}, "the difference in length may explain all of it"),
    ],
)
def test_win_rates_in_words(changes: dict[str, float], said: str) -> None:
    lines = headline({**report(**changes), "reward": None})
    assert said in lines[0]


def test_rewards_in_words() -> None:
    said, details = headline(report())
    assert said == "DPO raised the reward by 0.30 (0.20 to 0.40) at a KL of 1.00 (0.90 to 1.10) nats."
    assert details[0].startswith("mine: no difference in reward seen")
    assert "DPO repeats itself more than reference: 10.0 points (8.0 to 12.0)." in details
    assert headline(report(gain=-0.3))[0].startswith("DPO lowered the reward")
    assert percent(est(0.5, 0.0)).startswith("50%")
    alike = {"value": 0.5, "low": None, "high": None, "n": 3}
    assert percent(alike) == "50% (all equal)"
    assert percent(alike | {"n": 1}) == "50% (a single value)"
