"""The work of `align entangle report`, `trace` and `check`."""

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from align.commands.trained_run import read_training
from align.config import ClusterSection, PairsSection
from align.config.columns import ID_COLUMNS, MASK_COLUMNS
from align.data.pairs import fingerprint, load_pairs
from align.data.sampling import fair_sample, report_sample
from align.data.statistics import missing_values
from align.distributed import process_rank
from align.entanglement.check import check_predictions
from align.entanglement.measure import SHARD, MeasureJob, load_measured, measuring
from align.entanglement.padding_lookups import report_padding_lookups
from align.entanglement.products import GradientProducts
from align.entanglement.summary import advice, share_text, summarize
from align.entanglement.token_products import token_matrix, token_products
from align.entanglement.trace import START, sentence, trajectory
from align.errors import ConfigError, DataError
from align.io.console import log, out, progress
from align.io.files import write_json
from align.io.parquet import ROW_GROUP
from align.io.stage import Stage, check_files, run_stage
from align.losses.registry import resolve
from align.losses.spec import BoundLoss
from align.models.folders import adapter_config, fingerprint_model, is_adapter
from align.models.loading import load_tokenizer
from align.models.tokenization import collate, tokenize_pairs
from align.models.turns import Turns, counted
from align.reports.entanglement_page import shade, write_entanglement_page, write_trace_page
from align.sharding.jobs import Work
from align.sharding.shards import map_shards
from align.viewer.measured import TOKENS

TABLE = "entanglement.parquet"
MEASUREMENTS = "measurements"
"""Folder of a report's measurements."""
SUMMARY, PAGE = "summary.json", "report.html"
MEASURED = ("id", *ID_COLUMNS, *MASK_COLUMNS, "margin")
"""Columns of tokenized pairs that a measurement depends on."""
REVISION = 5
"""Part of the key of a measurement: raised when the same pairs and model give other numbers."""
NAMED = 5
"""Number of pairs that a message names."""
MATRIX_TOKENS = 64
"""Longest shorter response of a pair that is shown token against token; each token costs two passes."""


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """Settings of `align entangle report`."""

    model: str
    """Policy: folder (an adapter's too) or hub id."""
    loss: str = "dpo"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the loss."""
    reference: str | None = None
    """Reference model; None: the policy without its adapter."""
    parameter_names: str | None = None
    """Regular expression; only trained parameters with a matching name are measured. None: all of them."""
    limit: int = 256
    """Pairs to measure."""
    shown: int = 8
    """Pairs to show token by token."""
    matrices: int = 1
    """Number of the shown pairs that are also shown as a matrix of token against token."""
    batch_tokens: int = 2048
    """Padded tokens per batch."""
    max_length: int = 1024
    """Tokens of prompt and response together."""
    cluster: ClusterSection | None = None
    """The cluster whose workers share the pairs; no result depends on it."""


def report(source: PairsSection, settings: ReportSettings, output: Path) -> None:
    """Measure pairs, write ``entanglement.parquet``, ``summary.json``, ``tokens.json`` and ``report.html``.

    ``tokens.json`` holds the pairs that the page shows token by token, for `align view`.

    Raises:
        AlignError: the pairs, the model or the loss cannot be used.
    """
    check_files(output, [SUMMARY, TOKENS, PAGE], own=[MEASUREMENTS])
    bound = _bound(settings.loss, settings.parameters)
    every = load_pairs(source)
    pairs = sample_pairs(every, bound, settings.limit, source.path)
    tokens, left_out = tokenized(pairs, load_tokenizer(settings.model), settings.max_length)
    policy = load_measured(settings.model)
    padding_pairs = report_padding_lookups(policy, tokens)
    job = MeasureJob(settings.model, settings.reference, bound, settings.parameter_names, settings.batch_tokens,
                     settings.max_length)  # fmt: skip
    stage, table = measure_tokens(output / MEASUREMENTS, tokens, policy, job, settings.cluster)
    if process_rank() > 0:
        return
    summary = summarize(table)
    products = GradientProducts(policy, settings.parameter_names)
    covered = products.covered
    started = time.monotonic()
    shown = _shown_pairs(policy, tokens, table, settings)
    page: dict[str, Any] = {
        "run": {
            "padding_pairs": padding_pairs,
            "shown_seconds": round(time.monotonic() - started, 1),
            "pairs": source.path, "of": len(every), "left_out": left_out, "model": settings.model,
            "loss": settings.loss, "seconds": stage.seconds,
            "command": shlex.join(["align", *sys.argv[1:]]), "parameters": sum(covered.values()),
            "by_rule": covered["rule"], "by_autograd": covered["autograd"], "without_rule": products.by_autograd,
            "adapter": adapter_config(settings.model)["peft_type"] if is_adapter(settings.model) else None,
        },
        "summary": summary,
        "entangled": share_text(summary["entangled"]),
        "advice": advice(summary, settings.loss),
        "pairs": shown,
    }  # fmt: skip
    write_json(output / SUMMARY, {key: page[key] for key in ("run", "summary", "advice")})
    write_json(output / TOKENS, shown)
    write_entanglement_page(output / PAGE, table, page)
    log.info("%s", page["advice"]["headline"])
    log.info("do: %s", page["advice"]["next_step"])
    log.info("look at it: open %s", output / PAGE)


def _shown_pairs(policy: nn.Module, tokens: Dataset, table: Dataset, settings: ReportSettings) -> list[dict[str, Any]]:
    """The most entangled pairs, token by token."""
    tokenizer = load_tokenizer(settings.model)
    rows = sorted(range(len(table)), key=lambda k: _worst(table[k]))[: settings.shown]
    numbered = progress(enumerate(rows), what="colors of the tokens", total=len(rows), unit="pairs")
    return [
        _colored(policy, tokenizer, tokens[k], table[k], settings, matrix=number < settings.matrices)
        for number, k in numbered
    ]


def trace(run: Path, method: str, *, limit: int, batch_tokens: int, max_length: int | None) -> None:
    """Measure the start and the saved checkpoints of one method of a run; write JSON, tables and a page.

    They are in ``trace-<method>/``. The loss, its parameters and the reference are those of the training, and so is the
    length if ``max_length`` is None.

    Raises:
        AlignError: no such training, no checkpoint, or a loss that has no verdict for one pair.
    """
    trained = read_training(run, method, max_length)
    training, base, checkpoints, length = trained.folder, trained.base, trained.checkpoints, trained.max_length
    bound = of_one_pair(trained.loss)
    pairs = sample_pairs(trained.table(), bound, limit, str(run))
    tokens, _ = tokenized(pairs, load_tokenizer(base), length, trained.turns)
    output, tables = run / f"trace-{method}", []
    start = _start(training, base, checkpoints[0][1])
    reference = trained.reference
    measured: list[tuple[int, str, str | None]] = [] if start is None else [(0, start, trained.given or start)]
    measured += [(step, str(folder), reference) for step, folder in checkpoints]
    for step, folder, compared in measured:
        job = MeasureJob(folder, compared, bound, None, batch_tokens, length)
        tables.append(measure_tokens(output / f"step-{step:06d}", tokens, load_measured(folder), job)[1])
    if process_rank() > 0:
        return
    found = trajectory([step for step, _, _ in measured], tables)
    report = {
        "run": {"folder": str(run), "method": method, "loss": bound.spec.name, "pairs": len(pairs),
                "command": shlex.join(["align", *sys.argv[1:]])},
        "sentence": sentence(found, method),
        **found,
    }  # fmt: skip
    write_json(output / "trace.json", report)
    write_trace_page(output / PAGE, report)
    log.info("%s", report["sentence"])
    log.info("look at it: open %s", output / PAGE)


def _start(training: Path, base: str, checkpoint: Path) -> str | None:
    """The model of a training before its first step; None if it was a new adapter that was not kept."""
    if (training / START).exists():
        return str(training / START)
    if not is_adapter(checkpoint) or is_adapter(base):
        return base
    log.warning("%s: holds no folder %s, so the trace begins at the first checkpoint", training, START)
    return None


def check(
    source: PairsSection,
    model: str,
    output: Path,
    *,
    loss: str,
    parameters: dict[str, float],
    rates: dict[str, float],
    limit: int,
    max_length: int,
) -> None:
    """Compare predicted changes with those of real optimizer steps; write ``check.json``.

    The steps train on half of the pairs; the changes of all pairs are predicted.

    Raises:
        AlignError: the pairs, the model or the loss cannot be used.
    """
    if process_rank() > 0:
        return
    check_files(output, [])
    bound = _bound(loss, parameters)
    pairs = sample_pairs(load_pairs(source), bound, limit, source.path)
    tokenizer = load_tokenizer(model)
    tokens, _ = tokenized(pairs, tokenizer, max_length)
    half = tokens.select(range(max(1, len(tokens) // 2)))
    batch, probes = (collate(rows, tokenizer.pad_token_id, max_length=max_length) for rows in (half, tokens))
    policy = load_measured(model)
    report_padding_lookups(policy, tokens)
    device = next(policy.parameters()).device
    batch, probes = ({name: value.to(device) for name, value in rows.items()} for rows in (batch, probes))
    margin = torch.tensor(half["margin"], device=device) if bound.spec.needs_margin else None
    found = check_predictions(policy, batch, probes, bound, rates, margin=margin)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "check.json", {"model": model, "loss": loss, "pairs": len(tokens), "optimizers": found})
    out.print_json(json.dumps(found))
    log.info("check: %s", output / "check.json")


def _bound(loss: str, parameters: Mapping[str, float]) -> BoundLoss:
    return of_one_pair(resolve(loss, dict(parameters)))


def of_one_pair(bound: BoundLoss) -> BoundLoss:
    if not bound.spec.from_logps:
        raise ConfigError(
            f"--loss {bound.spec.name}: compares the pairs of a step or reads tokens: a pair alone has no verdict",
            code="entanglement-loss",
            hint="measure with --loss dpo",
        )
    return bound


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The job in this process, with the policy that is already loaded for the page."""

    policy: nn.Module
    job: MeasureJob

    def start(self) -> Work:
        return measuring(self.policy, self.job)


def measure_tokens(
    folder: Path, tokens: Dataset, policy: nn.Module, job: MeasureJob, cluster: ClusterSection | None = None
) -> tuple[Stage, Dataset]:
    """Run the stage that measures one model on tokenized pairs; return it and its table."""
    read = [name for name in MEASURED if name in tokens.column_names]
    inputs = {
        "pairs": [str(row["id"]) for row in tokens],
        "content": fingerprint(tokens.select_columns(read)),
        "model": fingerprint_model(job.model),
        "reference": None if job.reference is None else fingerprint_model(job.reference),
        "loss": job.loss.spec.name,
        "loss_parameters": dict(job.loss.parameters),
        "parameters": job.parameters,
        "max_length": job.max_length,
        "revision": REVISION,
    }

    def work(partial: Path) -> None:
        parts = partial / "parts"
        here = job if cluster is not None else _Loaded(policy, job)
        made = map_shards(tokens, here, parts, size=SHARD, what="entanglement", cluster=cluster, together=True)
        if process_rank() == 0:
            made.whole().to_parquet(str(partial / TABLE), batch_size=ROW_GROUP)

    stage = run_stage("entanglement", folder, inputs, work, collective=True)
    return stage, Dataset.from_parquet(str(folder / TABLE), keep_in_memory=True)


def sample_pairs(pairs: Dataset, loss: BoundLoss, limit: int, source: str) -> Dataset:
    """A fair sample of ``limit`` pairs.

    Raises:
        DataError: the loss needs a margin that a pair lacks.
    """
    lacking = missing_values(pairs, "margin") if "margin" in pairs.column_names else range(len(pairs))
    if loss.spec.needs_margin and len(lacking):
        first = ", ".join(str(pairs[int(place)]["id"]) for place in lacking[:NAMED])
        more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
        raise DataError(
            f"{source}: loss {loss.spec.name} needs a `margin` of every pair, found none of {first}{more}",
            code="loss-needs-margin",
            hint="run `align reward score` first, or measure with --loss dpo",
        )
    drawn, total = fair_sample(map(str, pairs["id"]), limit)
    report_sample(source, len(drawn), total, "pairs")
    return pairs.select(drawn)


def tokenized(pairs: Dataset, tokenizer: Any, max_length: int, turns: Turns = "assistant") -> tuple[Dataset, list[str]]:
    """The pairs as token ids, and the ids of those of which ``max_length`` leaves no token that counts.

    Raises:
        DataError: all are left out, or a response has no token.
    """
    tokens = tokenize_pairs(pairs, tokenizer, max_length=sys.maxsize, turns=turns)
    fits = [counted(row, max_length, "keep_start") for row in tokens]
    fitting = [k for k, left in enumerate(fits) if left]
    left_out = [str(pairs[k]["id"]) for k, left in enumerate(fits) if not left]
    if not fitting:
        raise DataError(
            f"none of {len(pairs)} pairs has a token of a response within {max_length} tokens",
            code="empty-completion",
            hint="raise --max-length",
        )
    if left_out:
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        log.warning(
            "left out, nothing that counts is left within %d tokens: %s%s",
            max_length,
            ", ".join(left_out[:NAMED]),
            more,
        )
    return tokens.select(fitting), left_out


def _worst(row: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: entangled pairs first, then pairs with the least slack."""
    slack = row["slack"]
    return (not row["entangled"], float("inf") if slack is None or math.isnan(slack) else slack)


def _colored(
    model: nn.Module,
    tokenizer: Any,
    tokens: dict[str, Any],
    row: dict[str, Any],
    settings: ReportSettings,
    *,
    matrix: bool,
) -> dict[str, Any]:
    """A pair as text colored by the products of its tokens; with ``matrix`` also the products of every two tokens."""
    batch = collate([tokens], tokenizer.pad_token_id, max_length=settings.max_length)
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    found: dict[str, Any] = {name: row[name] for name in ("id", "verdict", "cosine", "norm_ratio")}
    found["prompt"] = tokenizer.decode(tokens["prompt_ids"])
    for side, (values, ids, mask) in zip(
        ("chosen", "rejected"),
        zip(
            token_products(model, batch, settings.parameter_names),
            batch["input_ids"],
            batch["completion_mask"],
            strict=True,
        ),
        strict=True,
    ):
        largest = float(values.abs().max())
        places = mask[1:].nonzero()[:, 0].tolist()
        found[side] = [
            {
                "text": tokenizer.decode([int(ids[place + 1])]),
                "value": float(values[place]),
                "shade": shade(float(values[place]), largest),
            }
            for place in places
        ]
    if matrix and min(len(found["chosen"]), len(found["rejected"])) <= MATRIX_TOKENS:
        values = token_matrix(model, batch, settings.parameter_names)
        largest = float(values.abs().max())
        found["matrix"] = [[(value, shade(value, largest)) for value in line] for line in values.tolist()]
    return found
