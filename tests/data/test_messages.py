"""The messages of a pair are those that its row in the source holds."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from align import pairs_from_dataset
from align.config import PairsSection
from align.data.pairs import load_pairs, read_pairs, write_pairs
from align.data.streaming import stream_pairs
from align.data.text import plain
from align.errors import DataError
from tests.data.test_pairs import CHAT, jsonl, turn


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "Look.",
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }


CALLS: list[dict[str, Any]] = [
    {**CHAT, "chosen": [call("weather", {"city": "Oslo", "days": [{"n": 1}, {"m": 0.30000000000000004}]})]},
    {
        **CHAT,
        "chosen": [
            call("add", {"x": 2, "y": "3"}),
            {"role": "tool", "content": "5", "name": "add"},
            turn("assistant", "5"),
        ],
    },
    CHAT,
]
CALLS = [{**row, "prompt": [turn("user", f"question {k}")]} for k, row in enumerate(CALLS)]
TEXTS = ("prompt", "chosen", "rejected")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "torch", "written"])
def test_a_tool_call_has_no_keys_of_other_rows(kind: str, tmp_path: Path) -> None:
    """Arrow gives a struct every key of its column, in tool calls and their arguments, at any depth."""
    rows = [{**row, "chosen": row["chosen"]} for row in CALLS]
    if kind != "jsonl":  # a struct holds one type per key
        rows[1] = json.loads(json.dumps(rows[1]).replace('"3"', "3"))
    path = tmp_path / kind
    if kind in ("jsonl", "written"):
        path = Path(jsonl(tmp_path, *rows))
    elif kind == "parquet":
        path = tmp_path / "pairs.parquet"
        pd.DataFrame(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).with_format("torch" if kind == "torch" else None).save_to_disk(str(path))
    pairs = load_pairs(PairsSection(path=str(path)))
    if kind == "written":
        write_pairs(pairs, tmp_path / "out")
        path = tmp_path / "out" / "pairs.parquet"
        assert read_pairs(tmp_path / "out").to_list() == pairs.to_list()
        pairs = load_pairs(PairsSection(path=str(path)))
    streamed = stream_pairs(PairsSection(path=str(path)), tmp_path / "streamed.arrow")
    for table in (pairs, streamed):
        assert [{name: row[name] for name in TEXTS} for row in table] == rows


def test_a_null_that_the_file_holds_stays(tmp_path: Path) -> None:
    row = {**CHAT, "chosen": [call("weather", {"city": "Oslo", "unit": None})]}
    assert load_pairs(PairsSection(path=jsonl(tmp_path, CALLS[1], row)))[1]["chosen"] == row["chosen"]


@pytest.mark.parametrize("printed", [json.dumps, str], ids=["JSON", "Python"])
def test_messages_as_text_are_parsed(printed: Any, tmp_path: Path) -> None:
    wanted = load_pairs(PairsSection(path=jsonl(tmp_path, *CALLS))).to_list()
    texts = [{name: printed(row[name]) for name in TEXTS} for row in CALLS]
    pd.DataFrame(texts).to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame(texts).to_parquet(tmp_path / "t.parquet")
    for path in (tmp_path / "t.csv", tmp_path / "t.parquet", Path(jsonl(tmp_path, *texts))):
        assert load_pairs(PairsSection(path=str(path))).to_list() == wanted


def test_messages_as_text_that_cannot_be_parsed_are_refused(tmp_path: Path) -> None:
    """numpy prints a list of dicts without commas, which is what ``Dataset.to_pandas().to_csv()`` writes."""
    numpy_text = "[{'role': 'assistant', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"
    path = jsonl(tmp_path, {**CHAT, "chosen": numpy_text})
    with pytest.raises(DataError, match=r"row 1:chosen: found .*, expected messages as JSON"):
        load_pairs(PairsSection(path=path))
    plain = {"prompt": "Give a list", "chosen": '[{"role": "x"}]', "rejected": "[1]"}
    assert load_pairs(PairsSection(path=jsonl(tmp_path, plain)))[0]["chosen"] == plain["chosen"]


def test_sharegpt_turns_are_messages(tmp_path: Path) -> None:
    row = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "hi"},
        "rejected": [{"from": "gpt", "value": "go away"}],
    }
    pairs = load_pairs(PairsSection(path=jsonl(tmp_path, row), columns={"prompt": "conversations"}))
    assert pairs[0]["prompt"] == [turn("system", "s"), turn("user", "hello")]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (CHAT["chosen"], CHAT["rejected"])
    unmapped = PairsSection(path=jsonl(tmp_path, row))
    assert load_pairs(unmapped).to_list() == pairs.to_list() == pairs_from_dataset([row]).to_list()
    named = {**row, "prompt": "another"} | {side: "text" + side for side in ("chosen", "rejected")}
    assert load_pairs(PairsSection(path=jsonl(tmp_path, named)))[0]["prompt"] == "another"


def test_a_folder_of_parts_says_what_to_give(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"prompt": "p" + name, "chosen": "c", "rejected": "r"}) + "\n"
        )
    with pytest.raises(DataError, match=r"found a folder of a.jsonl, b.jsonl, expected Parquet files") as error:
        load_pairs(PairsSection(path=str(tmp_path)))
    pattern = error.value.hint.split("'")[1]
    assert len(load_pairs(PairsSection(path=pattern))) == 2


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", None])
def test_ids_of_a_saved_dataset_are_as_they_are(kind: str | None, tmp_path: Path) -> None:
    rows = [{**CHAT, "id": 7 + k, "margin": 0.5} for k in range(2)]
    Dataset.from_list(rows).with_format(kind).save_to_disk(str(tmp_path / "saved"))
    pairs = load_pairs(PairsSection(path=str(tmp_path / "saved")))
    assert list(pairs["id"]) == ["7", "8"] and pairs[0]["chosen"] == CHAT["chosen"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_content_parts_are_kept(name: str, tmp_path: Path) -> None:
    """Also where other rows of the column have text."""
    parts = [{"type": "text", "text": "great"}, {"type": "text", "text": " fun"}]
    thinks = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    rows = [{**CHAT, "chosen": [{"role": "assistant", "content": parts}]}, {**CHAT, "chosen": [thinks]}]
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path = Path(jsonl(tmp_path, *rows))
    else:
        pq.write_table(load_pairs(PairsSection(path=jsonl(tmp_path, *rows))).with_format("arrow")[:], path)
    for pairs in (load_pairs(PairsSection(path=str(path))), stream_pairs(PairsSection(path=str(path)), tmp_path / "s")):
        assert [row["chosen"] for row in pairs] == [row["chosen"] for row in rows]
    assert plain(rows[0]["chosen"]) == "great fun"


@pytest.mark.parametrize(
    "content", [[], [{"type": "image", "text": "x"}], ["great"], [{"type": "text"}], [{"type": "text", "text": " "}]]
)
def test_parts_without_text_are_refused(content: list[Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1:chosen\[1\]"):
        load_pairs(PairsSection(path=jsonl(tmp_path, {**CHAT, "chosen": [{"role": "assistant", "content": content}]})))
