"""`align entangle losses`: one measurement of the pairs, and what each loss would do to them."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from align.commands.entangle import MEASUREMENTS, PAGE, measure_tokens, sample_pairs, tokenized
from align.config import ClusterSection, PairsSection
from align.data.pairs import load_pairs
from align.distributed import local_device, process_rank
from align.entanglement.compare_losses import Incentive, compare_losses, loss_weights_of
from align.entanglement.conditions import products_noise
from align.entanglement.measure import MeasureJob, load_measured
from align.entanglement.padding_lookups import report_padding_lookups
from align.entanglement.preconditioned import (
    FIRST_STEP,
    PairBatches,
    measured_by,
    of_checkpoint,
    of_first_step,
    preconditioned,
)
from align.entanglement.summary import share_text
from align.errors import ConfigError
from align.io.console import log, out
from align.io.files import write_json
from align.io.stage import check_files
from align.losses.registry import LOSSES, resolve
from align.losses.spec import BoundLoss
from align.losses.sums import resolve_sum
from align.models.loading import load_tokenizer
from align.reports.entanglement_page import write_losses_page

FILE = "losses.json"


@dataclass(frozen=True, slots=True)
class LossesSettings:
    """Settings of `align entangle losses`."""

    model: str
    """Policy: folder (an adapter's too) or hub id."""
    reference: str | None = None
    """Reference model; None: the policy without its adapter."""
    parameter_names: str | None = None
    """Regular expression; only trained parameters with a matching name are measured. None: all of them."""
    sums: tuple[str, ...] = ()
    """Sums to compare in addition to every loss of the registry: ``madpo=1,nll=0.1``."""
    limit: int = 64
    batch_tokens: int = 2048
    max_length: int = 1024
    optimizer: str | None = None
    """``first-step``, or the folder of a checkpoint with AdamW's state: falls are told under its preconditioner too."""
    cluster: ClusterSection | None = None


def compare(source: PairsSection, settings: LossesSettings, output: Path) -> None:
    """Measure pairs once; write ``losses.json`` and ``report.html`` under ``output``, and print the table.

    Raises:
        AlignError: the pairs, the model or a sum cannot be used.
    """
    check_files(output, [FILE, PAGE], own=[MEASUREMENTS])
    losses = [resolve(name, {}) for name in LOSSES] + [read_sum(text) for text in settings.sums]
    dpo = resolve("dpo", {})
    pairs = sample_pairs(load_pairs(source), dpo, settings.limit, source.path)
    tokens, left_out = tokenized(pairs, load_tokenizer(settings.model), settings.max_length)
    job = MeasureJob(settings.model, settings.reference, dpo, settings.parameter_names, settings.batch_tokens,
                     settings.max_length)  # fmt: skip
    policy = load_measured(settings.model)
    report_padding_lookups(policy, tokens)
    stage, table = measure_tokens(output / MEASUREMENTS, tokens, policy, job, settings.cluster)
    if process_rank() > 0:
        return
    found, missing = compare_losses(table, losses, noise=products_noise(policy))
    adaptive = _under_optimizer(table, tokens, policy, losses, settings)
    report = {
        "run": {"pairs": source.path, "measured": len(table), "left_out": left_out, "model": settings.model,
                "reference": settings.reference, "seconds": stage.seconds, "at_start": at_start(table),
                "optimizer": settings.optimizer,
                "command": shlex.join(["align", *sys.argv[1:]])},
        "sentence": sentence(found),
        "losses": [item.to_dict() | {"optimizer": adaptive.get(item.loss)} for item in found],
        "left_out": missing,
    }  # fmt: skip
    write_json(output / FILE, report)
    write_losses_page(output / PAGE, report)
    for line in lines(found, adaptive):
        out.print(line, markup=False, highlight=False)
    log.info("%s", report["sentence"])
    log.info("look at it: open %s", output / PAGE)


def _under_optimizer(
    table: Dataset, tokens: Dataset, policy: nn.Module, losses: list[BoundLoss], settings: LossesSettings
) -> dict[str, dict[str, Any]]:
    """Loss -> its incentives under AdamW's preconditioner; empty unless asked for."""
    if settings.optimizer is None:
        return {}
    products = measured_by(policy, settings.parameter_names)
    padding = load_tokenizer(settings.model).pad_token_id
    batches = PairBatches(tokens, padding, settings.max_length, local_device())
    if settings.optimizer == FIRST_STEP:
        scale = of_first_step(products, batches, *loss_weights_of(resolve("dpo", {}), table))
    else:
        scale = of_checkpoint(policy, Path(settings.optimizer))
    scaled = preconditioned(table, products, batches, scale)
    return {item.loss: item.to_dict() for item in compare_losses(scaled, losses, noise=products_noise(policy))[0]}


def read_sum(text: str) -> BoundLoss:
    """A sum of losses as the command line gives it: ``madpo=1,nll=0.1``.

    Raises:
        ConfigError: not of this form, or not a sum.
    """
    terms: dict[str, float] = {}
    for part in text.split(","):
        name, sign, weight = (piece.strip() for piece in part.partition("="))
        try:
            terms[name] = float(weight) if sign else 1.0
        except ValueError:
            raise ConfigError(
                f"--sum {text}: found the weight {weight!r}, expected a number: --sum madpo=1,nll=0.1",
                code="config-option",
            ) from None
    return resolve_sum(terms, {})


def at_start(table: Dataset) -> bool:
    """Whether the policy is its own reference, so that h is 0 for every pair."""
    return not any(any(table[f"logp_{side}_change"]) for side in ("chosen", "rejected"))


def sentence(found: list[Incentive]) -> str:
    """Which losses lower the fewest and the most chosen responses."""
    first, last = found[0], found[-1]
    text = f"A step on a pair alone lowers the chosen response in {share_text(first.falls)} of the pairs"
    if first.falls["value"] == last.falls["value"]:
        return f"{text}, under every loss."
    return f"{text} under {first.loss}, and in {share_text(last.falls)} under {last.loss}."


def lines(found: list[Incentive], adaptive: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table as text, a line per loss; with a column for the optimizer where its step was measured."""
    width = max(len(item.loss) for item in found)
    head = f"{'loss':{width}}  chosen falls  rejected rises        d_w        d_l  nll for 95%  nll for all"
    rows = [
        f"{item.loss:{width}}  {item.falls['value']:12.0%}  {item.rejected_rises:14.0%}  {item.d_w:9.3g}  "
        f"{item.d_l:9.3g}  {item.nll_for_most:11.3g}  {item.nll_for_all:11.3g}"
        for item in found
    ]
    if adaptive:
        head += "  falls under AdamW"
        rows = [f"{row}  {adaptive[item.loss]['falls']['value']:17.0%}" for row, item in zip(rows, found, strict=True)]
    return [head, *rows]
