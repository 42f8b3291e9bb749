"""docs/data.md: every row that stands there is read, in the shape that the page says."""

import json
import re
from pathlib import Path

import pytest

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.response_table import SHAPES, Shape, read_responses

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


def rows_of(shape: str) -> str:
    found = re.search(rf"^`{shape}`[^`]*?.*?```json\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no row of the shape {shape}"
    return found[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_row_of_each_shape_is_read_as_that_shape(shape: Shape, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(rows_of(shape), encoding="utf-8")
    source = PairsSection(path=str(file))
    told, named = read_responses(source), read_responses(source, shape=shape)
    assert told == named
    assert len(told.prompts) == len(rows_of(shape).splitlines())
    assert all(one.text for prompt in told.prompts for one in prompt.responses)


def test_rows_of_pairs_are_read(tmp_path: Path) -> None:
    pairs = [json.loads(block) for block in BLOCKS if '"chosen"' in block and "\n{" not in block]
    assert len(pairs) >= 3
    for k, pair in enumerate(pairs):
        file = tmp_path / f"{k}.jsonl"
        file.write_text(json.dumps(pair) + "\n", encoding="utf-8")
        assert len(load_pairs(PairsSection(path=str(file)))) == 1
