"""``diagnose``: everything that is known of a table of pairs before a model is trained on it."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from align.diagnosis import cost, under_model
from align.diagnosis.noise import find_noise
from align.diagnosis.shortcuts import find_shortcuts
from align.diagnosis.texts import describe_texts
from align.diagnosis.verdict import findings
from align.errors import DataError
from align.filtering.held_out import HeldOut, overlaps
from align.filtering.text_survey import SurveyJob, take_survey
from align.io.console import log
from align.losses.registry import BoundLoss, resolve
from align.models.loading import load_policy, load_tokenizer, place
from align.models.tokenization import MAX_LENGTH

SHOWN = 5


def diagnose(
    pairs: Dataset,
    *,
    model: str | None = None,
    loss: str = "dpo",
    held_out: Sequence[Mapping[str, Any]] | None = None,
    max_length: int = MAX_LENGTH,
    probe: bool = True,
    own: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Shortcuts, noise, texts and overlap of the pairs; with a model, also tokens, distance, entanglement and cost.

    Args:
        pairs: pair table with ``id``.
        model: folder or hub id of the model that would be trained.
        loss: name of the loss whose first step is predicted.
        held_out: rows of an evaluation set, with responses or without.
        max_length: tokens of prompt and response together.
        probe: also train a few steps per setting, in processes of their own, for seconds and memory.
        own: columns of the source beside those of a pair table.
        seed: of the folds of the shortcuts.

    Returns:
        ``shortcuts``, ``noise``, ``texts``, ``overlap``, ``tokens``, ``off_policy``, ``entanglement``, ``cost`` (None
        where it was not measured), ``findings`` (most important first) and ``first``, what to do first.

    Raises:
        DataError: there are no pairs.
        ModelError: the model cannot be loaded.
    """
    if not len(pairs):
        raise DataError("no pairs to look at", code="data-empty", hint="give at least one pair")
    bound = resolve(loss, {})
    found: dict[str, Any] = {
        "shortcuts": [asdict(one) for one in find_shortcuts(pairs, seed=seed, own=own)],
        "noise": find_noise(pairs),
        "texts": describe_texts(pairs),
        "overlap": None if held_out is None else overlap(pairs, held_out),
        **dict.fromkeys(("tokens", "off_policy", "entanglement", "cost")),
    }
    if model is not None:
        found |= _under(pairs, model, bound, max_length, probe)
    found["findings"] = findings(found)
    found["first"] = [one["do"] for one in found["findings"] if one["level"] > 0 and one["do"]][:3]
    return found


def overlap(pairs: Dataset, held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pairs that share a prompt, a response or eight words of a prompt with held-out rows, as the filter finds them."""
    known = HeldOut.of(list(held_out))
    with tempfile.TemporaryDirectory() as folder:
        job = SurveyJob(known.runs, near=False, language=False)
        survey = take_survey(pairs, job, Path(folder))
        shared = overlaps(pairs, survey, known, np.ones(len(pairs), dtype=bool))
    ids = [f"{pairs[k]['id']}: {shared[k]}" for k in sorted(shared)[:SHOWN]]
    return {"pairs": len(shared), "of": len(pairs), "ids": ids}


def _under(pairs: Dataset, model: str, loss: BoundLoss, max_length: int, probe: bool) -> dict[str, Any]:
    tokenizer = load_tokenizer(model)
    log.info("%s: tokens of the pairs", model)
    found: dict[str, Any] = {"tokens": under_model.token_lengths(pairs, tokenizer, max_length)}
    policy = load_policy(model, dtype="float32").eval()
    place(policy, "cuda" if torch.cuda.is_available() else "cpu")
    log.info("%s: log-probs of %d pairs", model, min(len(pairs), under_model.SAMPLE))
    found["off_policy"] = under_model.off_policy(pairs, policy, tokenizer, max_length)
    log.info("%s: gradients of %d pairs", model, min(len(pairs), under_model.MEASURED))
    found["entanglement"] = under_model.entanglement_risk(pairs, policy, tokenizer, loss, max_length)
    del policy
    if probe:
        log.info("%s: seconds and memory of a few steps on the longest pair", model)
        half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        settings = cost.probe_settings(model, max_length, bf16=half)
        share = found["tokens"]["per_pair"] / (2 * max(found["tokens"]["longest"], 1))
        found["cost"] = [_epoch(one, len(pairs) * min(share, 1.0)) for one in cost.probe(pairs, settings)]
    return found


def _epoch(one: dict[str, Any], pairs: float) -> dict[str, Any]:
    """Add the seconds of an epoch: those of a longest pair times the number of longest pairs with as many tokens."""
    seconds = one.get("seconds_per_pair")
    return one if seconds is None else one | {"seconds_per_epoch": seconds * pairs}
