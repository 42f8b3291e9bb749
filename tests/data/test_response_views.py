"""Views of a table of responses, and the counts of what they leave out."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.commands.pairs_from import ViewSettings, pairs_from, read_weights
from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.response_table import Response, Responses, Votes, read_responses
from align.data.response_views import lists, merged, scored_pairs, thumbs, tied_pairs, voted_pairs
from align.errors import ConfigError, DataError


def prompt(*responses: Response, name: str = "p") -> Responses:
    return Responses(name, "q", None, responses)


def scored(*scores: float | None) -> Responses:
    return prompt(*(Response(f"r{k}", score) for k, score in enumerate(scores)))


def chosen(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_views_of_scores() -> None:
    table = [scored(2, 5, 2, 3, None)]
    best = scored_pairs(table, "best_worst")
    assert chosen(best.rows) == [("r1", "r2")] and best.left_out == {"responses without a score": 1}
    assert best.rows[0]["teacher_margin"] == 3 and best.rows[0]["id"] == "p:1-2"
    adjacent = scored_pairs(table, "adjacent")
    assert chosen(adjacent.rows) == [("r1", "r3"), ("r3", "r0")] and adjacent.left_out["pairs with equal scores"] == 1
    assert chosen(scored_pairs(table, "band", band=(1.0, 2.5)).rows) == [("r1", "r3")]
    assert scored_pairs(table, "band", band=(8.0, 9.0)).left_out["prompts without a pair in the band"] == 1
    assert scored_pairs([scored(1)], "all").left_out == {"prompts with fewer than two scored responses": 1}


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_all_pairs_and_ties_are_every_two_responses(scores: list[int]) -> None:
    table = [scored(*map(float, scores))]
    everything, ties = scored_pairs(table, "all"), tied_pairs(table)
    assert len(everything.rows) + len(ties.rows) == len(list(combinations(scores, 2)))
    assert everything.left_out["pairs with equal scores"] == len(ties.rows)
    assert all(row["teacher_margin"] > 0 for row in everything.rows)
    assert all((row["vote_share"], row["votes_tie"]) == (0.5, 1) for row in ties.rows)


def test_a_list_of_two_is_a_pair() -> None:
    table = [scored(1, 4)]
    views = [scored_pairs(table, mode).rows for mode in ("best_worst", "all", "adjacent", "band")]
    assert all(rows == views[0] for rows in views) and chosen(views[0]) == [("r1", "r0")]
    (row,) = lists(table).rows
    assert [one["response"] for one in row["responses"]] == ["r1", "r0"]


def test_what_was_said_about_equal_responses_is_combined() -> None:
    said = [
        Response("a", 1.0, Votes(1, 0, 0), True, "x"),
        Response(" a", 4.0, Votes(0, 1, 1), False, "y"),
        Response("b"),
    ]
    first, second = merged(prompt(*said))
    assert (first.score, first.votes, first.label, first.rater) == (2.5, Votes(1, 1, 1), None, None)
    assert second == said[2]


@pytest.mark.parametrize(
    ("yes", "no", "tie", "share"), [(4, 0, 0, 1.0), (3, 1, 0, 0.75), (1, 3, 0, 0.75), (2, 1, 1, 0.625)]
)
def test_votes_become_soft_labels(yes: int, no: int, tie: int, share: float) -> None:
    table = [prompt(Response("a", votes=Votes(yes, no, tie)), Response("b", votes=Votes(no, yes, tie)))]
    (row,) = voted_pairs(table).rows
    assert row["vote_share"] == share and chosen([row]) == [("a", "b") if yes > no else ("b", "a")]
    assert (row["votes_chosen"], row["votes_rejected"], row["votes_tie"]) == (max(yes, no), min(yes, no), tie)
    assert tied_pairs(table).left_out == {"pairs with a majority": 1}


def test_votes_that_say_nothing_of_two_are_left_out() -> None:
    one = Votes(1, 1, 0)
    three = prompt(*(Response(text, votes=one) for text in "abc"))
    apart = prompt(Response("a", votes=Votes(2, 1)), Response("b", votes=Votes(2, 1)))
    even = prompt(Response("a", votes=one), Response("b", votes=one))
    found = voted_pairs([three, apart, even])
    assert not found.rows and found.left_out == {
        "prompts without votes on exactly two responses": 1,
        "prompts whose votes were not between their two responses": 1,
        "pairs without a majority": 1,
    }
    assert [row["vote_share"] for row in tied_pairs([even]).rows] == [0.5]


def test_thumbs_are_those_of_labels_or_of_scores() -> None:
    table = [prompt(Response("a", label=True), Response("b", 3.0), Response("c", 1.0), Response("d"))]
    assert [row["label"] for row in thumbs(table).rows] == [True]
    found = thumbs(table, threshold=2.0)
    assert [(row["completion"], row["label"]) for row in found.rows] == [("a", True), ("b", True), ("c", False)]
    assert found.left_out == {"responses without a thumb": 1}


def written(folder: Path, *rows: Any) -> PairsSection:
    file = folder / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PairsSection(path=str(file))


def test_a_view_is_a_pair_table(tmp_path: Path) -> None:
    """Messages, tools and votes arrive in the pair table that training reads."""
    ask = [{"role": "user", "content": "q"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
    say = {"role": "assistant", "content": "no"}
    votes = {"id": "v", "prompt": ask, "tools": [{"name": "f"}], "responses": [
        {"response": [call], "votes": {"yes": 3, "no": 1}}, {"response": [say]},
    ]}  # fmt: skip
    even = {"id": "e", "prompt": ask, "responses": [{"response": [say], "votes": {"tie": 2}}, {"response": [call]}]}
    metrics = pairs_from(written(tmp_path, votes, even), ViewSettings(("votes", "ties")), tmp_path / "out")
    assert metrics["rows"] == 2 and metrics["left_out"] == {}
    first, second = load_pairs(PairsSection(path=str(tmp_path / "out" / "pairs.parquet")))
    assert first["chosen"] == [call] and json.loads(first["tools"]) == [{"name": "f"}]
    assert (first["votes_chosen"], first["votes_rejected"], second["votes_tie"]) == (3, 1, 2)


def test_lists_and_thumbs_are_read_again(tmp_path: Path) -> None:
    row = {"id": "a", "prompt": "q", "responses": [{"response": "x", "score": 1}, {"response": "y", "score": 2}]}
    source = written(tmp_path, row)
    pairs_from(source, ViewSettings(("lists",)), tmp_path / "lists")
    again = read_responses(PairsSection(path=str(tmp_path / "lists" / "lists.jsonl"))).prompts
    assert scored_pairs(again, "all").rows[0]["chosen"] == "y"
    pairs_from(source, ViewSettings(("thumbs",), threshold=2.0), tmp_path / "thumbs")
    lines = [json.loads(line) for line in (tmp_path / "thumbs" / "thumbs.jsonl").read_text().splitlines()]
    assert [(one["completion"], one["label"]) for one in lines] == [("x", False), ("y", True)]


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"views": ("best",)}, "--view best: not known"),
        ({"views": ("lists", "votes")}, "expected different views of pairs, or one view"),
        ({"views": ("all", "adjacent")}, "expected one of best_worst, all, adjacent, band"),
        ({"band": (0.0, 1.0)}, "with --view band"),
        ({"threshold": 1.0}, "for --view thumbs alone"),
        ({"shape": "kto"}, "--shape kto: not known"),
    ):
        with pytest.raises(ConfigError, match=words):
            ViewSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--score helpfulness: expected ATTRIBUTE=WEIGHT"):
        read_weights(["helpfulness"])
    with pytest.raises(DataError, match="nothing is left in the view best_worst: 1 responses without a score"):
        pairs_from(written(tmp_path, {"prompt": "q", "responses": ["only"]}), ViewSettings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
