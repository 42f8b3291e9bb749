"""The user's own columns of prompts stay in completions, best-of-n and pairs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from align.commands.best_of_n import BestSettings, choose_best
from align.commands.build_pairs import BuildSettings, build_pairs
from align.commands.generate import Format, GenerateSettings, generate_completions
from align.config import PairsSection
from align.data.completions import read_groups
from align.data.pairs import load_pairs, read_pairs
from align.data.prompts import read_prompts
from align.data.streaming import stream_pairs
from align.errors import DataError
from align.generation.types import Sampling
from reward_models.scorers import ScorerSpec

VADER = ScorerSpec(judge="vader")
OWN: dict[str, list[Any]] = {
    "answer": [42, None, 7],
    "meta": [{"a": 1}, {"b": [None]}, {}],
    "mixed": ["x", 3, None],
    "turns": [[{"from": "human", "value": "hello"}], [], None],
}


def jsonl(file: Path, table: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(file)


def same(cell: Any, expected: Any) -> bool:
    """Whether a cell is what was given, objects perhaps as JSON text."""
    return bool(cell == expected) or (isinstance(cell, str) and json.loads(cell) == expected)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_from_prompts_to_pairs(kind: Format, tiny_policy: Path, tmp_path: Path) -> None:
    """Generated, the best chosen, paired: each row has the cells of its prompt; another cell makes another stage."""
    table = [{"id": str(k), "question": f"the film {k} is", "chosen": "no"} for k in range(3)]
    table = [row | {name: values[k] for name, values in OWN.items()} for k, row in enumerate(table)]
    source = PairsSection(path=jsonl(tmp_path / "p.jsonl", table), columns={"prompt": "question"})
    settings = GenerateSettings(str(tiny_policy), Sampling(6, n=4, engine="transformers"), format=kind)
    assert not generate_completions(source, settings, tmp_path / "out").skipped
    assert generate_completions(source, settings, tmp_path / "out").skipped
    completions = read_groups(tmp_path / "out" / f"completions.{kind}")
    assert [sorted(one.own) for group in completions for one in group.candidates] == [sorted(OWN)] * 12
    choose_best(tmp_path / "out", BestSettings(VADER, format=kind), tmp_path / "best")
    best = read_groups(tmp_path / "best" / f"completions.{kind}")
    for group in (*completions, *best):
        for one in group.candidates:
            assert all(same(one.own[name], values[int(group.id)]) for name, values in OWN.items()), one.own
    for row in table:
        row["answer"] = -1
    jsonl(tmp_path / "p.jsonl", table)
    assert not generate_completions(source, settings, tmp_path / "out").skipped


def test_pairs_take_the_cells_of_their_prompt_and_of_both_completions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cells that differ between the completions of a prompt get one column for each side; taken names are named."""
    table = [
        {"id": f"{k}", "prompt": f"film {k}", "sample": number, "completion": text, "temp": heat, "reward": heat}
        | {name: values[k] for name, values in OWN.items()}
        for k in range(3)
        for number, (text, heat) in enumerate(((" awful", 0.5), (" wonderful", 1.0)))
    ]
    with caplog.at_level(logging.WARNING, "align"):
        build_pairs(jsonl(tmp_path / "c.jsonl", table), BuildSettings(VADER), tmp_path / "out")
    assert "pairs: reward: not kept, because the table has other columns of these names" in caplog.text
    pairs = read_pairs(tmp_path / "out")
    assert pairs["temp_chosen"][:] == [1.0] * 3 and pairs["temp_rejected"][:] == [0.5] * 3
    assert all(isinstance(value, float) and value > 1 for value in pairs["margin"])
    for row in pairs:
        assert all(same(row[name], values[int(row["prompt_id"])]) for name, values in OWN.items())
    source = PairsSection(path=str(tmp_path / "out" / "pairs.parquet"))
    loaded, streamed = load_pairs(source, carry=True), stream_pairs(source, tmp_path / "s.arrow", carry=True)
    assert loaded["answer"][:] == streamed["answer"][:] == OWN["answer"]


def test_tool_calls_keep_their_own_arguments_in_completions(tiny_policy: Path, tmp_path: Path) -> None:
    """A message of a completion table has the keys that its row gives it, and a null argument stays."""
    from align.commands.generate import write_table

    prompts = [
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{"arguments": given}]},
         {"role": "tool", "content": "1"}]
        for given in ({"a": 1, "none": None}, {"b": 2})
    ]  # fmt: skip
    answer = [{"role": "assistant", "content": "y"}]
    rows = [{"id": str(k), "sample": 0, "prompt": prompt, "completion": answer} for k, prompt in enumerate(prompts)]
    write_table([rows[0], rows[1] | {"late": 1}], tmp_path / "completions.parquet")
    groups = read_groups(tmp_path / "completions.parquet")
    assert [group.prompt for group in groups] == prompts
    assert [group.candidates[0].own for group in groups] == [{"late": None}, {"late": 1}]


def test_a_mapped_column_is_read_or_missed(tmp_path: Path) -> None:
    """Each mapping of a table of prompts holds, not only that of the prompt; one that is not there is an error."""
    file = jsonl(tmp_path / "p.jsonl", [{"qid": 5, "question": "is it?", "kind": "short", "stars": 2}])
    columns = {"prompt": "question", "id": "qid", "group": "kind"}
    (row,) = read_prompts(PairsSection(path=file, columns=columns))
    assert (row.id, row.prompt, row.group, row.own) == ("5", "is it?", "short", {"stars": 2})
    with pytest.raises(DataError, match=r"column 'qestion', mapped to 'prompt', is not there.*question"):
        read_prompts(PairsSection(path=file, columns={"prompt": "qestion"}))
