"""Messages as text: the same for everything that reads them; words are counted in contents."""

from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset

from align.data.text import column, count_words, plain, texts, words

USER = {"role": "user", "content": "Is it raining in Bergen?"}
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bergen"}}}]
TEXTS: list[tuple[Any, str]] = [
    ("as it is: ", "as it is: "),
    ([USER], "Is it raining in Bergen?"),
    ([{"role": "assistant", "content": "Yes."}], "Yes."),
    ([{"role": "assistant", "content": ""}], ""),
    ([{"role": "system", "content": "Be brief."}], "system: Be brief."),
    ([{"role": "system", "content": "Be brief."}, USER], "system: Be brief.\nuser: Is it raining in Bergen?"),
    (
        [{"content": "Yes.", "reasoning_content": "It always does.", "role": "assistant", "name": None}],
        "Yes.\nreasoning_content: It always does.",
    ),
    (
        [
            {"role": "assistant", "content": "", "tool_calls": CALLS},
            {"role": "tool", "content": "rain", "name": "weather"},
        ],
        'assistant: \ntool_calls: [{"function": {"arguments": {"city": "Bergen"}, "name": "weather"}, '
        '"type": "function"}]\ntool: rain\nname: weather',
    ),
]


@pytest.mark.parametrize(("part", "text"), TEXTS)
def test_messages_as_text(part: Any, text: str) -> None:
    assert plain(part) == text


def test_a_message_reads_the_same_whatever_else_its_column_holds() -> None:
    """Arrow gives each struct the keys of all others; here the row of the calls has one argument, the other another."""
    one = [{"role": "assistant", "content": "", "tool_calls": CALLS}]
    other = [{"role": "assistant", "content": "", "name": "b", "tool_calls": [{"function": {"name": "time"}}]}]
    alone, together = pa.array([one]), pa.array([one, other])
    assert alone.type != together.type
    assert column(pa.chunked_array([together])).to_pylist() == [plain(one), plain(other)]
    assert column(pa.chunked_array([alone])).to_pylist() == [plain(one)]


def test_the_texts_of_pairs_stand_in_turn() -> None:
    table = {"prompt": ["p", "q"], "chosen": ["a", "b"], "rejected": ["c", "d"]}
    assert texts(Dataset.from_dict(table)).to_pylist() == ["p", "a", "c", "q", "b", "d"]
    assert texts(Dataset.from_dict(table), 1).to_pylist() == ["q", "b", "d"]


def test_words() -> None:
    """Roles and calls are no words of a response; a list of words has no punctuation, a count has it in its word."""
    assert words("It's RAINING - again.") == ["it", "s", "raining", "again"]
    assert count_words("It's RAINING - again.") == 4
    talk = [{"role": "assistant", "content": "One two.", "tool_calls": CALLS}, {"role": "user", "content": "three"}]
    assert count_words(talk) == 3 and count_words("") == count_words([]) == 0
