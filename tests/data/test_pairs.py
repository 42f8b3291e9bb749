"""The pair table: reading, messages for invalid rows, splits, writing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from align.commands.data import check_data
from align.config import PairsSection, RunConfig
from align.data.pairs import check_pairs, describe_unused, fingerprint, load_pairs, read_pairs, write_pairs
from align.data.prompts import load_prompts
from align.data.splits import folds_by_prompt, split_by_prompt
from align.data.statistics import summarize
from align.data.streaming import stream_pairs
from align.errors import DataError
from align.run.pipeline import run_pipeline
from tests.helpers.builders import bert_reward, rows

GOOD = {"prompt": "Say:", "chosen": " yes", "rejected": " no"}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = {
    "prompt": [turn("user", "hello")],
    "chosen": [turn("assistant", "hi")],
    "rejected": [turn("assistant", "go away")],
}


def jsonl(folder: Path, *lines: Any) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


BROKEN = [
    ("missing", {**GOOD, "chosen": None}, "row 2:chosen: found nothing, expected text or a list of messages"),
    ("empty", {**GOOD, "rejected": "  "}, "row 2:rejected: found empty text, expected non-empty text"),
    ("equal", {**GOOD, "rejected": " yes"}, "row 2:rejected: found the same as chosen, expected another response"),
    ("type", {**GOOD, "prompt": 7}, "row 2:prompt: found 7, expected text or a list of messages"),
    ("nan margin", {**GOOD, "margin": float("nan")}, "row 2:margin: found nan, expected a finite number"),
    ("infinite margin", {**GOOD, "margin": float("inf")}, "row 2:margin: found inf, expected a finite number"),
    ("margin beyond 32 bits", {**GOOD, "margin": -1e39}, "row 2:margin: found -1e+39, expected at most 1e+38 in size"),
    (
        "rewards with an infinite difference",
        {**GOOD, "reward_chosen": 9e37, "reward_rejected": -9e37},
        "row 2:margin: found 1.8e+38, expected at most 1e+38 in size",
    ),
    ("nothing to see", {**GOOD, "chosen": "\u200b \ufeff\n"}, "row 2:chosen: found empty text, expected non-empty"),
    ("word as margin", {**GOOD, "margin": "big"}, "row 2:margin: found 'big', expected a finite number"),
    ("negative weight", {**GOOD, "weight": -1}, "row 2:weight: found -1, expected a number that is not negative"),
    ("duplicate id", {**GOOD, "id": "a"}, "row 2:id: found 'a', expected an id used once (row 1 has it too)"),
    ("not JSON", "{not json", "row 2:(row): found invalid JSON"),
    ("not an object", "[1, 2]", "row 2:(row): found a JSON list, expected an object"),
    (
        "wrong role",
        {**CHAT, "chosen": [turn("bot", "hi")]},
        "row 2:chosen[1]: found role 'bot', expected one of system",
    ),
    ("last by user", {**CHAT, "chosen": [turn("user", "hi")]}, "row 2:chosen: found a last message by user"),
    ("prompt by assistant", {**CHAT, "prompt": CHAT["chosen"]}, "row 2:prompt: found a last message by assistant"),
    ("message without content", {**CHAT, "rejected": [{"role": "assistant"}]}, "row 2:rejected[1]: found {'role'"),
    ("empty messages", {**CHAT, "prompt": []}, "row 2:prompt: found no messages, expected at least one message"),
    ("text and messages", {**CHAT, "chosen": "hi"}, "row 2:(row): found prompt messages, chosen text"),
]


@pytest.mark.parametrize(("row", "said"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_bad_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    path = jsonl(tmp_path, {**GOOD, "id": "a"}, row)
    with pytest.raises(DataError) as caught:
        load_pairs(PairsSection(path=path))
    assert f"{path}:{said}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "holds no rows"),
        ("latin.jsonl", '{"chosen": "\xe9"}'.encode("latin-1"), "not UTF-8 (byte 12"),
        (
            "columns.jsonl",
            b'{"prompt": "a", "chosn": "b", "rejected": "c"}\n',
            "no column 'chosen' (did you mean `chosn`?)",
        ),
        ("twice.csv", b"prompt,chosen,chosen,rejected\na,b,c,d\n", "column 'chosen' is there twice"),
        ("fields.csv", b"prompt,chosen,rejected\na,b\n", "row 1:(row): found 2 fields, expected 3 as in the header"),
        ("quotes.csv", b'prompt,chosen,rejected\n"a"b,c,d\n', "',' expected after '\"'"),
        ("cut.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("pairs.txt", b"hello", "found a file ending in '.txt'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_pairs(PairsSection(path=str(path)))
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_twenty_problems_then_a_count(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[{**GOOD, "chosen": ""}] * 25)
    with pytest.raises(DataError) as caught:
        load_pairs(PairsSection(path=path))
    assert str(caught.value).count("found empty text") == 20 and "... and 5 more" in str(caught.value)


def test_drop_invalid_keeps_the_rest_and_says_why(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, {**GOOD, "chosen": ""}, {**GOOD, "chosen": " sure"})
    side = tmp_path / "side.jsonl"
    pairs = load_pairs(PairsSection(path=path, drop_invalid=True), side_file=side)
    assert len(pairs) == 2
    (dropped,) = [json.loads(line) for line in side.read_text().splitlines()]
    assert dropped["row"] == 2 and "found empty text" in dropped["reason"]


def test_rows_of_the_other_kind_are_set_aside_each(tmp_path: Path) -> None:
    chat = {name: [{"role": "assistant" if name != "prompt" else "user", "content": GOOD[name]}] for name in GOOD}
    path = jsonl(tmp_path, GOOD, chat, {**GOOD, "chosen": ""}, {**GOOD, "chosen": " sure"}, chat)
    side = tmp_path / "side.jsonl"
    assert len(load_pairs(PairsSection(path=path, drop_invalid=True), side_file=side)) == 2
    dropped = [json.loads(line) for line in side.read_text().splitlines()]
    assert [row["row"] for row in dropped] == [2, 3, 5]
    assert "row 5:prompt: found conversational, expected plain text, as in the rows before" in dropped[2]["reason"]


def test_every_format_gives_the_same_table(tmp_path: Path) -> None:
    table = rows(8)
    jsonl(tmp_path, *table)
    frame = pd.DataFrame(table)
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    frame.to_parquet(tmp_path / "pairs.parquet")
    Dataset.from_list(table).save_to_disk(str(tmp_path / "saved"))
    DatasetDict({"train": Dataset.from_list(table)}).save_to_disk(str(tmp_path / "dict"))
    sources = ("pairs.jsonl", "pairs.csv", "pairs.parquet", "saved", "dict")
    prints = {fingerprint(load_pairs(PairsSection(path=str(tmp_path / name)))) for name in sources}
    assert len(prints) == 1


def test_implicit_prompt_is_what_both_responses_begin_with(tmp_path: Path) -> None:
    chat = {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]}
    pairs = load_pairs(PairsSection(path=jsonl(tmp_path, chat)))
    assert pairs[0]["prompt"] == CHAT["prompt"] and pairs[0]["chosen"] == CHAT["chosen"]
    pairs = load_pairs(
        PairsSection(path=jsonl(tmp_path, {"chosen": "The sky is blue", "rejected": "The sky is green"}))
    )
    assert pairs[0]["prompt"] + pairs[0]["chosen"] == "The sky is blue"
    with pytest.raises(DataError, match="no shared beginning"):
        load_pairs(PairsSection(path=jsonl(tmp_path, {"chosen": "yes", "rejected": "no"})))


def test_columns_may_be_swapped_and_mapped_to_themselves(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {**GOOD, "margin": 2.0, "id": "mine", "weight": 0.5, "good": " yes!"})
    swapped = {"chosen": "rejected", "rejected": "chosen", "margin": "margin", "id": "id", "weight": "weight"}
    (row,) = load_pairs(PairsSection(path=path, columns=swapped))
    assert (row["chosen"], row["rejected"], row["margin"], row["id"], row["weight"]) == (
        " no",
        " yes",
        2.0,
        "mine",
        0.5,
    )
    (row,) = load_pairs(PairsSection(path=path, columns={"chosen": "good"}))
    assert row["chosen"] == " yes!"
    with pytest.raises(ValueError, match=r"'weigth' is not a column of the pair table \(did you mean `weight`\?\)"):
        PairsSection(path=path, columns={"weigth": "w"})
    with pytest.raises(ValueError, match="'good' is given for two columns"):
        PairsSection(path=path, columns={"chosen": "good", "rejected": "good"})


def test_columns_are_mapped_and_a_wrong_map_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Say:", "better": " yes", "worse": " no"})
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    assert load_pairs(PairsSection(path=path, columns=columns))[0]["chosen"] == " yes"
    with pytest.raises(DataError, match="column 'beter', mapped to 'chosen', is not there"):
        load_pairs(PairsSection(path=path, columns={**columns, "chosen": "beter"}))


def test_ids_are_stable_and_unique(tmp_path: Path) -> None:
    path = jsonl(tmp_path, GOOD, GOOD, {**GOOD, "chosen": " sure"})
    ids = load_pairs(PairsSection(path=path))["id"]
    assert len(set(ids)) == 3 and ids[1] == f"{ids[0]}-2"
    assert list(load_pairs(PairsSection(path=path))["id"]) == list(ids)


def test_written_twice_is_the_same_bytes_and_reads_back(tmp_path: Path) -> None:
    """Also in a folder named like a column and its value, which Parquet readers take for a partition."""
    pairs = load_pairs(PairsSection(path=jsonl(tmp_path, *rows(5))))
    for name in ("a", "margin=0.1"):
        write_pairs(pairs, tmp_path / name)
    first, second = ((tmp_path / name / "pairs.parquet").read_bytes() for name in ("a", "margin=0.1"))
    assert first == second
    assert fingerprint(read_pairs(tmp_path / "margin=0.1")) == fingerprint(pairs)
    assert fingerprint(pairs) != fingerprint(pairs.select(range(4)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=12, max_size=60), st.integers(2, 4), st.integers(0, 5))
def test_folds_are_a_deterministic_partition(prompts: list[int], folds: int, seed: int) -> None:
    pairs = Dataset.from_dict({"prompt": [f"prompt {k}" for k in prompts]})
    fold = folds_by_prompt(pairs, folds, seed)
    assert (fold == folds_by_prompt(pairs, folds, seed)).all()
    assert set(fold) <= set(range(folds))
    counts = {k: prompts.count(k) for k in set(prompts) if prompts.count(k) <= len(prompts) / 2}
    for prompt in counts:
        assert len({int(fold[k]) for k in range(len(prompts)) if prompts[k] == prompt}) == 1
    sizes = np.bincount(fold, minlength=folds)
    assert sizes.max() - sizes.min() <= max([1, *counts.values()])


def test_split_keeps_prompts_apart() -> None:
    pairs = Dataset.from_dict({"prompt": [f"p{k // 2}" for k in range(60)], "k": list(range(60))})
    train, held_out = split_by_prompt(pairs, 0.1, 0)
    assert len(train) + len(held_out) == 60 and len(held_out) == 6
    assert not set(train["prompt"]) & set(held_out["prompt"])


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.15, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("of_a_prompt", [1, 3])
def test_the_share_that_is_asked_for_is_held_out(fraction: float, of_a_prompt: int) -> None:
    """If the share is one over a whole number k, the held-out pairs are one of k folds."""
    pairs = Dataset.from_dict({"prompt": [f"p{k // of_a_prompt}" for k in range(900)], "k": list(range(900))})
    train, held_out = split_by_prompt(pairs, fraction, 3)
    assert abs(len(held_out) - 900 * fraction) <= of_a_prompt and len(train) + len(held_out) == 900
    assert not set(train["prompt"]) & set(held_out["prompt"])
    if abs(round(1 / fraction) * fraction - 1) < 1e-9:
        assert held_out["k"] == np.flatnonzero(folds_by_prompt(pairs, round(1 / fraction), 3) == 0).tolist()


def test_a_share_below_one_pair_is_one_pair() -> None:
    train, held_out = split_by_prompt(Dataset.from_dict({"prompt": ["a", "b", "c"]}), 1e-9, 0)
    assert (len(train), len(held_out)) == (2, 1)


def test_prompts_and_summary(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path, {"prompt": "a"}, {"prompt": ""}))
    with pytest.raises(DataError, match="row 2:prompt: found empty text"):
        load_prompts(str(path))
    summary = summarize(load_pairs(PairsSection(path=jsonl(tmp_path, GOOD, {**GOOD, "chosen": " yes of course"}))))
    assert summary["pairs"] == 2 and summary["prompts"] == 1 and summary["chosen_longer_share"] == 0.5


def test_check_counts_problems_without_raising(tmp_path: Path) -> None:
    checked = check_pairs(PairsSection(path=jsonl(tmp_path, GOOD, {**GOOD, "chosen": ""}, "{")))
    assert len(checked.pairs) == 1 and [item["row"] for item in checked.invalid] == [2, 3]


def test_a_run_holds_out_the_share_that_is_asked_for(tmp_path: Path) -> None:
    source = jsonl(tmp_path, *({**GOOD, "prompt": f"say {k}:"} for k in range(40)))
    for fraction, held_out in ((0.75, 30), (0.2, 8)):
        tree = {"name": "r", "output_dir": str(tmp_path), "pairs": {"path": source},
                "reward": {"model": str(bert_reward(tmp_path / "m")), "eval_fraction": fraction}}  # fmt: skip
        run_pipeline(RunConfig.model_validate(tree), command="", until=("pairs",))
        assert len(read_pairs(tmp_path / "r" / "pairs" / "heldout")) == held_out


def test_mapped_rewards_give_a_margin_and_unused_columns_are_named(tmp_path: Path) -> None:
    row = {**GOOD, "score_chosen": 8.5, "score_rejected": 6, "source": "x"}
    path = jsonl(tmp_path, row, {**row, "chosen": " sure", "score_rejected": None})
    checked = check_pairs(PairsSection(path=path))
    assert checked.unused == ["score_chosen", "score_rejected", "source"] and "margin" not in checked.pairs.column_names
    assert describe_unused(checked.unused) == (
        "3 columns not used: score_chosen, score_rejected, source (map them with "
        "--column reward_chosen=score_chosen --column reward_rejected=score_rejected)"
    )
    columns = {"reward_chosen": "score_chosen", "reward_rejected": "score_rejected"}
    source = PairsSection(path=path, columns=columns)
    loaded = load_pairs(source)
    assert loaded["margin"][:] == [2.5, None]
    assert stream_pairs(source, tmp_path / "streamed.arrow").to_list() == loaded.to_list()
    own = jsonl(tmp_path, {**row, "margin": 1.0})
    assert load_pairs(PairsSection(path=own, columns=columns))["margin"][:] == [1.0]


def test_a_margin_against_its_rewards_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A margin of its own, of the same sign, is not remarkable."""
    rewards = {"reward_chosen": 2.0, "reward_rejected": 1.0}
    names = [{**GOOD, "prompt": f"say {k}:", **rewards} for k in range(3)]
    path = jsonl(tmp_path, {**names[0], "margin": 0.25}, *({**row, "margin": -1.0} for row in names[1:]))
    pairs = load_pairs(PairsSection(path=path))
    assert pairs["margin"][:] == [0.25, -1.0, -1.0]
    assert caplog.text.count("row 2, and perhaps others: margin is -1, but reward_chosen - reward_rejected is 1") == 1
    assert caplog.text.count("perhaps others") == 1


def test_problems_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``:id:`` is no name of a picture."""
    path = jsonl(tmp_path, {**GOOD, "id": 1}, {**GOOD, "id": "1", "prompt": "say :smile:"})
    with pytest.raises(DataError, match="1 rows are invalid"):
        check_data(PairsSection(path=path), drop_to=None)
    assert "row 2:id: found '1'" in capsys.readouterr().out
