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
from align.filtering.personal_data import MAYBE_PERSONAL, PERSONAL, luhn, personal
from align.filtering.text_survey import SurveyJob, shingles, take_survey
from tests.filtering.samples import pair


@given(st.sampled_from([kind.pattern for kind in PERSONAL.values()]).flatmap(st.from_regex))
def test_the_prefilter_for_personal_data_misses_nothing(text: str) -> None:
    """Only texts that pass it are searched with the patterns."""
    assert not personal(text) or pc.match_substring_regex(pa.array([text]), MAYBE_PERSONAL)[0].as_py()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("e-mail address", "write to jo.li+x@mail.example.org."),
        ("card number", "4111 1111 1111 1111"), ("card number", "5500-0000-0000-0004"),
        ("card number", "my card 378282246310005, ok"), ("card number", "3782 822463 10005"),
        ("card number", "30569309025904"),
        ("phone number", "555-010-9999"), ("phone number", "call 555.123.4567."), ("phone number", "(555) 123-4567"),
        ("phone number", "1-555-123-4567"), ("phone number", "tel. 555 123 4567"), ("phone number", "tel:212-555-0188"),
        ("international phone number", "call +33 6 12 34 56 78"), ("international phone number", "+49 30 1234567"),
        ("international phone number", "(+4930123456)"), ("international phone number", "+44 (0)20 7946 0958"),
        ("international phone number", "0049 30 1234567"), ("international phone number", "+1-555-123-4567"),
        ("international phone number", "+86 138 1234 5678!"), ("international phone number", "+41 44/668.18.00"),
        ("social security number", "078-05-1120"),
        ("IP address", "from 203.0.113.77:8080"), ("IP address", "http://192.168.1.20/x"), ("IP address", "10.0.0.5."),
    ],
)  # fmt: skip
def test_personal_data_is_found(kind: str, text: str) -> None:
    found = personal(text)
    assert [name for bit, name in enumerate(PERSONAL) if found >> bit & 1] == [kind]
    assert pc.match_substring_regex(pa.array([text]), MAYBE_PERSONAL)[0].as_py()


@pytest.mark.parametrize(
    "text",
    [
        "1 2 3 4 5 6 7 8 9 10 11 12", "1609459200000", "1700000000123", "20240131123000", "ISBN 978-3-16-148410-0",
        "9783161484100", "0-306-40615-2", "3.141592653589793", "+3.14159265358979", "0.4111111111111111",
        "1024 2048 4096 8192", "2048 4096 8192 16384", "4111 1111 1111 1112", "100 200 300", "192 168 100",
        "200 300 4000", "512 640 1024 2048", "git@github.com:a/b", "ssh://git@example.org/a/b.git", "icon@2x.png",
        "a @ b.T", "2 + 2 = 4, see 12-34, in 1984", "2024-01-31T12:30:00+01:00", "1,000,000,000", "10 +12345678",
        "version 10.2.3.4", "v10.2.3.4", "1.2.3.4", "1.2.3.4.50", "127.0.0.1", "255.255.255.0", "300.1.2.3",
        "x - 123-456 = 12", "550e8400-e29b-41d4-a716-446655440000", "0123456789", "1e+10000000000",
    ],
)  # fmt: skip
def test_other_numbers_are_not_personal(text: str) -> None:
    assert personal(text) == personal(f"It is {text} .") == 0


@given(st.integers(0, 10**18))
def test_luhn_digit(number: int) -> None:
    """Of the ten last digits one passes; a changed digit does not."""
    passing = [digit for digit in range(10) if luhn(f"{number}{digit}")]
    assert len(passing) == 1
    assert not luhn(f"{number}{passing[0]}"[:-2] + str((number + 1) % 10) + str(passing[0]))


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
