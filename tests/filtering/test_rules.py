"""Hard rules, against comparing all pairs."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from align.filtering import equal_keys as keys
from align.filtering.held_out import HeldOut
from align.filtering.rules import RULES, RuleInput, apply_rules, by_id, length_bias
from align.filtering.text_survey import SurveyJob, part_shingles, take_survey
from tests.filtering.samples import pair


def table(
    rows: list[dict[str, Any]], folder: Path, *, held_out: Sequence[dict[str, Any]] = (), **more: Any
) -> RuleInput:
    pairs = Dataset.from_list(
        [row | {"id": f"{row['id']}{k if row['id'] == 'x' else ''}"} for k, row in enumerate(rows)]
    )
    known = HeldOut.of(held_out)
    asked = SurveyJob(known.runs, near=True, language=more.get("language") is not None)
    return RuleInput(pairs, by_id(pairs), take_survey(pairs, asked, folder), held_out=known, **more)


TRIPLES = st.tuples(st.sampled_from("pq"), st.sampled_from("abc"), st.sampled_from("abc"))


@settings(max_examples=40)
@given(st.lists(TRIPLES, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_repeated_and_opposite_pairs_against_comparing_all(
    tmp_path_factory: pytest.TempPathFactory, triples: list[tuple[str, str, str]], rng: random.Random
) -> None:
    """Every pair with every other, in the order of their ids; the block size changes nothing."""
    names = rng.sample([f"{k:02d}" for k in range(len(triples))], len(triples))
    rows = [pair(*one, name) for one, name in zip(triples, names, strict=True)]
    skip = [name for name in RULES if name not in ("same_text", "contradiction", "duplicate", "near_duplicate")]
    made = table(rows, tmp_path_factory.mktemp("rules"))
    found = apply_rules(made, skip)
    expected: dict[int, tuple[str, str]] = {}
    by_name = sorted(range(len(triples)), key=names.__getitem__)
    left = [k for k in by_name if triples[k][1] != triples[k][2]]
    opposite = {k: [n for n in left if triples[n] == (triples[k][0], triples[k][2], triples[k][1])] for k in left}
    same = {k: [n for n in left if triples[n] == triples[k]] for k in left}
    for k in left:
        own, other = len(same[k]), len(opposite[k])
        if other >= own:
            votes = f" ({other} pairs say the opposite, {own} this)" if other + own > 2 else ""
            expected[k] = ("contradiction", f"the opposite of {names[opposite[k][0]]}{votes}")
    left = [k for k in left if k not in expected]
    for k in left:
        first = next(n for n in left if triples[n] == triples[k])
        if first != k:
            expected[k] = ("duplicate", f"same as {names[first]}")
    assert {k: what for k, what in found.items() if what[0] not in ("same_text", "near_duplicate")} == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "BLOCK", 2)
        patch.setattr("align.data.minhash.CHECKED", 1)
        assert apply_rules(made, skip) == found


@pytest.mark.parametrize(
    ("rule", "rows", "found"),
    [
        ("same_text", [pair("p", "Yes  it is", "yes it\nis"), pair("p", "yes", "no")], {0}),
        ("duplicate", [pair("p", "a", "b", "z"), pair("P", "a ", "b", "y"), pair("p", "a", "c", "w")], {0}),
        ("contradiction", [pair("p", "a", "b", "1"), pair("p", "b", "a", "2"), pair("q", "b", "a", "3")], {0, 1}),
        ("contradiction", [pair("p", "a", "b", "1"), pair("q", "a", "b", "2")], set()),
        ("contradiction", [*(pair("p", "a", "b", f"{k}") for k in range(9)), pair("P", "b", "a", "9")], {9}),
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
    overlap = apply_rules(table(rows, tmp_path / "3", held_out=[pair(leak, "one", "two")]), ["near_duplicate"])
    finding = "prompt shares with the evaluation set: word3 word4 word5 word6 word7 word8 word9 word10"
    assert overlap == {0: ("contamination", finding), 1: ("contamination", finding)}


def test_pairs_on_one_long_text_are_not_nearly_the_same(tmp_path: Path) -> None:
    """Other responses, or another question, are another pair; a near copy among them is found behind many others."""
    text = " ".join(f"word{k}" for k in range(700))
    answer = " ".join(f"part{k}" for k in range(60))
    rows = [
        pair(f"{text} question {k} ?", f"{answer} {k} a b c", f"number {k} is not at all in this text", f"{k:02d}")
        for k in range(30)
    ]
    for row in rows:
        row["chosen"] = " ".join(f"{row['id']}{word}" for word in row["chosen"].split())
        row["rejected"] = " ".join(f"{row['id']}{word}" for word in row["rejected"].split())
    rows.append(rows[29] | {"id": "30", "chosen": rows[29]["chosen"] + " indeed"})
    rows.append(rows[0] | {"id": "31", "prompt": "what else is there to see in this town ?"})
    rows.append(rows[0] | {"id": "32", "rejected": "another answer"})
    assert apply_rules(table(rows, tmp_path)) == {30: ("near_duplicate", "nearly the same as 29")}


def test_texts_without_a_word_are_compared_by_their_characters() -> None:
    found = part_shingles(pa.array(["?!", "a b", "...", "?!"]))
    assert found.counts.tolist() == [1, 1, 1, 1]
    assert found.row(0) == found.row(3) != found.row(2)
    assert found.row(1) == part_shingles(pa.array(["a b"])).row(0)


def test_a_duplicate_of_a_dropped_pair_stays(tmp_path: Path) -> None:
    """The pair with the smaller id is dropped for its personal data, so its clean near-copy is kept."""
    text = " ".join(f"word{k}" for k in range(200))
    rows = [pair(text + " jo@example.org", "yes", "no", "a"), pair(text, "yes", "no", "b")]
    assert {k: rule for k, (rule, _) in apply_rules(table(rows, tmp_path)).items()} == {0: "pii"}


def test_language(tmp_path: Path) -> None:
    english = "This film was a delight from the beginning to the very end."
    german = "Dieser Film war von Anfang bis Ende eine wunderbare Freude."
    rows = [pair("p", english, german), pair("p", english, english + " Truly."), pair("p", "ok", "oui, bien")]
    found = apply_rules(table(rows, tmp_path, language="en"), ["near_duplicate"])
    assert found == {0: ("language", "rejected reads as 'de', expected 'en'")}


def test_rules_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    base = " ".join(f"word{k}" for k in range(100))
    rows = [pair(f"{base} {k // 3}", f"answer {k // 2}", "no", f"{k:02d}") for k in range(20)]
    rows += [pair(row["prompt"], row["rejected"], row["chosen"], "y" + row["id"]) for row in rows[:3]]
    first = {rows[k]["id"]: finding for k, finding in apply_rules(table(rows, tmp_path / "1")).items()}
    turned = rows[::-1]
    second = {turned[k]["id"]: finding for k, finding in apply_rules(table(turned, tmp_path / "2")).items()}
    assert first == second and len({rule for rule, _ in first.values()}) == 3


def test_length_bias() -> None:
    assert length_bias(np.array([[1, 3, 1], [1, 2, 1], [1, 1, 1]])) == 1.0
    assert length_bias(np.array([[1, 3, 1], [1, 1, 2]]), np.array([1])) == 0.0
    assert length_bias(np.array([[1, 1, 1]])) == 0.5
