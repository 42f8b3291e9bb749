"""Words, runs, MinHash, the screen and the hard rules; against Python's own sets and datasketch."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from datasets import Dataset
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from align.data.text import texts
from align.filtering import equal_keys as keys
from align.filtering.minhash import BANDS, ROWS, band_keys, candidates, jaccard, near_duplicates
from align.filtering.rules import RULES, Table, apply_rules, by_id, length_bias
from align.filtering.screen import screen
from align.filtering.text_survey import (
    MAYBE_PERSONAL,
    PERSONAL,
    Asked,
    overlap_hashes,
    personal,
    shingles,
    take_survey,
)
from align.filtering.word_hashes import Hashes, distinct, runs, tokenise, word_list
from align.sharding.arrays import as_table, map_arrays
from align.sharding.jobs import Work

WORDS = st.lists(st.sampled_from(["a", "bee", "Cat", "dog,", "élan", "猫", "x_1"]), max_size=12)


def pair(prompt: str, chosen: str, rejected: str, name: str = "x") -> dict[str, Any]:
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected}


def table(rows: list[dict[str, Any]], folder: Path, *, held_out: tuple[str, ...] = (), **more: Any) -> Table:
    pairs = Dataset.from_list(
        [row | {"id": f"{row['id']}{k if row['id'] == 'x' else ''}"} for k, row in enumerate(rows)]
    )
    asked = Asked(overlap_hashes(held_out), near=True, language=more.get("language") is not None)
    return Table(pairs, by_id(pairs), take_survey(pairs, asked, folder), held_out=held_out, **more)


@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 5))
def test_words_and_runs_are_those_of_python(rows: list[list[str]], size: int) -> None:
    """Equal words have equal hashes, runs never cross a row, short rows are one run."""
    strings = pa.array([" ".join(row) for row in rows], type=pa.string())
    words, found = tokenise(strings), runs(tokenise(strings), size)
    expected = [word_list(" ".join(row)) for row in rows]
    assert words.counts.tolist() == [len(row) for row in expected]
    truth = [
        [tuple(row[k : k + size]) for k in range(len(row) - size + 1)] or ([tuple(row)] if row else [])
        for row in expected
    ]
    assert found.counts.tolist() == [len(row) for row in truth]
    flat = [run for row in truth for run in row]
    same = {(a, b) for a in range(len(flat)) for b in range(len(flat)) if flat[a] == flat[b]}
    assert same == {(a, b) for a in range(len(flat)) for b in range(len(flat)) if found.values[a] == found.values[b]}
    assert distinct(found).tolist() == [len(set(row)) for row in truth]


def test_words_do_not_depend_on_what_lies_behind_the_text_in_memory() -> None:
    """Arrow's own splitting at white space does where texts end in some and fill a block of 64 bytes."""
    for _ in range(100):
        words = tokenise(pa.array(["x" * 31 + ".", "x" * 31 + "."]))
        assert words.counts.tolist() == [1, 1] and len(set(words.values)) == 1


def test_words_of_several_scripts() -> None:
    assert word_list("Don't STOP, l'été_2 — नमस्ते") == ["don", "t", "stop", "l", "été_2", "नमस्ते"]
    assert word_list("東京は夜") == ["東", "京", "は", "夜"] and word_list(" .,; ") == []


def test_signatures_agree_as_often_as_sets_are_similar() -> None:
    """The share of equal minima estimates the Jaccard similarity; datasketch estimates the same number."""
    rng = np.random.default_rng(0)
    for shared in (20, 60, 90):
        first = rng.integers(0, 2**63, size=100, dtype=np.uint64)
        second = np.concatenate([first[:shared], rng.integers(0, 2**63, size=100 - shared, dtype=np.uint64)])
        truth = shared / (200 - shared)
        assert jaccard(np.unique(first), np.unique(second)) == pytest.approx(truth)
        sketches = []
        for values in (first, second):
            sketch = MinHash(num_perm=256)
            sketch.update_batch([value.tobytes() for value in values])
            sketches.append(sketch)
        assert sketches[0].jaccard(sketches[1]) == pytest.approx(truth, abs=0.12)
        collided = []
        for _ in range(60):
            salt = np.uint64(rng.integers(0, 2**63)) | np.uint64(1)
            values = np.concatenate([first, second]) * salt
            keys = band_keys(Hashes(values, np.array([0, 100, 200])))
            collided.append((keys[0] == keys[1]).mean())
        assert np.mean(collided) == pytest.approx(truth**ROWS, abs=0.05)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 99))
def test_candidates_are_the_pairs_with_a_shared_band(values: list[int], seed: int) -> None:
    keys = np.random.default_rng(seed).integers(0, 15, size=(len(values), 2)).astype(np.uint64)
    found = {tuple(row) for row in candidates(keys.T).tolist()}
    truth = {(a, b) for b in range(len(values)) for a in range(b) if (keys[a] == keys[b]).any()}
    assert found <= truth
    if max(Counter(keys[:, 0].tolist()).values()) <= 8 and max(Counter(keys[:, 1].tolist()).values()) <= 8:
        assert found == truth


def test_near_duplicates_of_what_is_kept() -> None:
    """A chain a ~ b ~ c in which a and c differ: b goes, c stays, for it is compared with what is kept."""
    base = np.arange(1, 109, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sets = [base[:100], base[4:104], base[8:108]]
    hashes = Hashes(np.concatenate(sets), np.cumsum([0, *map(len, sets)]))
    keys = np.zeros((3, BANDS), dtype=np.uint64)

    def of(rows: np.ndarray) -> Hashes:
        assert rows.tolist() == [0, 1, 2]
        return hashes

    a, b, c = map(np.unique, sets)
    assert jaccard(a, b) > 0.9 and jaccard(b, c) > 0.9 > jaccard(a, c)
    assert near_duplicates(keys.T, of, 0.9) == {1: 0}


@given(st.lists(st.integers(0, 9), max_size=30), st.lists(st.integers(0, 9), max_size=5), st.integers(1, 7))
def test_equal_keys(values: list[int], wanted: list[int], block: int) -> None:
    """Against counting, whatever the rows looked at together."""
    array = np.array(values, dtype=np.uint64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "BLOCK", block)
        assert keys.repeated(array).tolist() == [values.count(value) > 1 for value in values]
        sought = np.unique(np.array(wanted, dtype=np.uint64))
        assert keys.among(array, sought).tolist() == [value in wanted for value in values]
        two = np.stack([array, array[::-1]], axis=1)
        assert np.array_equal(keys.one_key(two, (0, 1)), keys.one_key(two[:, ::-1], (1, 0)))
        assert len(np.unique(keys.one_key(two, (0, 1)))) == len({tuple(row) for row in two.tolist()})


SAYS = st.tuples(st.sampled_from("pq"), st.sampled_from("abc"), st.sampled_from("abc"))


@settings(max_examples=40)
@given(st.lists(SAYS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_repeated_and_opposite_pairs_against_comparing_all(
    tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, str]], rng: random.Random
) -> None:
    """Of all pairs with all, in the order of their ids; the same where little is in memory at a time."""
    names = rng.sample([f"{k:02d}" for k in range(len(said))], len(said))
    rows = [pair(*one, name) for one, name in zip(said, names, strict=True)]
    skip = [name for name in RULES if name not in ("same_text", "contradiction", "duplicate", "near_duplicate")]
    made = table(rows, tmp_path_factory.mktemp("rules"))
    found = apply_rules(made, skip)
    expected: dict[int, tuple[str, str]] = {}
    by_name = sorted(range(len(said)), key=names.__getitem__)
    left = [k for k in by_name if said[k][1] != said[k][2]]
    opposite = {k: [n for n in left if said[n] == (said[k][0], said[k][2], said[k][1])] for k in left}
    expected |= {k: ("contradiction", f"the opposite of {names[other[0]]}") for k, other in opposite.items() if other}
    left = [k for k in left if not opposite[k]]
    for k in left:
        first = next(n for n in left if said[n] == said[k])
        if first != k:
            expected[k] = ("duplicate", f"same as {names[first]}")
    assert {k: what for k, what in found.items() if what[0] not in ("same_text", "near_duplicate")} == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "BLOCK", 2)
        patch.setattr("align.filtering.minhash.CHECKED", 1)
        assert apply_rules(made, skip) == found


def test_the_screen_against_counting() -> None:
    strings = ["A clear and simple answer.", "again and again and again and again and", "@@##$$ 12", "", "日本語です"]
    found = screen(pa.array(strings))
    for text, value in zip(strings, found, strict=True):
        letters = sum(c.isalpha() or c.isspace() for c in text) / max(len(text), 1)
        tokens = word_list(text)
        three = [tuple(tokens[k : k + 3]) for k in range(len(tokens) - 2)]
        assert value == pytest.approx(letters * (len(set(three)) / len(three) if three else 1.0))
    assert found[0] > max(found[1], found[2])


@pytest.mark.parametrize(
    ("rule", "rows", "found"),
    [
        ("same_text", [pair("p", "Yes  it is", "yes it\nis"), pair("p", "yes", "no")], {0}),
        ("duplicate", [pair("p", "a", "b", "z"), pair("P", "a ", "b", "y"), pair("p", "a", "c", "w")], {0}),
        ("contradiction", [pair("p", "a", "b", "1"), pair("p", "b", "a", "2"), pair("q", "b", "a", "3")], {0, 1}),
        ("contradiction", [pair("p", "a", "b", "1"), pair("q", "a", "b", "2")], set()),
        ("length", [pair("p", "...", "b"), pair("p", "a", "b"), pair("p", "a", "b " * 9)], {0, 2}),
        (
            "pii",
            [
                pair("write to jo@example.org", "a", "b"), pair("call", "555-010-9999", "b"), pair("p", "a", "b"),
                pair("p", "4111 1111 1111 1111", "b"), pair("in 1984", "2 + 2 = 4", "see 12-34"), pair("a@b", "b", "c"),
            ],
            {0, 1, 3},
        ),
    ],
)  # fmt: skip
def test_rules(rule: str, rows: list[dict[str, Any]], found: set[int], tmp_path: Path) -> None:
    made = table(rows, tmp_path, longest=8)
    assert set(RULES[rule](made, np.ones(len(rows), dtype=bool))) == found
    assert set(RULES[rule](made, np.zeros(len(rows), dtype=bool))) == set()


@given(st.sampled_from(list(PERSONAL.values())).flatmap(st.from_regex))
def test_the_quick_look_for_personal_data_misses_nothing(text: str) -> None:
    """Only texts that pass it are looked at closely."""
    assert personal(text) and pc.match_substring_regex(pa.array([text]), MAYBE_PERSONAL)[0].as_py()


def test_near_duplicates_and_contamination(tmp_path: Path) -> None:
    text = " ".join(f"word{k}" for k in range(300))
    rows = [
        pair(text, "a good answer", "a bad answer", "b"),
        pair(text + " more", "a good answer", "a bad answer", "a"),
        pair("something else entirely here now", "yes of course", "no never at all", "c"),
    ]
    found = apply_rules(table(rows, tmp_path / "1"))
    assert found == {0: ("near_duplicate", "nearly the same as a")}
    assert apply_rules(table(rows, tmp_path / "2"), ["near_duplicate"]) == {}
    leak = "before word3 word4 word5 word6 word7 word8 word9 word10 z"
    overlap = apply_rules(table(rows, tmp_path / "3", held_out=(leak,)), ["near_duplicate"])
    said = "prompt shares with the evaluation set: word3 word4 word5 word6 word7 word8 word9 word10"
    assert overlap == {0: ("contamination", said), 1: ("contamination", said)}


def test_a_duplicate_of_a_dropped_pair_stays(tmp_path: Path) -> None:
    """The pair with the smaller id goes for its personal data; its clean near-copy is not dropped for its sake."""
    text = " ".join(f"word{k}" for k in range(200))
    rows = [pair(text + " jo@example.org", "yes", "no", "a"), pair(text, "yes", "no", "b")]
    assert {k: rule for k, (rule, _) in apply_rules(table(rows, tmp_path)).items()} == {0: "pii"}


def test_language(tmp_path: Path) -> None:
    english = "This film was a delight from the beginning to the very end."
    german = "Dieser Film war von Anfang bis Ende eine wunderbare Freude."
    rows = [pair("p", english, german), pair("p", english, english + " Truly."), pair("p", "ok", "oui, bien")]
    found = apply_rules(table(rows, tmp_path, language="en"), ["near_duplicate"])
    assert found == {0: ("language", "rejected reads as 'de', wanted is 'en'")}


def test_rules_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    base = " ".join(f"word{k}" for k in range(60))
    rows = [pair(f"{base} {k // 3}", f"answer {k // 2}", "no", f"{k:02d}") for k in range(20)]
    rows += [pair(row["prompt"], row["rejected"], row["chosen"], "y" + row["id"]) for row in rows[:3]]
    first = {rows[k]["id"]: said for k, said in apply_rules(table(rows, tmp_path / "1")).items()}
    turned = rows[::-1]
    second = {turned[k]["id"]: said for k, said in apply_rules(table(turned, tmp_path / "2")).items()}
    assert first == second and len({rule for rule, _ in first.values()}) == 3


def test_length_bias() -> None:
    assert length_bias(np.array([[1, 3, 1], [1, 2, 1], [1, 1, 1]])) == 1.0
    assert length_bias(np.array([[1, 3, 1], [1, 1, 2]]), np.array([1])) == 0.0
    assert length_bias(np.array([[1, 1, 1]])) == 0.5


def test_messages_read_as_their_text() -> None:
    rows = [pair("p", "a", "b")]
    chat = [
        {"id": "1", "prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]}
    ]  # fmt: skip
    assert texts(Dataset.from_list(rows)).to_pylist() == texts(Dataset.from_list(chat)).to_pylist() == ["p", "a", "b"]


class Squares:
    """Of numbers; stops at a row once."""

    def __init__(self, stop: int) -> None:
        self.stop, self.calls = stop, []  # type: ignore[var-annotated]

    def start(self) -> Work:
        return self.work

    def work(self, rows: Dataset) -> Dataset:
        start = rows["value"][0]
        if start == self.stop:
            self.stop = -1
            raise KeyboardInterrupt
        self.calls.append(start)
        values = np.array(rows["value"])
        return as_table({"square": values**2, "both": np.stack([values, -values], axis=1).astype(np.float32)})


def test_parts_are_not_done_again(tmp_path: Path) -> None:
    """Stopped in the middle, the work goes on with the part that is missing, and the result is the same."""
    rows, job = Dataset.from_dict({"value": list(range(35))}), Squares(20)
    with pytest.raises(KeyboardInterrupt):
        map_arrays(rows, job, tmp_path, what="test", rows=10)
    assert job.calls == [0, 10]
    found = map_arrays(rows, job, tmp_path, what="test", rows=10)
    assert job.calls == [0, 10, 20, 30]
    assert np.array_equal(found["square"], np.arange(35) ** 2) and found["square"].dtype == np.int64
    assert np.array_equal(found["both"], np.stack([np.arange(35), -np.arange(35)], axis=1))
    assert found["both"].dtype == np.float32 and isinstance(found["both"], np.memmap)
    assert map_arrays(rows, job, tmp_path, what="test", rows=10).keys() == found.keys() and len(job.calls) == 4
    assert [place.name for place in tmp_path.iterdir()] == ["columns"]


def test_survey_in_two_processes_is_the_survey_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        pair(f"prompt number {k}", f"answer {k % 7} jo@example.org", "no " * (k % 5 + 1), f"{k}") for k in range(40_000)
    ]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "pairs"))
    pairs = Dataset.load_from_disk(str(tmp_path / "pairs"))
    asked = Asked(np.empty(0, dtype=np.uint64), near=True, language=False)
    one = take_survey(pairs, asked, tmp_path / "one")
    two = take_survey(pairs, asked, tmp_path / "two", processes=2)
    for name in one.__slots__:
        assert np.array_equal(getattr(one, name), getattr(two, name))


def test_shingles_cross_the_parts_of_a_pair() -> None:
    found = shingles(pa.array(["a b", "c d", "e f", "a b c", "d", "e f"]))
    assert found.counts.tolist() == [2, 2] and np.array_equal(found.row(0), found.row(1))
