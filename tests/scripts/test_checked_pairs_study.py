"""The studies of checked pairs and of selection rules: one seed of each, and their tables."""

import numpy as np
import pytest

from scripts.study import checked_pairs, selection_rules
from scripts.tables import compact, table


def test_rules_keep_what_they_say() -> None:
    """The random rule differs by 0 from itself; the smallest signed gap keeps the contradicted labels."""
    found = selection_rules.run_seed("flips 20", "own", 5)
    cell = {key: [value, value] for key, value in found.items()} | {
        "labels": "flips 20", "margins": "own", "seeds": 2}  # fmt: skip
    summary = selection_rules.summarize([cell])
    rows = {row["rule"]: row for row in summary["rows"]}
    assert [one["value"] for one in rows["random"]["from_random"]] == [0, 0, 0]
    assert summary["means"]["small h"] < -1 < summary["means"]["margin"]
    assert found["penalty"] > min(found["selected_penalty"])
    text = selection_rules.markdown(summary)
    assert "small \\|h\\|" in text and text.splitlines()[1].count("|") == 10


def test_rules_choose_by_their_score() -> None:
    rng = np.random.default_rng(0)
    x, gap, rewards = rng.normal(size=(50, 2, selection_rules.SIZE)), rng.normal(size=50), rng.normal(size=(50, 2))
    scores = selection_rules.draw_scores(x, gap, rewards, 0.01, rng)
    assert set(scores) == set(selection_rules.RULES)
    assert scores["small |h|"].argmax() == np.abs(gap).argmin()
    assert scores["margin"].argmax() == (rewards[:, 0] - rewards[:, 1]).argmax()
    best = scores["RIP"].argmax()
    assert rewards[best, 1] > np.median(rewards[:, 1]) and rewards[best] @ [1, -1] < np.median(rewards @ [1, -1])


@pytest.mark.parametrize("kind", ["clean", "one source flips"])
def test_one_world_of_checked_pairs(kind: str) -> None:
    """The wrong source is named and leaving it out gains; no source is named without one."""
    found = checked_pairs.run_seed(checked_pairs.draw_arena(kind, 3), 3)
    wrong = [0] if kind == "one source flips" else []
    assert set(map(tuple, found["named"].values())) == {tuple(wrong)}
    row = checked_pairs.summarize("arena", kind, {"seeds": 2, "found": [found, found]})
    assert (row["from_all"]["sources 200"]["value"] > 0.01) == bool(wrong)
    assert row["named"]["50"]["falsely"]["value"] == 0
    assert "arena: labels" in checked_pairs.markdown([row])


def test_kept_results_are_short() -> None:
    assert compact({"a": 0.123456789, "b": [1, None]}) == '{"a":0.12346,"b":[1,null]}\n'
    assert table(["a"], [["b"]]) == "| a |\n|---|\n| b |"
