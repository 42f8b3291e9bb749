"""Hard rules: a pair that breaks one is dropped with the rule's name, whatever its scores. Each can be switched off.

A rule looks at the pairs that no rule before it has dropped and returns {place: finding}. Of duplicates the pair with
the smallest id is kept, so the result does not depend on the order of the file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from align.config.columns import TEXT as PARTS
from align.data.minhash import near_duplicates
from align.data.text import cells, texts_of
from align.data.word_hashes import Hashes
from align.filtering.equal_keys import combined_key, duplicated, isin_sorted
from align.filtering.held_out import HeldOut, overlaps
from align.filtering.personal_data import PERSONAL
from align.filtering.text_survey import (
    Survey,
    language_code,
    language_number,
    part_shingles,
    shingles,
)

NEAR = 0.9
"""Jaccard similarity of near-duplicates."""
AS_GIVEN, SWAPPED = (0, 1, 2), (0, 2, 1)
"""Columns of the survey: prompt, chosen and rejected; the same with the responses swapped."""
Findings = dict[int, str]
"""Place of a pair that broke a rule -> what the rule found."""


@dataclass(frozen=True, slots=True)
class RuleInput:
    """The pairs and their features that the rules read."""

    pairs: Dataset
    order: np.ndarray
    """[N] of ``place_type``: places of the pairs, smallest id first."""
    survey: Survey
    longest: int = 2048
    """Maximum words of a response."""
    language: str | None = None
    """ISO 639 code of the language that both responses must be in; None: any."""
    held_out: HeldOut | None = None
    """Keys of an evaluation set."""
    ood: np.ndarray | None = None
    """[N], see ``score_columns.distances``."""
    ood_limit: float = np.inf
    doubtful: np.ndarray | None = None
    """bool [N], see ``scores.doubtful``."""

    def by_id(self, remaining: np.ndarray) -> np.ndarray:
        """Places of the remaining pairs (bool [N]), smallest id first."""
        return self.order[remaining[self.order]]

    def relate(self, places: np.ndarray, others: np.ndarray, relation: str) -> Findings:
        """For each place a finding: ``relation`` and the id of the other pair."""
        ids = self.pairs.select_columns(["id"])[others]["id"] if len(others) else []
        return {int(place): f"{relation} {name}" for place, name in zip(places, ids, strict=True)}


def place_type(count: int) -> type[np.signedinteger[Any]]:
    """The smallest integer type that holds the places of ``count`` pairs."""
    return np.int32 if count < 2**31 else np.int64


def by_id(pairs: Dataset) -> np.ndarray:
    """Places [N] of the pairs, smallest id first."""
    return pc.sort_indices(cells(pairs, "id")).to_numpy().astype(place_type(len(pairs)))


Rule = Callable[[RuleInput, np.ndarray], Findings]
"""(input, bool [N]: remaining pairs) -> findings."""


def same_text(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs whose responses differ in case or white space only."""
    same = remaining & (table.survey.content[:, 1] == table.survey.content[:, 2])
    return dict.fromkeys(_places(same), "chosen and rejected differ in case or white space only")


def contradiction(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop the pairs that most pairs of the same prompt and responses contradict; of equally many votes, all."""
    given, swapped = (combined_key(table.survey.content, columns) for columns in (AS_GIVEN, SWAPPED))
    order = table.by_id(remaining & isin_sorted(swapped, np.sort(given[remaining])))
    labels, first, which, votes = np.unique(given[order], return_index=True, return_inverse=True, return_counts=True)
    other = np.searchsorted(labels, swapped[order])
    hit = np.flatnonzero((votes[other] >= votes[which]) & (labels[other] != labels[which]))
    findings = table.relate(order[hit], order[first[other[hit]]], "the opposite of")
    for k, own, against in zip(order[hit].tolist(), votes[which[hit]], votes[other[hit]], strict=True):
        if own + against > 2:
            findings[k] += f" ({against} pairs say the opposite, {own} this)"
    return findings


def length(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs with a response without a word, or with more than ``longest``."""
    findings: Findings = {}
    for side in (2, 1):
        count = table.survey.words[:, side]
        for k in _places(remaining & ((count < 1) | (count > table.longest))):
            findings[k] = f"{PARTS[side]} has {count[k]} words, expected 1 to {table.longest}"
    return findings


def language(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs with a response that is clearly in another language than the requested one."""
    findings: Findings = {}
    if table.language is None:
        return findings
    for side in (1, 0):
        code = table.survey.language[:, side]
        for k in _places(remaining & (code != 0) & (code != language_number(table.language))):
            findings[k] = f"{PARTS[side + 1]} reads as '{language_code(code[k])}', expected '{table.language}'"
    return findings


def pii(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs with a string that looks like personal data."""
    findings: Findings = {}
    for k in _places(remaining & (table.survey.personal > 0)):
        kinds = [name for bit, name in enumerate(PERSONAL) if table.survey.personal[k] >> bit & 1]
        findings[k] = f"seems to contain: {', '.join(kinds)}"
    return findings


def contamination(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs that have a prompt, a response or an n-gram of eight words in common with an evaluation set."""
    return {} if table.held_out is None else overlaps(table.pairs, table.survey, table.held_out, remaining)


def duplicate(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs with the prompt and responses of another pair."""
    keys = combined_key(table.survey.content, AS_GIVEN)
    order = table.by_id(_duplicated(keys, remaining))
    _, first, which = np.unique(keys[order], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(order)))
    return table.relate(order[later], order[first[which[later]]], "same as")


def near_duplicate(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs whose shingles of five words have a Jaccard similarity of at least ``NEAR`` with a kept pair's.

    The pair as one text, the prompt, the chosen and the rejected response must each reach it: a long text that many
    prompts contain does not make pairs with other responses, or another question, the same.
    """
    shared, bands = np.zeros(len(remaining), dtype=bool), table.survey.bands
    for band in range(bands.shape[1]):
        shared |= _duplicated(bands[:, band], remaining)
    order = table.by_id(shared)

    def shingles_of(rows: np.ndarray) -> list[Hashes]:
        strings = texts_of(table.pairs, order[rows].tolist())
        return [shingles(strings), *(part_shingles(strings[k :: len(PARTS)]) for k in range(len(PARTS)))]

    near = near_duplicates((bands[order, band] for band in range(bands.shape[1])), shingles_of, NEAR)
    later, earlier = (np.array(list(side), dtype=np.int64) for side in (near.keys(), near.values()))
    return table.relate(order[later], order[earlier], "nearly the same as")


def out_of_distribution(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs that are farther from the reward model's training pairs than nearly all held-back ones."""
    if table.ood is None:
        return {}
    return {
        k: f"distance {table.ood[k]:.1f} to the reward model's training pairs, limit {table.ood_limit:.1f}"
        for k in _places(remaining & (table.ood > table.ood_limit))
    }


def label_noise(table: RuleInput, remaining: np.ndarray) -> Findings:
    """Drop pairs whose out-of-fold margin strongly contradicts the label."""
    if table.doubtful is None:
        return {}
    return dict.fromkeys(_places(remaining & table.doubtful), "the margin strongly contradicts the label")


RULES: dict[str, Rule] = {
    "same_text": same_text,
    "contradiction": contradiction,
    "length": length,
    "language": language,
    "pii": pii,
    "contamination": contamination,
    "label_noise": label_noise,
    "out_of_distribution": out_of_distribution,
    "duplicate": duplicate,
    "near_duplicate": near_duplicate,
}


def apply_rules(table: RuleInput, skip: Sequence[str] = ()) -> dict[int, tuple[str, str]]:
    """Find the pairs to drop: {place: (rule, finding)} by the first rule that each pair breaks.

    Args:
        table: the pairs and their features.
        skip: names of rules to leave out.
    """
    remaining = np.ones(len(table.order), dtype=bool)
    dropped: dict[int, tuple[str, str]] = {}
    for name, rule in RULES.items():
        if name in skip:
            continue
        findings = rule(table, remaining)
        dropped.update({k: (name, finding) for k, finding in findings.items()})
        remaining[list(findings)] = False
    return dropped


def length_bias(words: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Share of pairs with more words in the chosen response, among those that differ; 0.5 if none differ.

    Args:
        words: [N, 3] of the survey.
        rows: pairs to use; None: all.
    """
    longer = (words[:, 1] - words[:, 2])[slice(None) if rows is None else rows]
    decided = longer[longer != 0] > 0
    return float(decided.mean()) if len(decided) else 0.5


def _places(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def _duplicated(keys: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """bool [N]: the pair remains, and another remaining pair has the same key."""
    result = np.zeros(len(remaining), dtype=bool)
    result[remaining] = duplicated(keys[remaining])
    return result
