"""The report: sentences that agree with the intervals, escaped texts, one file without requests."""

import copy
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.reports.html import search_script
from align.reports.run_page import render_run_page, write_report
from align.reports.verdict import verdict
from align.stats import interval, number

EVIL = "<script>alert('x')</script> & \"quoted\""


def est(value: float, half: float, n: int = 200) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def metrics(accuracy: float, half: float) -> dict[str, Any]:
    bins = [{"low": 0.5, "high": 0.55, "confidence": 0.52, "accuracy": 0.5, "count": 10}]
    return {
        "n": 100,
        "accuracy": est(accuracy, half),
        "log_loss": 0.6,
        "ece": 0.1,
        "mean_abs_margin": 0.5,
        "bins": bins,
    }


def report(gain: float = 0.4, half: float = 0.1, accuracy: float = 0.75, pairs: int = 300) -> dict[str, Any]:
    margins = [round(float(m), 4) for m in np.random.default_rng(0).normal(0.5, 1, pairs)]
    history = [
        {"step": k, "loss": 0.7 - k / 100, "rewards/margins": k / 50, "rewards/accuracies": 0.6, "weight/ess_share": 0.98,
         "logps/chosen_change": -k / 10, "logps/rejected_change": -k / 5}
        for k in range(1, 20)
    ]  # fmt: skip
    policy = {"mean_tokens": 24.0, "gain_per_root_kl": est(0.2, 0.05)}
    policies = {
        "reference": {"reward": est(0.8, 0.1), "gain": None, "kl": None, "gain_per_root_kl": None, "mean_tokens": 24.0},
        "dpo": {"reward": est(1.0, 0.1), "gain": est(0.2, 0.1), "kl": est(1.0, 0.1), **policy},
        "madpo": {"reward": est(0.8 + gain, 0.1), "gain": est(gain, half), "kl": est(2.0, 0.1), **policy},
    }
    summary = {"mean": 1.0, "min": 0.7, "max": 1.2, "ess": 290.0, "ess_share": 0.97, "disagreement": 0.3,
               "regions": {"m <= -tau": 0.0, "m >= tau": 1.0}}  # fmt: skip
    return {
        "run": {"name": "demo", "command": "align run x.yaml", "created": "2026-01-01", "seed": 0,
                "config": {"output_dir": "runs"}, "versions": {"torch": "2"}, "fingerprints": {"reward": "ab"},
                "seconds_per_stage": {"reward": 3.0}},
        "summary": {"a": 1},
        "data": {"sets": [{"name": "pairs", "pairs": 3, "prompts": 3, "conversational": False, "prompt_words": 8.0,
                           "chosen_words": 9.0, "rejected_words": 9.5, "chosen_longer_share": 0.4}]},
        "reward_model": {"backbone": "b", "heldout": metrics(accuracy, 0.03), "in_sample": metrics(0.9, 0.01),
                         "out_of_fold": metrics(0.7, 0.02), "folds": 2,
                         "margins": {"heldout": margins, "in_sample": margins, "out_of_fold": margins}},
        "margins": {"values": margins, "weights": {"madpo": [1.0] * pairs}, "tau": 6.9, "summary": {"madpo": summary},
                    "parameters": {"madpo": {"tau": 6.9}}, "judge_correlation": est(0.4, 0.1), "note": "", "warnings": []},
        "training": {"methods": {m: {"loss": {"loss": m, "parameters": {}}, "seconds": 9.0, "history": history} for m in ("dpo", "madpo")}},
        "evaluation": {"judge": "vader", "n_prompts": 200, "policies": policies,
                       "comparisons": [{"a": "madpo", "b": "dpo", "difference": est(gain - 0.2, half)}]},
        "samples": [{"prompt": EVIL, "completions": {m: {"text": EVIL, "reward": 1.0} for m in policies}}],
    }  # fmt: skip


class Balanced(HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    VOID = frozenset({"input", "meta", "br", "line", "circle", "rect", "polyline", "polygon"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Push."""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Pop, and compare."""
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_texts_are_escaped_and_nothing_is_loaded() -> None:
    page = render_run_page(report())
    assert re.findall(r"<script>(.*?)</script>", page, re.DOTALL) == [search_script()["script"]]
    assert page.count("<script") == 1 and "alert(&#39;x&#39;)" in page
    assert "default-src 'none'" in page and f"script-src '{search_script()['script_hash']}'" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page) and "url(" not in page
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


@pytest.mark.parametrize("missing", ["data", "reward_model", "margins", "training", "evaluation", "samples", "summary"])
def test_a_missing_section_is_not_fatal(missing: str) -> None:
    partial = report()
    del partial[missing]
    assert "</html>" in render_run_page(partial)


def test_only_the_run_is_enough() -> None:
    page = render_run_page({"run": report()["run"]})
    assert page.count('class="none"') >= 6 and "Nothing has been evaluated yet." in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gain": 0.4, "half": 0.1}, "MADPO raised the judge's reward from 0.80 (0.70 to 0.90) to 1.20 (1.10 to 1.30)"),
        ({"gain": 0.05, "half": 0.1}, "No difference in the judge's reward seen after MADPO"),
        ({"gain": -0.4, "half": 0.1}, "MADPO lowered the judge's reward"),
        ({"accuracy": 0.52}, "Stop: the reward model is at chance on held-out pairs: 0.520 (0.490 to 0.550)"),
    ],
)
def test_the_verdict_says_what_the_intervals_say(changes: dict[str, float], said: str) -> None:
    assert said in verdict(report(**changes)).headline


def test_a_lead_at_another_kl_is_not_called_better() -> None:
    details = " ".join(verdict(report(gain=0.5, half=0.05)).details)
    assert "at another KL (2 and 1 nats), so it may only have moved further; reward gained per" in details
    unclear = report(gain=0.5, half=0.05)
    for policy in unclear["evaluation"]["policies"].values():
        policy["gain_per_root_kl"] = None
    assert "it may only have moved further." in " ".join(verdict(unclear).details)
    same = report(gain=0.5, half=0.05)
    same["evaluation"]["policies"]["madpo"]["kl"] = est(1.0, 0.1)
    assert "at about the same KL" in " ".join(verdict(same).details)
    assert "no difference seen" in " ".join(verdict(report(gain=0.21, half=0.1)).details)


def test_a_gain_by_the_reward_model_only_is_named() -> None:
    seen = report(gain=0.05, half=0.1)
    policies = seen["evaluation"]["policies"]
    assert "gain by the reward model" not in render_run_page(seen)
    policies["madpo"]["reward_model_gain"] = est(0.7, 0.1)
    assert "MADPO learned what its labels say: the run's own reward model sees a gain of 0.70" in " ".join(
        verdict(seen).details
    )
    assert "gain by the reward model" in render_run_page(seen) and "0.70 (0.60 to 0.80)" in render_run_page(seen)
    policies["madpo"]["reward_model_gain"] = est(0.05, 0.1)
    assert "MADPO learned" not in " ".join(verdict(seen).details)
    policies["madpo"] |= {"reward_model_gain": est(0.7, 0.1), "gain": est(0.4, 0.1)}
    assert "MADPO learned" not in " ".join(verdict(seen).details)


def test_digits_follow_the_interval() -> None:
    assert number(1.23456, 0.12) == "1.23" and number(1.23456, 2.0) == "1.2" and number(1234.5, 120.0) == "1234"
    assert interval(est(0.8123, 0.1)) == "0.81 (0.71 to 0.91)"


def test_a_large_run_is_a_small_page_quickly(tmp_path: Path) -> None:
    large = report(pairs=100_000)
    (tmp_path / "report.json").write_text(json.dumps(large))
    start = time.monotonic()
    page = write_report(tmp_path)
    assert page.stat().st_size < 1_000_000 and time.monotonic() - start < 5


def test_unknown_methods_get_a_color() -> None:
    other = copy.deepcopy(report())
    policies = other["evaluation"]["policies"]
    policies["my method"] = policies["dpo"]
    other["samples"][0]["completions"]["my method"] = {"text": "t", "reward": 0.0}
    assert "my method" in render_run_page(other)
