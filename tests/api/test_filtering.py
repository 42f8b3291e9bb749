"""``filter_pairs``: what the command writes, as tables; rules by name; what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from align.api import filter_pairs
from align.commands.filter import filter_source
from align.config import FilterSection, PairsSection
from align.errors import AlignError, ConfigError, DataError
from align.filtering.filter_pairs import TooFewPass
from tests.api.test_pair_tables import in_python
from tests.filtering.samples import unit

WORDS = ["ships", "bread", "stars", "chess", "rivers", "paint", "bees", "trains", "snow", "maps"]
TABLE: list[dict[str, Any]] = [
    {"prompt": f"question {k} on {w}", "chosen": f"{w} is {k}", "rejected": f"no {w} {k}", "margin": 3.0 - k / 2}
    for k, w in enumerate(WORDS)
]
TABLE[3] = TABLE[3] | {"rejected": "CHESS is 3"}
VECTORS = unit(10, 4)


def test_tables_and_page_are_those_of_the_command(tmp_path: Path) -> None:
    table = [row | {"stars": k, "meta": {f"k{k}": None}} for k, row in enumerate(TABLE)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    np.save(tmp_path / "e.npy", VECTORS)
    settings = FilterSection(keep=0.4, embeddings=str(tmp_path / "e.npy"))
    filter_source(
        PairsSection(path=str(tmp_path / "pairs.jsonl")), settings, tmp_path / "out", seed=0, cache=tmp_path / "parts"
    )
    found = filter_pairs(table, keep=0.4, embeddings=VECTORS)
    assert {row["stars"]: row["meta"] for row in (*found.kept, *found.dropped)}[7] == {"k7": None}
    for name, table in (("kept", found.kept), ("dropped", found.dropped)):
        assert table.to_list() == Dataset(pq.read_table(tmp_path / "out" / f"{name}.parquet")).to_list()
    assert found.summary["kept"] == len(found.kept) == 4 and found.summary["dropped_by_rule"] == {"same_text": 1}
    again = filter_pairs(Dataset.from_list(TABLE), keep=0.4, embeddings=VECTORS, cache=tmp_path / "cache")
    assert again.kept["id"][:] == found.kept["id"][:] and any((tmp_path / "cache").iterdir())
    found.write_page(tmp_path / "pages" / "filter.html")
    assert "same_text" in (tmp_path / "pages" / "filter.html").read_text()


def test_every_pair_is_explained() -> None:
    found = filter_pairs(TABLE, keep=0.4, embeddings=VECTORS)
    reasons = {row["prompt"]: found.explain(row["id"]).get("reason") for row in [*found.kept, *found.dropped]}
    assert reasons["question 3 on chess"].startswith("same_text: ")
    assert [reasons[row["prompt"]] for row in found.kept] == [None] * 4
    assert sum(reason is not None and reason.startswith("top: importance") for reason in reasons.values()) == 5
    with pytest.raises(DataError, match="no pair has id 'nobody'"):
        found.explain("nobody")


def test_rules_are_chosen_by_name() -> None:
    """Named rules alone are applied; none with None; label_noise only where it is named."""
    copies = [*TABLE, TABLE[0] | {"rejected": TABLE[0]["rejected"].upper()}]
    doubtful = [row | ({"margin": -40.0} if k == 5 else {}) for k, row in enumerate(copies)]
    vectors = np.concatenate([VECTORS, VECTORS[:1]])

    def dropped(rules: Any) -> dict[str, int]:
        found = filter_pairs(doubtful, keep=1.0, rules=rules, embeddings=vectors)
        counts: dict[str, int] = found.summary["dropped_by_rule"]
        return counts

    assert dropped(()) == {"same_text": 1, "duplicate": 1}
    assert dropped(["duplicate"]) == {"duplicate": 1}
    assert dropped(["same_text", "label_noise"]).keys() == {"same_text", "label_noise"}
    assert dropped(None) == {}


def test_pairs_of_an_evaluation_are_dropped() -> None:
    held_out = [{"prompt": "QUESTION 2 on stars", "chosen": "another", "rejected": "one"}]
    found = filter_pairs(TABLE, keep=1.0, embeddings=VECTORS, held_out=held_out)
    assert found.summary["dropped_by_rule"] == {"same_text": 1, "contamination": 1}


def test_a_score_of_your_own_counts_as_the_margin_does() -> None:
    """A score that equals the margin selects what the margin selects, with the same importance, in all methods."""
    bare = [{name: value for name, value in row.items() if name != "margin"} for row in TABLE]
    margins = np.array([row["margin"] for row in TABLE])

    def words(found: Any) -> dict[str, float]:
        return {row["prompt"]: row["importance"] for row in found.kept}

    for method in ("top", "greedy"):
        settings: dict[str, Any] = {"keep": 0.4, "embeddings": VECTORS, "method": method}
        by_margin = filter_pairs(TABLE, **settings, weights={"margin": 0.7, "quality": 0.2})
        array = filter_pairs(bare, **settings, scores={"lead": margins}, weights={"lead": 0.7, "quality": 0.2})
        called = filter_pairs(
            TABLE, **settings, scores={"lead": lambda ds: ds["margin"]}, weights={"lead": 0.7, "margin": 0}, quality=0.2
        )
        assert words(by_margin) == words(array) == words(called) and len(array.kept) == 4
        assert words(by_margin) != words(filter_pairs(bare, **settings, weights={"quality": 0.2}))
        assert words(by_margin) != words(filter_pairs(TABLE, **settings, quality=0.2))
        rows = [*array.kept, *array.dropped]
        assert {row["prompt"]: row["lead"] for row in rows} == {row["prompt"]: row["margin"] for row in TABLE}


def test_a_score_of_your_own_is_a_reason() -> None:
    """The pairs with the lowest score are dropped because of it; without a margin nothing else is said to decide."""
    low = np.where(np.arange(10) < 5, -100.0, 0.0)
    found = filter_pairs(TABLE, keep=0.5, embeddings=VECTORS, scores={"taste": low}, weights={"taste": 50.0})
    reasons = {row["prompt"]: row["reason"] for row in found.dropped}
    assert all(reasons[TABLE[k]["prompt"]].endswith("lowest term taste") for k in (0, 1, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "kind", "code", "words"),
    [
        ({"rules": ["duplicates"]}, ConfigError, "filter-option", "no rule 'duplicates' (did you mean `duplicate`?)"),
        ({"keep": 0.0}, ConfigError, "filter-option", "keep: found 0.0"),
        ({"keep": 0.5, "method": "threshold"}, ConfigError, "filter-option", "keep: found method threshold"),
        ({"methods": "top"}, ConfigError, "filter-option", "methods: not an argument (did you mean `method`?)"),
        ({"skip": ["duplicate"]}, ConfigError, "filter-option", "skip: not an argument; give rules"),
        ({"per_group": True}, ConfigError, "filter-option", "the pairs have no `group` column"),
        ({"rules": ["length"], "held_out": TABLE}, ConfigError, "filter-option", "found the rule contamination"),
        ({"embeddings": VECTORS[:3]}, DataError, "filter-embeddings", "embeddings: found float32 of shape (3, 4)"),
        ({"embeddings": 2 * VECTORS}, DataError, "filter-embeddings", "embeddings:row 1: found a vector of length 2"),
        ({"method": "threshold", "keep": None, "minimum": 99.0}, DataError, "filter-empty", "minimum: found no pair"),
        ({"scores": {"margin": VECTORS[:, 0]}}, ConfigError, "filter-option", "scores: found the name 'margin'"),
        ({"scores": {"quality_x": VECTORS[:, 0]}}, ConfigError, "filter-option", "scores: found the name 'quality_x'"),
        ({"scores": [VECTORS[:, 0]]}, ConfigError, "filter-option", "scores: found [array("),
        ({"weights": {"lead": 1.0}}, ConfigError, "filter-option", "weights: no score 'lead'; scores are margin, "),
        ({"weights": {"margin": "1"}}, ConfigError, "filter-option", "weights: margin: found '1', expected a finite"),
        ({"weights": {"margin": 1}, "margin": 2}, ConfigError, "filter-option", "found it as an argument too"),
        ({"scores": {"lead": VECTORS[:3, 0]}}, DataError, "filter-score", "lead: found an array of shape (3,)"),
        ({"scores": {"lead": [*range(9), np.nan]}}, DataError, "filter-score", "lead: found nan for row 9"),
        ({"scores": {"lead": len}}, DataError, "filter-score", "lead: found an array of shape ()"),
        ({"scores": {"lead": ["a"] * 10}}, DataError, "filter-score", "lead: found a list that holds no numbers"),
        ({"pairs": []}, DataError, "data-empty", "pairs: holds no rows"),
        ({"pairs": [{"prompt": "x"}]}, DataError, "data-column", "no column 'chosen'"),
        ({"pairs": [*TABLE[:2], TABLE[4] | {"margin": None}]}, DataError, "filter-margin", "1 of 3 pairs have none"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: dict[str, Any], kind: type[AlignError], code: str, words: str) -> None:
    with pytest.raises(kind) as caught:
        filter_pairs(**({"pairs": TABLE, "embeddings": VECTORS} | arguments))
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


def test_too_few_pairs_pass() -> None:
    same = [row | {"rejected": row["chosen"].upper()} for row in TABLE[:3]]
    with pytest.raises(TooFewPass, match="found 0 of 3 pairs that pass the rules") as caught:
        filter_pairs(same, embeddings=VECTORS[:3])
    assert {rule for rule, _ in caught.value.broken.values()} == {"same_text"} and "`broken`" in caught.value.hint
