"""The work of `align entangle influence`."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from align.commands.entangle import of_one_pair, sample_pairs, tokenized
from align.commands.trained_run import TrainedRun, read_training
from align.config import PairsSection
from align.data.held_out_pairs import distinct, groups_of, read_answers
from align.data.pairs import fingerprint, load_pairs
from align.distributed import process_rank
from align.entanglement.adam_states import OPTIMIZER, learning_rate, read_adam_state
from align.entanglement.influence import InfluenceMeasurement, directions_of, held_out
from align.entanglement.influence_check import check_influence
from align.entanglement.influence_summary import Point, combine, summarize
from align.entanglement.measure import SHARD, load_measured, load_reference
from align.entanglement.measure_pairs import PairMeasurement
from align.entanglement.padding_lookups import report_padding_lookups
from align.entanglement.products import GradientProducts
from align.errors import ConfigError, ModelError
from align.io.console import log, out
from align.io.files import read_json, write_json
from align.io.hashing import hash_file
from align.io.parquet import ROW_GROUP
from align.io.stage import check_files, run_stage
from align.losses.registry import resolve
from align.losses.spec import BoundLoss
from align.models.folders import fingerprint_model
from align.models.loading import load_tokenizer
from align.models.turns import Turns
from align.reports.influence_page import write_influence_page
from align.sharding.shards import map_shards

TABLE, FILE, PAGE, CHECK = "influence.parquet", "influence.json", "influence.html", "influence-check.json"
POINTS, HELD = "points", "held_out.json"
LIKELIHOOD = "likelihood"
REVISION = 1
"""Part of the key of a measurement: raised when the same pairs and model give other numbers."""


@dataclass(frozen=True, slots=True)
class InfluenceSettings:
    """Settings of `align entangle influence`."""

    model: str
    """Policy: folder (an adapter's too) or hub id; with ``run`` the model that its training started from."""
    loss: str | None = None
    """Training loss; None: that of the run, or dpo."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Parameters of the loss."""
    target: str | None = None
    """Held-out loss: ``likelihood``, or the name of a loss; None: the training loss."""
    reference: str | None = None
    run: Path | None = None
    method: str | None = None
    """Method of the run, whose checkpoints are measured."""
    by: tuple[str, ...] = ()
    """Further columns of the pairs whose values are summed over."""
    limit: int = 256
    """Pairs to measure."""
    shown: int = 10
    """Pairs at either end to show as text."""
    batch_tokens: int = 2048
    max_length: int | None = None
    """Tokens of prompt and response together; None: as the run trained, or 1024."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What is measured at every point."""

    loss: BoundLoss
    target: BoundLoss
    tokens: Dataset
    held: Dataset
    groups: list[str]
    batch_tokens: int
    max_length: int

    def measures(self, model: str, reference: str | None) -> tuple[PairMeasurement, PairMeasurement]:
        """The model loaded, with the training loss and with the held-out loss."""
        products = GradientProducts(load_measured(model))
        itself = reference == model
        compared = None if itself else load_reference(model, reference)
        padding = load_tokenizer(model).pad_token_id
        training = PairMeasurement(
            products, self.loss, padding, compared, self.batch_tokens, self.max_length, is_reference=itself
        )
        return training, replace(training, loss=self.target)


def influence(
    source: PairsSection, held_out_source: PairsSection, settings: InfluenceSettings, output: Path, *, check: bool
) -> None:
    """Measure what a step on each pair does to the held-out loss; write a table, JSON and a page under ``output``.

    With ``check`` it takes real steps instead and writes ``influence-check.json``.

    Raises:
        AlignError: the pairs, the model, the run or a loss cannot be used.
    """
    check_files(output, [FILE, PAGE] if not check else [CHECK], own=[POINTS, FILE, CHECK])
    trained = _training(settings)
    loss, target = _losses(settings, trained)
    length = settings.max_length or (trained.max_length if trained else 1024)
    every = load_pairs(source, carry=True)
    held, told = _held_out(held_out_source, settings, every, trained, target)
    tokenizer = load_tokenizer(settings.model)
    turns: Turns = trained.turns if trained else "assistant"
    pairs = sample_pairs(every, loss, settings.limit, source.path)
    tokens, left_out = tokenized(pairs, tokenizer, length, turns)
    held_tokens, groups, more = _grouped(held, tokenizer, length, turns)
    told += [f"{name}: left out of the pairs, nothing of it is within {length} tokens" for name in left_out] + more
    job = _Job(loss, target, tokens, held_tokens, groups, settings.batch_tokens, length)
    points = _points(settings, trained)
    if check:
        for line in told:
            log.warning("%s", line)
        _check(job, points[-1], settings, output)
        return
    tables = [_measure(output / POINTS / point.name, job, point) for point in points]
    if process_rank() > 0:
        return
    without = [held["adam"] for _, held in tables if held["adam"]]
    if without:
        others = f", and {len(without) - 1} more likewise" if len(without) > 1 else ""
        told.append(f"no influence as AdamW scales steps: {without[0]}{others}")
    told += _not_counted(trained, pairs)
    told += _padding_told(tables[-1][1].get("padding_lookups", (0, 0)))
    for line in told:
        log.warning("%s", line)
    table = combine(tables, points, pairs.select(_places(pairs, tokens)), tokens)
    report = {
        "run": {
            "pairs": source.path, "of": len(every), "held_out": held_out_source.path, "model": settings.model,
            "run": None if settings.run is None else str(settings.run), "method": settings.method,
            "loss": loss.spec.name, "target": settings.target or loss.spec.name,
            "command": shlex.join(["align", *sys.argv[1:]]), "told": told,
        },
        **summarize(table, tables, points, settings.by, settings.shown),
    }  # fmt: skip
    table.to_parquet(str(output / TABLE), batch_size=ROW_GROUP)
    write_json(output / FILE, report)
    write_influence_page(output / PAGE, report)
    log.info("%s", report["sentence"])
    log.info("look at it: open %s", output / PAGE)


def _training(settings: InfluenceSettings) -> TrainedRun | None:
    if (settings.run is None) != (settings.method is None):
        raise ConfigError("--run and --method: found one of them, expected both or neither", code="config-option")
    if settings.run is None or settings.method is None:
        return None
    trained = read_training(settings.run, settings.method, settings.max_length)
    if settings.model != trained.base and fingerprint_model(settings.model) != fingerprint_model(trained.base):
        raise ModelError(
            f"--model {settings.model}: found another model than {trained.base}, which {trained.folder} started from",
            code="influence-checkpoint",
            hint=f"--model {trained.base}",
        )
    return trained


def _losses(settings: InfluenceSettings, trained: TrainedRun | None) -> tuple[BoundLoss, BoundLoss]:
    """The training loss and the held-out loss, each one of a single pair."""
    if trained is not None and settings.loss not in (None, trained.loss.spec.name):
        raise ConfigError(
            f"--loss {settings.loss}: found another loss than {trained.loss.spec.name}, with which the run trained",
            code="config-option",
            hint="leave --loss out; --target names the held-out loss",
        )
    named = resolve(settings.loss or "dpo", dict(settings.parameters))
    loss = of_one_pair(trained.loss if trained is not None else named)
    if settings.target in (None, loss.spec.name):
        return loss, loss
    return loss, of_one_pair(resolve("nll" if settings.target == LIKELIHOOD else str(settings.target), {}))


def _held_out(
    source: PairsSection, settings: InfluenceSettings, pairs: Dataset, trained: TrainedRun | None, target: BoundLoss
) -> tuple[Dataset, list[str]]:
    """The held-out pairs that are not trained on, each with a margin if the loss reads one, and what to tell."""
    held = read_answers(source) if settings.target == LIKELIHOOD else load_pairs(source)
    held, told = distinct(held, pairs, source.path)
    if trained is not None:
        held, more = distinct(held, trained.table(), source.path)
        told += more
    return sample_pairs(held, target, len(held), source.path), told


def _grouped(held: Dataset, tokenizer: Any, length: int, turns: Turns) -> tuple[Dataset, list[str], list[str]]:
    """The held-out pairs as token ids, the group of each, and what to tell about them."""
    tokens, left_out = tokenized(held, tokenizer, length, turns)
    told = [f"{name}: left out of the held-out pairs, nothing of it is within {length} tokens" for name in left_out]
    groups, more = groups_of(held.select(_places(held, tokens)))
    return tokens, groups, told + more


def _places(pairs: Dataset, tokens: Dataset) -> list[int]:
    """Places of the tokenized rows in the table that they come from."""
    at = {str(name): k for k, name in enumerate(pairs["id"])}
    return [at[str(name)] for name in tokens["id"]]


def _points(settings: InfluenceSettings, trained: TrainedRun | None) -> list[Point]:
    """The models to measure: every checkpoint with its learning rate, or the model alone with a rate of 1."""
    if trained is None:
        return [Point("model", None, settings.model, settings.reference, 1.0, _adam(Path(settings.model)))]
    found, since = [], 0
    for step, folder in trained.checkpoints:
        rate = learning_rate(trained.folder, since, step)
        if rate is None:
            raise ModelError(
                f"{trained.folder}: logged no learning rate, expected one to weight its checkpoints by",
                code="influence-checkpoint",
                hint="train with `trainer: {logging_steps: 1}`",
            )
        found.append(Point(f"step-{step:06d}", step, str(folder), trained.reference, rate, _adam(folder)))
        since = step
    return found


def _adam(folder: Path) -> str | None:
    """Why a folder has no state of an optimizer; None where it has the file of one."""
    return None if (folder / OPTIMIZER).is_file() else f"{folder} holds no {OPTIMIZER}"


def _not_counted(trained: TrainedRun | None, pairs: Dataset) -> list[str]:
    """What changes the steps of a training and is not part of the influence."""
    used = list(trained.not_plain) if trained is not None else []
    if "weight" in pairs.column_names:
        used.append("the column `weight`")
    return [f"not counted: {', '.join(used)}; the influence is that of plain steps on each pair"] if used else []


def _padding_told(lookups: Sequence[int]) -> list[str]:
    """What the page says of pairs and held-out pairs that hold the padding token of a model with tied embeddings."""
    if not any(lookups):
        return []
    return [
        f"{lookups[0]} pairs and {lookups[1]} held-out pairs hold the padding token of a model with tied embeddings, "
        "whose look-ups gradients leave out: their influence in a full training is stated without that part"
    ]


def _measure(folder: Path, job: _Job, point: Point) -> tuple[Dataset, dict[str, Any]]:
    """Run the stage that measures one model; return its table and the held-out groups with their losses."""
    optimizer = Path(point.model) / OPTIMIZER
    inputs = {
        "pairs": [str(name) for name in job.tokens["id"]], "content": fingerprint(_read(job.tokens)),
        "held_out": fingerprint(_read(job.held)), "groups": job.groups,
        "model": fingerprint_model(point.model),
        "reference": None if point.reference is None else fingerprint_model(point.reference),
        "loss": [job.loss.spec.name, dict(job.loss.parameters)],
        "target": [job.target.spec.name, dict(job.target.parameters)],
        "optimizer": hash_file(optimizer) if optimizer.is_file() else None,
        "max_length": job.max_length, "revision": REVISION,
    }  # fmt: skip

    def work(partial: Path) -> None:
        made = map_shards(job.tokens, _Start(job, point, partial), partial / "parts", size=SHARD, what="influence",
                          together=True)  # fmt: skip
        if process_rank() == 0:
            made.whole().to_parquet(str(partial / TABLE), batch_size=ROW_GROUP)

    run_stage("influence", folder, inputs, work, collective=True)
    return Dataset.from_parquet(str(folder / TABLE), keep_in_memory=True), read_json(folder / HELD)


def _read(tokens: Dataset) -> Dataset:
    """The columns that a measurement depends on."""
    return tokens.select_columns([n for n in tokens.column_names if n.endswith(("_ids", "_mask")) or n == "margin"])


@dataclass(frozen=True, slots=True)
class _Start:
    """The job of one point in this process: it loads the model and computes the held-out gradients first."""

    job: _Job
    point: Point
    folder: Path

    def start(self) -> InfluenceMeasurement:
        training, target = self.job.measures(self.point.model, self.point.reference)
        products = training.products
        state = None
        if self.point.adam is None:
            state = read_adam_state(Path(self.point.model), products.model, products.measured)
        groups = held_out(target, self.job.held, self.job.groups)
        if process_rank() == 0:
            found = [{"name": group.name, "pairs": group.pairs, "loss": group.loss} for group in groups]
            missing = self.point.adam if state is None else state if isinstance(state, str) else None
            lookups = [report_padding_lookups(products.model, rows) for rows in (self.job.tokens, self.job.held)]
            write_json(self.folder / HELD, {"groups": found, "adam": missing, "padding_lookups": lookups})
        return InfluenceMeasurement(training, directions_of(groups, None if isinstance(state, str) else state))


def _check(job: _Job, point: Point, settings: InfluenceSettings, output: Path) -> None:
    if process_rank() > 0:
        return
    training, target = job.measures(point.model, point.reference)
    products = training.products
    state = read_adam_state(Path(point.model), products.model, products.measured) if point.adam is None else None
    for rows in (job.tokens, job.held):
        report_padding_lookups(products.model, rows)
    found = check_influence(training, target, job.tokens, job.held, None if isinstance(state, str) else state)
    output.mkdir(parents=True, exist_ok=True)
    about = {"model": point.model, "loss": job.loss.spec.name, "target": settings.target or job.loss.spec.name}
    write_json(output / CHECK, about | found)
    shown = {name: [{k: v for k, v in step.items() if k != "changes"} for step in found[name]["steps"]]
             for name in ("sgd", "adamw")}  # fmt: skip
    out.print_json(json.dumps(shown))
    log.info("check: %s", output / CHECK)
