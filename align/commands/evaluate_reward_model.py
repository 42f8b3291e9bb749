"""`align eval reward-model`: accuracy, calibration and length bias of a reward model on labeled pairs."""

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from align.commands.best_of_benchmark import best_of_rows, evaluate_best_of
from align.config import OodSection, PairsSection
from align.data.pairs import fingerprint, load_pairs
from align.data.readers import stream_source
from align.data.splits import clusters_of
from align.data.training_pairs import margin_sources
from align.data.votes import with_majority
from align.errors import ConfigError
from align.evaluation.reward_model import reward_model_metrics
from align.evaluation.reward_pairs import finding_sentences, pair_findings
from align.evaluation.rewardbench import is_plain
from align.io.console import log, out
from align.io.files import write_json
from align.io.parquet import ROW_GROUP
from align.io.stage import Stage, check_files, run_stage
from align.models.chat_template import rendered_today
from align.models.folders import fingerprint_model
from align.models.message_checks import check_pairs_of, is_conversational
from align.sharding.jobs import read_table
from align.sharding.shards import in_parts
from reward_models.ensemble import members
from reward_models.implicit import ImplicitReward, ImplicitSource
from reward_models.length_bias import word_difference
from reward_models.loading import DEFAULTS, LoadOptions
from reward_models.score import REWARDS

if TYPE_CHECKING:
    from reward_models.ensemble import EnsembleScorer

PART = 256
"""Pairs per shard; a stopped scoring repeats at most one shard."""
REPORT = "reward_model.json"
PAGE = "reward_model.html"
SCORES = "scores.parquet"
SCORED = "pair-scores"
"""Folder below the output; `align eval reward` uses ``scores``."""


def evaluate(
    source: PairsSection,
    model: str,
    output: Path,
    *,
    chat: bool | None,
    batch_tokens: int,
    max_length: int,
    seed: int,
    trained_on: str | None = None,
    options: LoadOptions = DEFAULTS,
    implicit: ImplicitSource | None = None,
) -> None:
    """Score pairs, write ``reward_model.json`` and ``reward_model.html`` into ``output``, print the numbers as JSON.

    Args:
        source: pairs; a ``subset`` column is used as ``group`` if there is no ``group``.
        model: reward model, folder or hub id.
        output: folder to write into.
        chat: read plain pairs as messages; None: if they are in RewardBench's format and the model has a chat template.
        batch_tokens: padded tokens per batch.
        max_length: tokens per text; longer texts are truncated on the right.
        seed: seed of the intervals.
        trained_on: the model's training pairs; if given, the distances of the pairs to them are measured.
        options: how the model is loaded and reads texts.
        implicit: the model is a policy, and this its reference and beta.

    Raises:
        AlignError: the pairs or the model cannot be used.
    """
    check_files(output, [])
    if best_of_rows(source):
        _best_of(source, model, output, chat=chat, batch_tokens=batch_tokens, max_length=max_length, options=options,
                 implicit=implicit)  # fmt: skip
        return
    pairs, chat = _load(source, model, chat, options)
    pairs = with_majority(pairs, source.path)
    check_pairs_of(pairs, [model], trust_remote_code=options.trust_remote_code, text_pair=options.text_pair)
    log.info("scoring %d pairs of %s with %s%s -> %s", len(pairs), source.path, model,
             " as chat" if chat else "", output)  # fmt: skip
    stage = _score(pairs, model, output / SCORED, batch_tokens=batch_tokens, max_length=max_length, options=options,
                   implicit=implicit)  # fmt: skip
    scores = read_table(stage.folder / SCORES)
    chosen, rejected = (np.asarray(scores[column]) for column in ("reward_chosen", "reward_rejected"))
    clusters, far = clusters_of(pairs), _distances(pairs, model, trained_on, output, options)
    found = reward_model_metrics(chosen, rejected, _groups(pairs), seed=seed, clusters=clusters)
    found |= pair_findings(pairs, chosen - rejected, distances=far, seed=seed, clusters=clusters)
    seen = margin_sources(members(model), pairs).count("in-sample")
    known = [f"{seen} of these {len(pairs)} pairs were trained on by this model: the numbers are in-sample, too good."]
    found["said"] = [*(known if seen else []), *found["said"], *finding_sentences(found)]
    found["run"] = {
        "command": shlex.join(["align", *sys.argv[1:]]), "pairs": source.path, "model": model, "chat": chat,
        "seed": seed, "seconds": round(stage.seconds, 1), "pairs_trained_on": seen,
    }  # fmt: skip
    _publish(found, pairs, chosen - rejected, output)


def _score(
    pairs: Dataset,
    model: str,
    folder: Path,
    *,
    batch_tokens: int,
    max_length: int,
    options: LoadOptions,
    implicit: ImplicitSource | None,
) -> Stage:
    """The stage that scores the pairs into ``SCORES``."""
    inputs = {"pairs": fingerprint(pairs), "model": fingerprint_model(model), "max_length": max_length, "part": PART}
    inputs["revision"] = f"{REWARDS}{options.suffix}"
    inputs |= {} if implicit is None else {"implicit": implicit.key}
    inputs |= rendered_today(model, lambda: is_conversational(pairs), trust_remote_code=options.trust_remote_code)

    def work(partial: Path) -> None:
        scorer = _scorer(model, batch_tokens, max_length, options, implicit)

        def part(rows: range) -> Dataset:
            scored = scorer.score_pairs(pairs.select(rows))
            return scored.select_columns(["id", "reward_chosen", "reward_rejected"])

        in_parts(len(pairs), PART, partial / "parts", part, what="scoring").to_parquet(
            str(partial / SCORES), batch_size=ROW_GROUP
        )
        shutil.rmtree(partial / "parts")

    return run_stage("scores", folder, inputs, work)


def _scorer(
    model: str, batch_tokens: int, max_length: int, options: LoadOptions, implicit: ImplicitSource | None
) -> "EnsembleScorer | ImplicitReward":
    if implicit is not None:
        return ImplicitReward(
            implicit, batch_tokens=batch_tokens, max_length=max_length, trust_remote_code=options.trust_remote_code
        )
    from reward_models.ensemble import EnsembleScorer

    return EnsembleScorer(model, batch_tokens=batch_tokens, max_length=max_length, options=options)


def _best_of(
    source: PairsSection,
    model: str,
    output: Path,
    *,
    chat: bool | None,
    batch_tokens: int,
    max_length: int,
    options: LoadOptions,
    implicit: ImplicitSource | None,
) -> None:
    """Evaluate on RewardBench 2."""
    has_template = _has_template(model, options)
    if chat and not has_template:
        raise _no_template(model)
    own = fingerprint_model(model) if implicit is None else implicit.key
    evaluate_best_of(
        source, model, f"{REWARDS}:{own}{options.suffix}:{max_length}",
        lambda: _scorer(model, batch_tokens, max_length, options, implicit).score_completions,
        output, chat=has_template if chat is None else chat,
    )  # fmt: skip


def _no_template(model: str) -> ConfigError:
    return ConfigError(
        f"--chat: {model} has no chat template", code="no-chat-template", hint="use --text, or another model"
    )


def _publish(found: dict[str, Any], pairs: Dataset, margins: np.ndarray, output: Path) -> None:
    """Write the report and its page, print the numbers, log the first sentence."""
    from align.reports.reward_model_page import write_reward_model_page

    write_json(output / REPORT, found | {"margins": margins.tolist()})
    write_reward_model_page(output / PAGE, found, margins, groups=_groups(pairs), words=word_difference(pairs))
    texts = {"disagreements", "ood"}
    out.print_json(json.dumps({name: value for name, value in found.items() if name not in texts}))
    log.info("%s", found["said"][0])
    log.info("numbers: %s; look at it: open %s", output / REPORT, output / PAGE)


def _groups(pairs: Dataset) -> list[str] | None:
    return [str(group) for group in pairs["group"]] if "group" in pairs.column_names else None


def _distances(
    pairs: Dataset, model: str, trained_on: str | None, output: Path, options: LoadOptions
) -> tuple[np.ndarray, float] | None:
    """Distance [N] of each pair to the training pairs, and the 99% quantile of held-out training pairs; None without
    training pairs. Features are cached below ``output``."""
    if trained_on is None:
        return None
    from align.filtering.score_columns import distances

    known = load_pairs(PairsSection(path=trained_on))
    if isinstance(known["prompt"][0], str) != isinstance(pairs["prompt"][0], str):
        raise ConfigError(
            f"--trained-on {trained_on}: found pairs of another kind, expected plain text or messages like the others",
            code="eval-trained-on",
            hint="use --text, or give the training pairs as messages",
        )
    settings = OodSection.model_validate({"model": model, "pairs": {"path": trained_on}} | asdict(options))
    return distances(pairs, settings, output / "distances" / fingerprint(pairs)[:16])


def _load(source: PairsSection, model: str, chat: bool | None, options: LoadOptions) -> tuple[Dataset, bool]:
    """Load the pairs with their ``group``, as messages if asked; return whether they were turned into messages."""
    rows, columns = stream_source(source)
    plain = is_plain(sorted(columns), next((row.values for row in rows if not row.unreadable), {}))
    if "group" not in columns and "subset" in columns:
        source = source.model_copy(update={"columns": source.columns | {"group": "subset"}})
    pairs = load_pairs(source)
    if chat is None:
        chat = plain and _has_template(model, options)
    if not chat or not isinstance(pairs["prompt"][0], str):
        return pairs, False
    if not _has_template(model, options):
        raise _no_template(model)
    return Dataset.from_list([_as_messages(row) for row in pairs]), True


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    return row | {"prompt": [{"role": "user", "content": row["prompt"]}]} | answers


def _has_template(model: str, options: LoadOptions) -> bool:
    from align.models.loading import load_tokenizer

    return load_tokenizer(model, trust_remote_code=options.trust_remote_code).chat_template is not None
