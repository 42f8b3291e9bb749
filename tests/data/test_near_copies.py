"""Near-copies on request: pairs whose texts nearly agree stay together in splits, folds and intervals."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from align import pairs_from_dataset
from align.config import PairsSection
from align.data.minhash import jaccard
from align.data.near_copies import NEAR, with_near_copies
from align.data.pairs import load_pairs
from align.data.splits import clusters_of, folds_by_prompt, split_by_prompt
from align.stats import share_interval
from tests.helpers.command_line import jsonl

VOCABULARY = [f"word{k}" for k in range(400)]


def text(generator: np.random.Generator, count: int = 24) -> list[str]:
    return [str(word) for word in generator.choice(VOCABULARY, count)]


def copied(words: list[str], generator: np.random.Generator) -> str:
    """The words with one of them exchanged."""
    place = int(generator.integers(len(words)))
    return " ".join([*words[:place], str(generator.choice(VOCABULARY)), *words[place + 1 :]])


def families(seed: int, count: int = 30, size: int = 4, where: str = "prompt") -> list[dict[str, Any]]:
    """``count`` families of ``size`` pairs: near-copies in one text, all else unique. An id begins with the family."""
    generator = np.random.default_rng(seed)
    rows = []
    for family in range(count):
        shared = text(generator)
        for member in range(size):
            texts = {name: " ".join(text(generator)) for name in ("prompt", "chosen", "rejected")}
            texts[where] = copied(shared, generator)
            rows.append({"id": f"{family}-{member}", **texts})
    return rows


def same(groups: np.ndarray, rows: list[dict[str, Any]]) -> bool:
    """Whether the groups are the families."""
    own = [row["id"].split("-")[0] for row in rows]
    return len({(int(a), b) for a, b in zip(groups, own, strict=True)}) == len(set(own)) == len(set(groups.tolist()))


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_families_are_the_clusters(where: str) -> None:
    rows = families(0, where=where)
    pairs = Dataset.from_list(rows)
    assert len(set(clusters_of(pairs).tolist())) == len(rows), "without asking, they are apart"
    assert same(clusters_of(with_near_copies(pairs)), rows)


def test_no_near_copy_is_in_two_folds_or_on_both_sides() -> None:
    rows = families(1)
    pairs = with_near_copies(Dataset.from_list(rows))
    folds = folds_by_prompt(pairs, 5, seed=3)
    for family in range(30):
        assert len(set(folds[4 * family : 4 * family + 4].tolist())) == 1
    train, held_out = split_by_prompt(pairs, 0.25, seed=0)
    sides = [{name.split("-")[0] for name in side["id"]} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1]) and len(held_out) in (28, 32)


def test_what_is_connected_is_what_brute_force_finds() -> None:
    """All pairs of texts by their exact similarity; random exchanges give similarities on both sides of the limit."""
    generator = np.random.default_rng(2)
    rows = []
    for family in range(40):
        shared = text(generator)
        for member in range(3):
            words = shared
            for _ in range(int(generator.integers(1, 4))):
                words = copied(words, generator).split()
            rows.append({"id": f"{family}-{member}", "prompt": " ".join(words), "chosen": "yes", "rejected": "no"})
    found = with_near_copies(Dataset.from_list(rows))["split_group"]

    def shingles(words: str) -> np.ndarray:
        split = words.split()
        return np.unique([hash(tuple(split[k : k + 3])) for k in range(len(split) - 2)])

    sets = [shingles(row["prompt"]) for row in rows]
    parent = list(range(len(rows)))

    def root(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for a in range(len(rows)):
        for b in range(a):
            if jaccard(sets[a], sets[b]) >= NEAR:
                parent[root(a)] = root(b)
    together = {(a, b) for a in range(len(rows)) for b in range(a) if root(a) == root(b)}
    ours = {(a, b) for a in range(len(rows)) for b in range(a) if found[a] is not None and found[a] == found[b]}
    assert 10 < len(together) < 120
    assert ours <= together and len(ours) >= 0.9 * len(together), "MinHash misses few of those at the limit"


def test_labels_of_coins_are_not_learned_from_near_copies() -> None:
    """A judge that remembers the label of the most similar training pair: 0.5 out of fold, if copies stay together."""
    hits: dict[bool, list[bool]] = {False: [], True: []}
    for seed in range(5):
        generator = np.random.default_rng(100 + seed)
        rows, labels = [], []
        for family in range(30):
            first, second, label = text(generator), text(generator), bool(generator.integers(2))
            for member in range(4):
                sides = [copied(first, generator), copied(second, generator)]
                chosen, rejected = sides if label else sides[::-1]
                rows.append({"id": f"{family}-{member}", "prompt": " ".join(text(generator)), "chosen": chosen,
                             "rejected": rejected})  # fmt: skip
                labels.append(label)
        for near in (False, True):
            pairs = pairs_from_dataset(rows, near_copies=near)
            folds = folds_by_prompt(pairs, 5, seed)
            liked = [set(text.split()) for text in pairs["chosen"]]
            disliked = [set(text.split()) for text in pairs["rejected"]]
            for fold in range(5):
                known = [k for k in range(len(rows)) if folds[k] != fold]
                for k in (k for k in range(len(rows)) if folds[k] == fold):
                    scores = [
                        max(len(side & liked[j]) for j in known) - max(len(side & disliked[j]) for j in known)
                        for side in (liked[k], disliked[k])
                    ]
                    hits[near].append(scores[0] > scores[1])
    clusters = np.arange(len(hits[True])) // 4
    kept = share_interval(hits[True], clusters=clusters)
    assert kept.low is not None and kept.high is not None and kept.low < 0.5 < kept.high
    assert np.mean(hits[False]) > 0.9, "apart, the coins are remembered"


def test_a_common_instruction_connects_nothing(caplog: pytest.LogCaptureFixture) -> None:
    generator = np.random.default_rng(4)
    instruction = "please read the following review of a film and say in one short sentence whether it is good or bad"
    rows = [
        {"id": str(k), "prompt": f"{instruction} {' '.join(text(generator, 6))}", "chosen": "good", "rejected": "bad"}
        for k in range(40)
    ]
    with caplog.at_level(logging.INFO):
        pairs = with_near_copies(Dataset.from_list(rows))
    assert pairs["split_group"] == [None] * 40 and "0 of 40 pairs are in 0 groups" in caplog.text
    assert len(set(clusters_of(pairs).tolist())) == 40


def test_short_responses_connect_nothing() -> None:
    rows = [{"id": str(k), "prompt": f"q{k} " + VOCABULARY[k], "chosen": "yes it is", "rejected": "no it is not"}
            for k in range(9)]  # fmt: skip
    assert with_near_copies(Dataset.from_list(rows))["split_group"] == [None] * 9


def test_a_column_of_the_users_own_keeps_its_pairs_together(tmp_path: Path) -> None:
    rows = [row | {"split_group": f"talk {k % 6}" if k < 12 else None} for k, row in enumerate(families(5, 12, 2))]
    pairs = pairs_from_dataset(rows)
    clusters = clusters_of(pairs)
    assert [len(set(clusters[k:12:6].tolist())) for k in range(6)] == [1] * 6 and len(set(clusters.tolist())) == 18
    both = clusters_of(with_near_copies(pairs))
    assert len(set(both.tolist())) == 9, "talks of two near-copies each are one"
    jsonl(tmp_path / "pairs.jsonl", rows)
    source = PairsSection(path=str(tmp_path / "pairs.jsonl"), near_copies=True)
    assert np.array_equal(clusters_of(load_pairs(source)), both)


def test_the_result_does_not_change_when_it_is_asked_for_twice() -> None:
    once = pairs_from_dataset(families(6), near_copies=True)
    again = pairs_from_dataset(once, near_copies=True)
    assert once.to_list() == again.to_list() and pairs_from_dataset(once).to_list() == once.to_list()


def test_messages_and_one_pair() -> None:
    rows = families(7, 2, 2)
    talks = [
        {"id": row["id"], "prompt": [{"role": "user", "content": row["prompt"]}]}
        | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
        for row in rows
    ]
    assert same(clusters_of(pairs_from_dataset(talks, near_copies=True)), rows)
    assert pairs_from_dataset(talks[:1], near_copies=True)["split_group"] == [None]


def test_a_key_at_its_default_is_in_no_stage_key() -> None:
    assert "near_copies" not in PairsSection(path="x").model_dump()
    assert PairsSection(path="x", near_copies=True).model_dump()["near_copies"] is True
