"""Metrics of a reward model and their page: RewardBench, length, distance, disagreements."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from align.evaluation.reward_model import reward_model_metrics
from align.evaluation.reward_pairs import finding_sentences, pair_findings
from align.evaluation.rewardbench import SECTIONS, section_scores
from align.reports.reward_model_page import GROUPS, by_group, write_reward_model_page
from reward_models.length_bias import word_difference


def test_rewardbench_sections() -> None:
    accuracies = {subset: 0.5 for weights in SECTIONS.values() for subset in weights}
    accuracies["math-prm"] = 1.0
    found = section_scores(accuracies)
    assert found is not None and found["missing"] == []
    assert found["sections"]["Reasoning"] == pytest.approx(0.75)  # maths counts as much as all code together
    assert found["overall"] == pytest.approx((0.5 * 3 + 0.75) / 4)
    part = section_scores({"alpacaeval-easy": 1.0, "mt-bench-easy": 0.0})
    assert part is not None and part["sections"] == {"Chat": pytest.approx(100 / 128)} and part["overall"] is None
    assert section_scores({"mine": 1.0}) is None


def test_metrics_of_a_reward_model_say_what_they_see() -> None:
    rng = np.random.default_rng(0)
    offset = rng.normal(0, 4, 300)
    chosen, rejected = offset + rng.normal(2, 1, 300), offset + rng.normal(0, 1, 300)
    groups = ["a" if value > 0 else "b" for value in offset]
    found = reward_model_metrics(chosen, rejected, groups, seed=0)
    assert found["accuracy"]["value"] == pytest.approx((chosen > rejected).mean()) and found["auc"]["high"] < 0.75
    assert set(found["categories"]) == {"a", "b"} and found["opis"]["differs"]
    assert "Across pairs it orders worse" in found["said"][1] and "does not mean the same" in found["said"][2]
    assert "furthest" not in found["said"][2]  # two categories are equally far from their mean
    assert found["macro_accuracy"] == pytest.approx(
        np.mean([found["categories"][name]["accuracy"]["value"] for name in "ab"])
    )
    blind = reward_model_metrics(rng.normal(size=300), rng.normal(size=300), None, seed=0)
    assert blind["said"][0].startswith("At chance") and blind["opis"] is None and blind["categories"] == {}


def scored_pairs(count: int = 60) -> tuple[Dataset, np.ndarray]:
    """Pairs and margins of a reward model that prefers the longer response, independent of the label."""
    rng = np.random.default_rng(5)
    table = []
    for k in range(count):
        lengths = rng.permutation([3, 3 + 1 + k % 9])
        chosen, rejected = (" ".join(["good"] * int(n)) + f" {k}" for n in lengths)
        table.append({"id": f"p{k}", "prompt": "<b>film</b>", "chosen": chosen, "rejected": rejected + " <i>",
                      "teacher_margin": float(k % 5)})  # fmt: skip
    pairs = Dataset.from_list(table)
    return pairs, word_difference(pairs) + rng.normal(0, 0.1, count)


def test_pair_findings_name_length_distance_and_disagreements() -> None:
    pairs, margins = scored_pairs()
    distance = np.arange(60.0)
    found = pair_findings(pairs, margins, distances=(distance, 49.5), seed=0)
    assert found["length"]["accuracy_longer"]["value"] == 1 and found["length"]["accuracy_shorter"]["value"] == 0
    assert found["ood"]["share"] == pytest.approx(10 / 60)
    assert found["ood"]["accuracy_far"]["value"] == pytest.approx(np.mean(margins[50:] > 0))
    assert [one["id"] for one in found["ood"]["farthest"]] == [f"p{k}" for k in range(59, 49, -1)]
    shown = [one["margin"] for one in found["disagreements"]]
    assert shown == sorted(shown) and shown[0] == margins.min() and max(shown) < 0
    gold = np.asarray(pairs["teacher_margin"])
    assert found["reference_correlation"]["value"] == pytest.approx(np.corrcoef(margins, gold)[0, 1])
    said = finding_sentences(found)
    assert said[0].startswith("It pays for longer responses") and "16.7% of the pairs are farther" in said[1]
    fair = pair_findings(pairs.remove_columns("teacher_margin"), np.ones(60), distances=None, seed=0)
    assert fair["ood"] is None and fair["reference_correlation"] is None and fair["disagreements"] == []
    assert finding_sentences(fair) == []


def test_the_page_of_a_reward_model_escapes_every_text(tmp_path: Path) -> None:
    pairs, margins = scored_pairs()
    pairs = pairs.add_column("group", ["<u>one"] * 30 + [f"g{k}" for k in range(30)])
    groups = list(pairs["group"])
    found = reward_model_metrics(margins, np.zeros(60), groups, seed=0)
    found |= pair_findings(pairs, margins, distances=(np.arange(60.0), 49.5), seed=0)
    found["run"] = {"model": "<script>m", "pairs": "p", "command": "c", "chat": False, "seconds": 1}
    write_reward_model_page(tmp_path / "page.html", found, margins, groups=groups, words=word_difference(pairs))
    page = (tmp_path / "page.html").read_text()
    assert not any(f"<{tag}" in page for tag in ("script", "b>film", "i>", "u>one"))
    assert "&lt;b&gt;film" in page and "&lt;u&gt;one" in page and "other groups" in page
    assert "Where does it contradict the labels most?" in page and "distance 59.00" in page


def test_groups_of_margins_lose_no_pair() -> None:
    margins = np.arange(40.0)
    groups = [f"g{k % 11}" for k in range(40)]
    made = by_group(margins, groups)
    assert len(made) == GROUPS + 1 and sorted(chain(*made.values())) == margins.tolist()
    assert made["g0"] == margins[::11].tolist() and by_group(margins, None) == {"margins": margins.tolist()}
