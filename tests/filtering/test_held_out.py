"""The rule against an overlap with an evaluation set, through `filter_pairs`."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from align.commands.filter import filter_source
from align.config import FilterSection, PairsSection
from align.filtering.filter_pairs import filter_pairs
from tests.filtering.samples import pair, unit

TOPICS = [f"{noun} {place}" for noun in ("ships", "bread", "stars", "chess", "bees") for place in "abcdefghijkl"]
SYSTEM = "You are a patient tutor. Explain each step of the answer so that a child could follow it."


def reasons(rows: list[dict[str, Any]], held_out: list[dict[str, Any]], folder: Path) -> dict[int, str]:
    folder = folder / str(len(list(folder.iterdir())))
    folder.mkdir()
    np.save(folder / "e.npy", unit(len(rows), 8))
    settings = FilterSection(keep=1.0, embeddings=str(folder / "e.npy"), skip=["near_duplicate", "duplicate"], margin=0)
    found = filter_pairs(Dataset.from_list(rows), settings, folder / "cache", held_out=held_out, seed=0)
    return {k: found.reasons.of([k])[0] for k in np.flatnonzero(~found.kept).tolist()}


def sample(start: int, stop: int) -> list[dict[str, Any]]:
    return [pair(f"What of {t} ?", f"{t} is fine.", f"No {t}.", f"{k:03d}") for k, t in enumerate(TOPICS[start:stop])]


def test_short_copies_are_found(tmp_path: Path) -> None:
    """Texts of fewer than eight words in another case, white space or Unicode form, in either column."""
    rows, held_out = sample(0, 40), sample(40, 46)
    rows[3] |= {key: held_out[0][key] for key in ("prompt", "chosen", "rejected")}
    rows[5] |= {"prompt": held_out[1]["prompt"].upper()}
    rows[7] |= {"chosen": " " + held_out[2]["rejected"].replace(" ", "\n")}
    rows[9] |= {"rejected": held_out[3]["rejected"]}
    rows[11] |= {"chosen": held_out[4]["chosen"].replace("s", "\uff53").replace("i", "\u200bi")}
    assert reasons(rows, held_out, tmp_path) == {
        3: "contamination: the pair is in the evaluation set",
        5: "contamination: prompt is one of the evaluation set",
        7: "contamination: chosen is a response of the evaluation set",
        9: "contamination: rejected is a response of the evaluation set",
        11: "contamination: chosen is a response of the evaluation set",
    }


@pytest.mark.parametrize("as_text", [False, True])
def test_what_all_pairs_have_in_common_is_no_overlap(
    as_text: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A system prompt as a message or in the text; the copy among the pairs is found none the less."""

    def with_system(row: dict[str, Any]) -> dict[str, Any]:
        if as_text:
            return row | {"prompt": f"{SYSTEM}\n\n{row['prompt']}"}
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}]
        return row | {"prompt": turns} | {s: [{"role": "assistant", "content": row[s]}] for s in ("chosen", "rejected")}

    rows, held_out = sample(0, 40), sample(40, 46)
    rows[11] |= {"prompt": held_out[4]["prompt"]}
    long = "it is told that the old mill by the river turned for three hundred years"
    rows[12] |= {"prompt": f"{long} , is it ?"}
    held_out[5] |= {"prompt": f"say why {long}"}
    caplog.set_level(logging.WARNING, "align")
    found = reasons([with_system(r) for r in rows], [with_system(r) for r in held_out], tmp_path)
    assert found == {
        11: "contamination: prompt is one of the evaluation set",
        12: "contamination: prompt shares with the evaluation set: it is told that the old mill by",
    }
    assert ("runs of words of the evaluation set that many pairs have in common" in caplog.text) == as_text


def test_system_turns_are_not_compared_with_other_ones(tmp_path: Path) -> None:
    """The held-out question under another system prompt, and as text, is the same question."""
    rows, held_out = sample(0, 20), sample(20, 22)
    for name, question in (("a", held_out[0]["prompt"]), ("b", "another one")):
        turns = [{"role": "system", "content": f"{SYSTEM} {name}"}, {"role": "user", "content": question}]
        answers = {"chosen": f"yes, {name}", "rejected": f"no, {name}"}
        rows.append({"id": name, "prompt": turns} | answers)
    chats = [
        row if not isinstance(row["prompt"], str) else row | {"prompt": [{"role": "user", "content": row["prompt"]}]}
        for row in rows
    ]
    assert set(reasons(chats, held_out, tmp_path)) == {20}


def test_one_instruction_for_all_pairs(tmp_path: Path) -> None:
    """Pairs under the instruction of the evaluation set are compared by their responses; generic answers are common."""
    instruction = "Which of the two reviews is the better one, and would you buy the product after it?"
    rows, held_out = ([row | {"prompt": instruction} for row in part] for part in (sample(0, 40), sample(40, 46)))
    rows[2] |= {"chosen": held_out[1]["chosen"]}
    assert reasons(rows, held_out, tmp_path) == {2: "contamination: chosen is a response of the evaluation set"}
    rows, held_out = sample(0, 40), sample(40, 46)
    for k in (0, 1, 2, 3, 4):
        rows[k] |= {"rejected": "I do not know."}
    held_out[0] |= {"rejected": "I do not know."}
    assert reasons(rows, held_out, tmp_path) == {}


def test_a_prompt_with_many_pairs_is_an_overlap(tmp_path: Path) -> None:
    """Five prompts of twenty pairs: the prompt of the evaluation set is a fifth of all pairs, not common to them."""
    rows = [
        pair(f"Tell me at length about {TOPICS[k % 5]} and of nothing else at all", f"{t} is {k}.", f"No {k}.", f"{k}")
        for k, t in enumerate([*TOPICS, *TOPICS[:40]])
    ]  # fmt: skip
    found = reasons(rows, [pair(rows[0]["prompt"], "one", "two")], tmp_path)
    assert set(found) == set(range(0, 100, 5)) and set(found.values()) == {
        "contamination: prompt is one of the evaluation set"
    }


def test_held_out_file_of_the_command(tmp_path: Path) -> None:
    """`align filter --held-out` reads prompts and responses of the file."""
    rows, held_out = sample(0, 12), sample(12, 14)
    rows[3] |= {"chosen": held_out[0]["chosen"]}
    rows[4] |= {"prompt": held_out[1]["prompt"]}
    for name, part in (("pairs", rows), ("held_out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    np.save(tmp_path / "e.npy", unit(12, 8))
    settings = FilterSection(
        keep=1.0, embeddings=str(tmp_path / "e.npy"), held_out=str(tmp_path / "held_out.jsonl"), margin=0.0
    )
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"))
    filter_source(source, settings, tmp_path / "out", seed=0, cache=tmp_path / "parts")
    assert pq.read_table(tmp_path / "out" / "dropped.parquet")["reason"].to_pylist() == [
        "contamination: chosen is a response of the evaluation set",
        "contamination: prompt is one of the evaluation set",
    ]
