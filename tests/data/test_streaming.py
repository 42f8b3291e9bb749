"""A pair table streamed to disk is the loaded one."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.streaming import stream_pairs
from align.errors import DataError
from tests.helpers.builders import rows


def test_a_streamed_table_is_the_loaded_one(tmp_path: Path) -> None:
    """Same rows, columns and ids; the same message for the same mistakes."""
    source = tmp_path / "pairs.jsonl"
    good = [{key: row[key] for key in ("prompt", "chosen", "rejected", "margin")} for row in rows(30)]
    source.write_text("".join(json.dumps(row) + "\n" for row in [*good, good[3]]))
    config = PairsSection(path=str(source))
    streamed, loaded = stream_pairs(config, tmp_path / "pairs.arrow"), load_pairs(config)
    assert streamed.column_names == loaded.column_names and streamed.to_list() == loaded.to_list()
    chat = [
        {"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]}
    ]  # fmt: skip
    source.write_text("".join(json.dumps(row) + "\n" for row in chat))
    assert stream_pairs(config, tmp_path / "chat.arrow").to_list() == load_pairs(config).to_list()
    for bad in ({"prompt": "p", "chosen": "a", "rejected": " "}, good[0] | {"margin": "NaN"}, {"prompt": "p"}):
        source.write_text("".join(json.dumps(row) + "\n" for row in [*good, bad, bad]))
        messages = []
        for load in (load_pairs, lambda given: stream_pairs(given, tmp_path / "bad.arrow")):
            with pytest.raises(DataError) as error:
                load(config)
            messages.append(str(error.value))
        assert messages[0] == messages[1] and "row 31" in messages[0] and not (tmp_path / "bad.arrow").exists()
    source.write_text("".join(json.dumps(row) + "\n" for row in [good[0] | {"margin": None}, *chat]))
    with pytest.raises(DataError, match="row 2:prompt: found conversational, expected plain text"):
        stream_pairs(config, tmp_path / "bad.arrow")


def test_a_limit_draws_the_same_pairs_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Streamed or loaded, with ids or without; not the first rows, and a larger limit draws more of the same."""
    caplog.set_level("INFO", logger="align")
    given = [row | {"id": f"{'easy' if k < 30 else 'hard'}-{k:02d}"} for k, row in enumerate(rows(60))]
    for table in (given, [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in given]):
        found = []
        for number, order in enumerate((table, table[::-1])):
            source = tmp_path / f"{number}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in order))
            config = PairsSection(path=str(source), limit=20)
            loaded = load_pairs(config)
            file = tmp_path / f"{number}-{len(table[0])}.arrow"
            assert stream_pairs(config, file).to_list() == loaded.to_list() and len(loaded) == 20
            found.append(loaded["prompt"][:])
            assert set(found[-1]) < set(load_pairs(config.model_copy(update={"limit": 40}))["prompt"])
        assert sorted(found[0]) == sorted(found[1]) and found[0] != [row["prompt"] for row in table[:20]]
        assert found[0] == [row["prompt"] for row in table if row["prompt"] in found[0]]
    assert f"{config.path}: 20 of 60 pairs, drawn by a hash of their ids" in caplog.text
    caplog.clear()
    assert len(load_pairs(config.model_copy(update={"limit": 60}))) == 60 and "drawn" not in caplog.text


@pytest.mark.parametrize("batch", [1, 2, 4096])
def test_a_streamed_table_keeps_every_key_of_a_message(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template may read any key, whichever row has it first."""
    monkeypatch.setattr("align.data.streaming.BATCH", batch)
    monkeypatch.setattr("align.data.pair_chunks.SPOOLED", batch)
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": "fine"},
        {"content": "good", "role": "assistant", "reasoning_content": "very fine"},
        {"role": "assistant", "content": "great", "name": "a", "tool_calls": [{"x": 1}]},
        {"role": "assistant", "content": "dull", "name": None, "tool_calls": [{"y": 1.5}]},
    ]
    bad = [{"role": "assistant", "content": "bad"}]
    chat = [
        {"prompt": [{"role": "user", "content": f"q{k}"}], "chosen": [turn], "rejected": bad}
        for k, turn in enumerate(turns)
    ]
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*chat, chat[1]]))
    config = PairsSection(path=str(source))
    streamed, loaded = stream_pairs(config, tmp_path / "chat.arrow"), load_pairs(config)
    assert streamed.to_list() == loaded.to_list()
    assert streamed[1]["chosen"][0]["reasoning_content"] == "very fine"
    assert set(streamed[0]["rejected"][0]) == set(streamed[0]["prompt"][0]) == {"role", "content"}
    chat.append(chat[0] | {"chosen": [turns[2] | {"name": 7}]})
    source.write_text("".join(json.dumps(row) + "\n" for row in chat))
    for load in (load_pairs, lambda given: stream_pairs(given, tmp_path / "kinds.arrow")):
        assert [row["chosen"] for row in load(config)] == [row["chosen"] for row in chat]
