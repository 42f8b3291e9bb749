"""Tables of responses: every shape is read as it is, and what cannot be right is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.config import PairsSection
from align.data.response_table import Response, ResponseTable, Votes, counts_of, read_responses
from align.errors import ConfigError, DataError


def read(folder: Path, *rows: Any, drop_invalid: bool = False, **settings: Any) -> ResponseTable:
    file = folder / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_responses(PairsSection(path=str(file), drop_invalid=drop_invalid), **settings)


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]


def test_the_own_shape_keeps_what_was_said(tmp_path: Path) -> None:
    said = {"response": "yes", "score": 4, "label": True, "rater": "r", "source": "s", "policy": "p"}
    (prompt,) = read(tmp_path, {"id": 7, "prompt": "q", "group": "g", "responses": [said, "no"]}).prompts
    assert (prompt.id, prompt.prompt, prompt.group) == ("7", "q", "g")
    assert prompt.responses == (Response("yes", 4.0, None, True, "r", "s", "p"), Response("no"))


def test_votes_of_one_of_two_are_those_against_the_other(tmp_path: Path) -> None:
    row = {"prompt": "q", "responses": [{"response": "a", "votes": {"yes": 3, "tie": 1}}, {"response": "b"}]}
    (prompt,) = read(tmp_path, row).prompts
    assert [one.votes for one in prompt.responses] == [Votes(3, 0, 1), Votes(0, 3, 1)]
    assert prompt.responses[0].votes is not None and prompt.responses[0].votes.share == 3.5 / 4


def test_rows_of_single_responses_are_grouped_by_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": name, "completion": f"{name}{k}", "label": k == 1} for k in range(2) for name in ("p", "q")]
    table = read(tmp_path, *rows)
    assert [(one.prompt, [r.text for r in one.responses]) for one in table.prompts] == [
        ("p", ["p0", "p1"]), ("q", ["q0", "q1"]),
    ]  # fmt: skip
    assert counts_of(table) == {
        "prompts": 2, "responses": 4, "invalid_rows": 0, "with_score": 0, "with_votes": 0, "with_label": 4,
    }  # fmt: skip


def test_ultrafeedback_and_helpsteer(tmp_path: Path) -> None:
    completions = [{"response": f"a{k}", "overall_score": k, "model": f"m{k}", "annotations": {}} for k in range(4)]
    (prompt,) = read(tmp_path, {"instruction": "q", "models": ["m0"], "completions": completions}).prompts
    assert [(one.score, one.policy) for one in prompt.responses] == [(float(k), f"m{k}") for k in range(4)]
    steer = {"prompt": "q", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4, "verbosity": 2}
    assert read(tmp_path, steer).prompts[0].responses[0].score == 3
    mixed = read(tmp_path, steer, weights={"helpfulness": 1.0, "verbosity": -0.5})
    assert mixed.prompts[0].responses[0].score == 2
    with pytest.raises(ConfigError, match="found 'humour', expected attributes of helpfulness"):
        read(tmp_path, steer, weights={"humour": 1.0})


def test_battles_have_the_shared_start_as_prompt(tmp_path: Path) -> None:
    first, second = talk("q", "a", "more", "b"), talk("q", "a", "more", "c")
    names = {"model_a": "x", "model_b": "y", "judge": "j"}
    outcomes = ["model_a", "model_b", "tie", "tie (bothbad)"]
    rows = [{"conversation_a": first, "conversation_b": second, "winner": one, **names} for one in outcomes]
    (prompt,) = read(tmp_path, *rows).prompts
    assert prompt.prompt == talk("q", "a", "more")
    assert [one.votes for one in prompt.responses[::2]] == [Votes(1), Votes(0, 1), Votes(tie=1), Votes(tie=1)]
    assert prompt.responses[0] == Response([first[3]], votes=Votes(1), rater="j", policy="x")
    (early,) = read(
        tmp_path, {"conversation_a": talk("q", "a"), "conversation_b": talk("q", "b"), "winner": "a"}
    ).prompts
    assert early.prompt == talk("q") and [one.text[0]["content"] for one in early.responses] == ["a", "b"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"responses": []}, r"row 1:responses: found \[\], expected a list of at least one response"),
    ({"responses": [3]}, r"row 1:responses\[1\]: found 3, expected an object with response"),
    ({"responses": [{"score": 1}]}, r"row 1:responses\[1\]\.response: found nothing"),
    (
        {"responses": [{"response": "a", "score": "good"}]},
        r"responses\[1\]\.score: found 'good', expected a finite number",
    ),
    ({"responses": [{"response": "a", "label": "up"}]}, r"responses\[1\]\.label: found 'up', expected true"),
    ({"responses": [{"response": "a", "votes": 3}]}, r"responses\[1\]\.votes: found 3, expected \{yes: 3"),
    ({"responses": [{"response": "a", "votes": {"yes": -1}}]}, r"votes: found \{'yes': -1\}"),
    ({"responses": [{"response": "a", "votes": {"yes": 0, "no": 0}}]}, "not all 0"),
    ({"responses": [{"response": "a", "votes": {"up": 1}}]}, r"votes: found \{'up': 1\}"),
    (
        {"responses": [{"response": "a", "votes": {"yes": 2}}, {"response": "b", "votes": {"yes": 2}}]},
        r"responses\[2\]\.votes: found \(2, 0, 0\), expected the votes of the other response turned around, 0 for",
    ),
    (
        {"responses": [{"response": "a", "label": False, "votes": {"yes": 2}}]},
        r"label: found False with 2 votes for and 0 against it",
    ),
    (
        {"responses": [{"response": "a", "label": True, "score": 1}, {"response": "b", "label": False, "score": 4}]},
        "row 1:label: found true for a response with score 1 and false for one with 4",
    ),
    (
        {"responses": [{"response": talk("q", "a")[1:]}]},
        "found text and messages, expected prompt and responses of one",
    ),
]


@pytest.mark.parametrize(("row", "words"), WRONG)
def test_what_cannot_be_right_is_named(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read(tmp_path, {"prompt": "q"} | row)
    good = {"prompt": "other", "responses": ["a", "b"]}
    table = read(tmp_path, {"prompt": "q"} | row, good, drop_invalid=True)
    assert [one.prompt for one in table.prompts] == ["other"] and table.invalid == 1


def test_rows_of_no_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found the columns a, expected prompt with responses") as caught:
        read(tmp_path, {"a": 1})
    assert caught.value.code == "response-table"
    with pytest.raises(DataError, match="another prompt with the id 'x'"):
        read(tmp_path, *({"id": "x", "prompt": name, "responses": ["a", "b"]} for name in ("q", "p")))
    with pytest.raises(DataError, match=r"row 1:winner: found 'both', expected model_a or"):
        read(tmp_path, {"conversation_a": talk("q", "a"), "conversation_b": talk("q", "b"), "winner": "both"})
    with pytest.raises(DataError, match="conversation_b: found another first message"):
        read(tmp_path, {"conversation_a": talk("q", "a"), "conversation_b": talk("p", "b"), "winner": "a"})


def test_parquet_structs_hold_nulls_for_keys_of_other_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": "a", "votes": {"yes": 2, "no": 1, "tie": None}, "label": None, "score": None},
        {"prompt": "q", "response": "ü😀", "votes": {"yes": 1, "no": 2, "tie": None}, "label": None, "score": 2.5},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    (prompt,) = read_responses(PairsSection(path=str(tmp_path / "t.parquet"))).prompts
    assert prompt.responses == (Response("a", votes=Votes(2, 1)), Response("ü😀", 2.5, Votes(1, 2)))
