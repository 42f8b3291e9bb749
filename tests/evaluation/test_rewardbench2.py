"""RewardBench 2: golden values worked by hand from the benchmark's own code, and rows that cannot be used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.commands.evaluate_reward_model import evaluate
from align.config import PairsSection
from align.errors import DataError
from align.evaluation.rewardbench2 import Question, best_of_score, read_question, scores, ties_score
from reward_models.ensemble import EnsembleScorer
from tests.helpers.builders import llama_reward
from tests.helpers.command_line import jsonl

TIES = [
    (Question("ref:0", "Ties", "p", ("a",) * 3, 1), [2.0, 0.5, 1.0]),  # margin 1
    (Question("tied:0", "Ties", "p", ("a",) * 4, 2), [3.0, 2.5, 1.0, 0.0]),  # margin 1.5, spread 0.5
    (Question("ref:1", "Ties", "p", ("a",) * 2, 1), [0.2, 0.5]),  # margin -0.3
    (Question("tied:1", "Ties", "p", ("a",) * 3, 2), [1.0, 0.0, -0.4]),  # margin 0.4, spread 1
]


def row(**changes: Any) -> dict[str, Any]:
    good = {"id": "7", "subset": "Math", "prompt": "the film is", "chosen": [" good film"], "num_correct": 1}
    return good | {"rejected": [" bad film", " awful film", " dull film"]} | changes


def test_a_best_of_four_shares_its_point_among_the_highest() -> None:
    cases = {(1.0, 1.0, 0.0, 0.0): 0.5, (0.0, 1.0, 0.0, 0.0): 0.0, (2.0, 1.0, 0.0, 1.0): 1.0, (1.0,) * 4: 0.25}
    for rewards, score in cases.items():
        assert best_of_score(np.array(rewards)) == score


def test_ties_by_hand() -> None:
    """0.3 + 0.15 + 0.1 + 0.1 + 0.01 (tanh 1 + tanh -1.3) / 2."""
    found = ties_score([one for one, _ in TIES], [np.array(rewards) for _, rewards in TIES])
    assert found["score"] == pytest.approx(0.649499, abs=1e-6)
    assert found["margin_score"] == pytest.approx((np.tanh(1) - np.tanh(1.3)) / 2)
    parts = ("tied_accuracy", "ref_accuracy", "preferred", "preferred_hard")
    assert [found[name] for name in parts] == [1, 0.5, 0.5, 0.5]


def test_equal_right_answers_have_the_limit_of_the_smooth_part() -> None:
    def smooth(tied: list[float]) -> Any:
        both = [TIES[0][0], Question("tied:0", "Ties", "p", ("a",) * 3, 2)]
        return ties_score(both, [np.array([2.0, 1.0]), np.array(tied)])["margin_score"]

    assert smooth([1.0, 1.0, 0.0]) == 1.0 and smooth([1.0, 1.0, 1.0]) == 0.0, "infinite, and not a number"


def test_the_overall_score_needs_every_subset() -> None:
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    questions = [Question(str(k), name, "p", ("a",) * 4, 1) for k, name in enumerate(names)]
    rewards = [np.array([1.0, 0, 0, 0])] * 4 + [np.array([0.0, 1, 0, 0])]
    part = scores(questions, rewards)
    assert part["overall"] is None and part["missing"] == ["Ties"] and part["subsets"]["Focus"] == 0.0
    whole = scores([*questions, *(one for one, _ in TIES)], [*rewards, *(np.array(values) for _, values in TIES)])
    assert whole["overall"] == pytest.approx((4 + 0.649499) / 6, abs=1e-6) and not whole["missing"]


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"chosen": []}, "chosen"),
        ({"rejected": ["bad", 3]}, "rejected"),
        ({"rejected": "bad"}, "rejected"),
        ({"chosen": ["a", "b"], "num_correct": 2}, "chosen"),
        ({"num_correct": 3}, "num_correct"),
        ({"subset": "Ties"}, "id"),
        ({"subset": "Ties", "id": "tied:x"}, "id"),
    ],
)
def test_rows_that_cannot_be_scored(changes: dict[str, Any], column: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl:row 3:{column}: found .*, expected "):
        read_question(row(**changes), "f.jsonl:row 3")


def test_the_command_scores_every_response_once(tmp_path: Path) -> None:
    model = llama_reward(tmp_path / "rm")
    table = [row(), row(id="8", subset="Focus", prompt="the plot is")]
    source = PairsSection(path=str(tmp_path / jsonl(tmp_path / "bench.jsonl", table)))
    evaluate(source, str(model), tmp_path / "out", chat=False, batch_tokens=256, max_length=64, seed=0)
    found = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    scorer = EnsembleScorer(model, batch_tokens=256, max_length=64)
    expected = scorer.score_completions([table[0]["prompt"]] * 4, [*table[0]["chosen"], *table[0]["rejected"]])
    assert found["rewards"][0] == pytest.approx(expected.tolist(), abs=1e-6)
    assert found["rewardbench2"]["subsets"]["Math"] == float(expected.argmax() == 0)
    jsonl(tmp_path / "bench.jsonl", [row(subset="Ties", id="ref:1")] * 2)
    with pytest.raises(DataError, match="row 2:id: found 'ref:1' again"):
        evaluate(source, str(model), tmp_path / "out", chat=False, batch_tokens=256, max_length=64, seed=0)
