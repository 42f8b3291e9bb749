"""Record of the pairs that a reward model was trained on; which margins of it are in-sample, which outside.

The record is one small file in the model folder: sorted 64-bit digests of every prompt with a response.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from align.config.columns import RESPONSES
from align.data.text import is_long, plain, text_key, without_system
from align.io.console import log

FILE = "training_texts.npy"
SOURCE = "margin_source"
"""Column of a pair table: where the margin of each pair comes from, one of ``SOURCES`` or ``UNKNOWN``."""
SOURCES = ("outside", "cross-fitted", "in-sample")
UNKNOWN = "unknown"


def text_digests(prompts: Sequence[Any], responses: Sequence[Any]) -> np.ndarray:
    """64-bit digests [N] of prompts, each with its response.

    They do not depend on case, white space or Unicode form, on where a prompt ends, or, from ``LONG`` characters on, on
    system messages.
    """
    found = np.empty(len(prompts), dtype=np.uint64)
    for k, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        text = f"{plain(without_system(prompt))} {plain(response)}"
        whole = text if is_long(text) else f"{plain(prompt)} {plain(response)}"
        found[k] = int.from_bytes(text_key(whole)[:8], "big")
    return found


def pair_digests(pairs: Dataset) -> np.ndarray:
    """Digests of the chosen and of the rejected text of every pair, [N, 2]."""
    return np.stack([text_digests(pairs["prompt"], pairs[name]) for name in RESPONSES], axis=1)


def record_of(pairs: Dataset, start: Path | str | None = None) -> np.ndarray:
    """The record of the pairs that a model is trained on: sorted digests, uint64.

    Args:
        pairs: pair table.
        start: model that the training starts from; if its folder has a record, the new model knows those pairs, too.
    """
    digests = pair_digests(pairs).ravel()
    earlier = None if not start else Path(start) / FILE
    known = [np.load(earlier, allow_pickle=False)] if earlier is not None and earlier.is_file() else []
    return np.unique(np.concatenate([digests, *known]))


def write_digests(record: np.ndarray, folder: Path) -> None:
    """Write a record into the folder of the model."""
    np.save(folder / FILE, record, allow_pickle=False)


def write_record(pairs: Dataset, folder: Path, start: Path | str | None = None) -> None:
    """Write the record of the pairs that a model was trained on into its folder; see ``record_of``."""
    write_digests(record_of(pairs, start), folder)


def margin_sources(models: Sequence[Path | str], pairs: Dataset) -> list[str]:
    """Source of the margin that the models give to each pair, [N].

    in-sample: one of them was trained on the pair, or on a pair with one of its responses to the same prompt; outside:
    none was; unknown: a model has no record, for example one of the hub.
    """
    records = [Path(model) / FILE for model in models]
    seen = np.zeros(len(pairs), dtype=bool)
    digests = pair_digests(pairs) if any(record.is_file() for record in records) else np.empty((0, 2))
    for record in records:
        if record.is_file():
            seen |= np.isin(digests, np.load(record, allow_pickle=False)).any(axis=1)
    other = "outside" if all(record.is_file() for record in records) else UNKNOWN
    return ["in-sample" if one else other for one in seen]


def cross_fitted_sources(start: Path | str, pairs: Dataset) -> list[str]:
    """Source of each margin [N] of models that start from ``start`` and are trained on the other folds.

    It is in-sample if the model that they start from was trained on the pair; a warning says of how many.
    """
    found = ["in-sample" if one == "in-sample" else "cross-fitted" for one in margin_sources([start], pairs)]
    count = found.count("in-sample")
    if count:
        log.warning(
            "cross-fitting: %s, which every fold starts from, was trained on %d of these %d pairs: their margins are "
            "in-sample; start from a model that has not seen them", start, count, len(pairs),
        )  # fmt: skip
    return found


def with_source(pairs: Dataset, sources: Sequence[str]) -> Dataset:
    """The table with the column ``margin_source``."""
    table = pairs.remove_columns([SOURCE]) if SOURCE in pairs.column_names else pairs
    return table.add_column(SOURCE, list(sources))


def source_of(pairs: Dataset) -> str:
    """The weakest source of a table's margins: in-sample if one margin is, else unknown, cross-fitted, outside."""
    found = set(pairs[SOURCE]) if SOURCE in pairs.column_names else {UNKNOWN}
    if not found <= {*SOURCES}:
        found = (found & {*SOURCES}) | {UNKNOWN}
    return next(one for one in ("in-sample", UNKNOWN, "cross-fitted", "outside") if one in found)


def report_in_sample(pairs: Dataset, where: str) -> int:
    """Log a warning with the number of pairs whose margins are in-sample; return the number."""
    count = list(pairs[SOURCE]).count("in-sample") if SOURCE in pairs.column_names else 0
    if count:
        log.warning(
            "%s: %d of these %d pairs were trained on by the reward model that gives their margins: those margins are "
            "in-sample, repeat the labels and are too large; use cross-fitted ones (reward.folds: 5)",
            where, count, len(pairs),
        )  # fmt: skip
    return count
