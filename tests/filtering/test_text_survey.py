"""The one pass over the texts that the rules need."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from align.data.text import texts
from align.filtering.text_survey import (
    MAYBE_PERSONAL,
    PERSONAL,
    SurveyJob,
    personal,
    shingles,
    take_survey,
)
from tests.filtering.samples import pair


@given(st.sampled_from(list(PERSONAL.values())).flatmap(st.from_regex))
def test_the_prefilter_for_personal_data_misses_nothing(text: str) -> None:
    """Only texts that pass it are searched with the patterns."""
    assert personal(text) and pc.match_substring_regex(pa.array([text]), MAYBE_PERSONAL)[0].as_py()


def test_messages_read_as_their_text() -> None:
    rows = [pair("p", "a", "b")]
    chat = [
        {"id": "1", "prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]}
    ]  # fmt: skip
    assert texts(Dataset.from_list(rows)).to_pylist() == texts(Dataset.from_list(chat)).to_pylist() == ["p", "a", "b"]


def test_survey_in_two_processes_is_the_survey_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        pair(f"prompt number {k}", f"answer {k % 7} jo@example.org", "no " * (k % 5 + 1), f"{k}") for k in range(40_000)
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "pairs"))
    pairs = Dataset.load_from_disk(str(tmp_path / "pairs"))
    asked = SurveyJob(np.empty(0, dtype=np.uint64), near=True, language=False)
    one = take_survey(pairs, asked, tmp_path / "one")
    two = take_survey(pairs, asked, tmp_path / "two", processes=2)
    for name in one.__slots__:
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_shingles_cross_the_parts_of_a_pair() -> None:
    found = shingles(pa.array(["a b", "c d", "e f", "a b c", "d", "e f"]))
    assert found.counts.tolist() == [2, 2] and np.array_equal(found.row(0), found.row(1))
