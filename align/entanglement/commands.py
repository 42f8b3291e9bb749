"""What `align entangle report` and `align entangle check` do."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from align.config import PairsConfig
from align.console import log, out
from align.entanglement.batch import collate, tokenize_pairs
from align.entanglement.check import check_predictions
from align.entanglement.measure import measure_pairs
from align.entanglement.products import GradientProducts
from align.entanglement.summary import advice, summarize
from align.entanglement.tokens import token_products
from align.errors import ConfigError, DataError
from align.loss_registry import BoundLoss, resolve
from align.model_loading import load_policy, load_tokenizer
from align.pairs import load_pairs
from align.reports.entanglement_page import shade, write_page
from align.stage import fingerprint_source, run_stage, write_json

TABLE = "entanglement.parquet"


def report(
    source: PairsConfig,
    model: str,
    output: Path,
    *,
    loss: str,
    parameters: dict[str, float],
    reference: str | None,
    measured: str | None,
    limit: int,
    shown: int,
    batch_tokens: int,
    max_length: int,
) -> None:
    """Measure pairs, write ``entanglement.parquet``, ``summary.json`` and ``report.html`` under ``output``.

    Raises:
        AlignError: the pairs, the model or the loss cannot be used.
    """
    bound = _bound(loss, parameters)
    pairs = _sample(source, bound, limit)
    tokenizer = load_tokenizer(model)
    policy = _policy(model)
    tokens = tokenize_pairs(pairs, tokenizer, max_length=max_length)
    inputs = {
        "pairs": [str(row["id"]) for row in pairs],
        "content": fingerprint_source(source.path),
        "model": fingerprint_source(model),
        "reference": None if reference is None else fingerprint_source(reference),
        "loss": loss,
        "loss_parameters": dict(bound.parameters),
        "parameters": measured,
        "max_length": max_length,
    }

    def work(folder: Path) -> None:
        table = measure_pairs(
            tokens, policy, tokenizer, bound, reference=None if reference is None else load_policy(reference),
            parameters=measured, batch_tokens=batch_tokens, max_length=max_length, parts=folder / "parts",
        )  # fmt: skip
        table.to_parquet(str(folder / TABLE))

    stage = run_stage("entanglement", output / "measurements", inputs, work)
    table = Dataset.from_parquet(str(stage.folder / TABLE), keep_in_memory=True)
    summary = summarize(table)
    covered = GradientProducts(policy, measured).covered
    rows = sorted(range(len(table)), key=lambda k: _worst(table[k]))[:shown]
    page = {
        "run": {
            "pairs": source.path, "model": model, "loss": loss, "seconds": stage.seconds,
            "command": shlex.join(["align", *sys.argv[1:]]), "parameters": sum(covered.values()),
            "by_rule": covered["rule"], "by_autograd": covered["autograd"],
        },
        "summary": summary,
        "advice": advice(summary, loss),
        "pairs": [_coloured(policy, tokenizer, tokens[k], table[k], max_length) for k in rows],
    }  # fmt: skip
    write_json(output / "summary.json", {key: page[key] for key in ("run", "summary", "advice")})
    write_page(output / "report.html", table, page)
    log.info("%s", page["advice"]["headline"])  # type: ignore[index]
    log.info("do: %s", page["advice"]["next_step"])  # type: ignore[index]
    log.info("look at it: open %s", output / "report.html")


def check(
    source: PairsConfig,
    model: str,
    output: Path,
    *,
    loss: str,
    parameters: dict[str, float],
    rates: dict[str, float],
    limit: int,
    max_length: int,
) -> None:
    """Take real steps and compare; write ``check.json``. Half of the pairs are trained on, all are predicted.

    Raises:
        AlignError: the pairs, the model or the loss cannot be used.
    """
    bound = _bound(loss, parameters)
    pairs = _sample(source, bound, limit)
    tokenizer = load_tokenizer(model)
    tokens = tokenize_pairs(pairs, tokenizer, max_length=max_length)
    half = tokens.select(range(max(1, len(tokens) // 2)))
    batch, probes = (collate(rows, tokenizer.pad_token_id, max_length=max_length) for rows in (half, tokens))
    margin = torch.tensor(half["margin"]) if bound.spec.needs_margin else None
    found = check_predictions(_policy(model), batch, probes, bound, rates, margin=margin)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "check.json", {"model": model, "loss": loss, "pairs": len(tokens), "optimizers": found})
    out.print_json(json.dumps(found))
    log.info("check: %s", output / "check.json")


def _bound(loss: str, parameters: dict[str, float]) -> BoundLoss:
    bound = resolve(loss, parameters)
    if bound.spec.function is None:
        raise ConfigError(
            f"--loss {loss}: its beta is a statistic of each training batch, so a pair alone has no verdict",
            code="entanglement-loss",
            hint="measure with --loss dpo",
        )
    return bound


def _sample(source: PairsConfig, loss: BoundLoss, limit: int) -> Dataset:
    """The first ``limit`` pairs in an order that does not depend on the file's."""
    pairs = load_pairs(source)
    if loss.spec.needs_margin and "margin" not in pairs.column_names:
        raise DataError(
            f"{source.path}: loss {loss.spec.name} needs a `margin` column",
            code="loss-needs-margin",
            hint="run `align reward score` first, or measure with --loss dpo",
        )
    order = sorted(range(len(pairs)), key=lambda k: str(pairs[k]["id"]))[:limit]
    return pairs.select(sorted(order))


def _policy(model: str) -> nn.Module:
    kwargs: dict[str, Any] = {"dtype": "float32"}
    if (Path(model) / "adapter_config.json").exists():
        kwargs["is_trainable"] = True
    return load_policy(model, **kwargs).to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _worst(row: dict[str, Any]) -> tuple[bool, float]:
    """Entangled pairs first, then those with the least slack."""
    slack = row["slack"]
    return (not row["entangled"], float("inf") if slack is None or math.isnan(slack) else slack)


def _coloured(
    model: nn.Module, tokenizer: Any, tokens: dict[str, Any], row: dict[str, Any], limit: int
) -> dict[str, Any]:
    batch = collate([tokens], tokenizer.pad_token_id, max_length=limit)
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    found: dict[str, Any] = {name: row[name] for name in ("id", "verdict", "cosine", "norm_ratio")}
    found["prompt"] = tokenizer.decode(tokens["prompt_ids"])
    for side, (values, ids, mask) in zip(
        ("chosen", "rejected"),
        zip(token_products(model, batch), batch["input_ids"], batch["completion_mask"], strict=True),
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
    return found
