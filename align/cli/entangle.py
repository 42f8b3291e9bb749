"""`align entangle`: measure gradient entanglement, follow it over checkpoints, check its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.options import Cluster, Columns, Split, cluster_section, expand_options, output_folder, pair_source

if TYPE_CHECKING:
    from align.config import PairsSection

app = typer.Typer(help="Measure how the gradients of chosen and rejected responses interact.", no_args_is_help=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """Pairs, policy and loss."""

    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")]
    model: Annotated[str, typer.Option(help="Policy: folder (may be an adapter) or hub id.")]
    output: Annotated[Path, output_folder("Folder to write into.")]
    loss: Annotated[str, typer.Option(help="Loss in use: dpo, madpo, ipo, simpo, dpop, ...")] = "dpo"
    parameter: Annotated[list[str] | None, typer.Option(help="Parameter of the loss: --parameter beta=0.1")] = None
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 1024
    column: Columns = None
    split: Split = "train"

    def source(self) -> "PairsSection":
        """The pairs as a section of the configuration."""
        return pair_source(self.pairs, self.column, self.split)

    def parameters(self) -> dict[str, float | bool]:
        """Parameters of the loss by name, each value read as in the YAML of a run.

        Raises:
            ConfigError: one is not ``name=value``, or its value is no number and no boolean.
        """
        return loss_parameters(self.parameter or [])


def loss_parameters(given: Sequence[str]) -> "dict[str, float | bool]":
    """Parameters of a loss by name from options ``name=value``, each value read as in the YAML of a run.

    Raises:
        ConfigError: one is not ``name=value``, or its value is no number and no boolean.
    """
    from pydantic import ValidationError
    from yaml import YAMLError

    from align.config import LossSection
    from align.config.safe_yaml import load_yaml
    from align.errors import ConfigError

    found: dict[str, float | bool] = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not (name and sign and value):
            raise ConfigError(f"--parameter {item}: expected name=number", code="config-option")
        try:
            read = LossSection.model_validate({"loss": "", "parameters": {name: load_yaml(value)}})
        except (ValidationError, YAMLError, ValueError):
            expected = "expected a finite number, or true or false"
            raise ConfigError(f"--parameter {item}: found {value!r}, {expected}", code="config-option") from None
        found |= read.parameters
    return found


@app.command("report")
@expand_options
def report(
    options: MeasureOptions,
    reference: Annotated[
        str | None, typer.Option(help="Reference model; default: the model without its adapter.")
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="Regular expression: measure only these parameters.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of pairs to measure.")] = 256,
    shown: Annotated[int, typer.Option(min=0, help="Number of pairs to show token by token.")] = 8,
    matrices: Annotated[int, typer.Option(min=0, help="Number of these to show token against token.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    cluster: Cluster = None,
) -> None:
    """Exact gradient products of each pair, verdicts, a table (Parquet) and a page (HTML)."""
    from align.commands import entangle as commands

    settings = commands.ReportSettings(
        options.model, options.loss, options.parameters(), reference, parameters, limit, shown, matrices, batch_tokens,
        options.max_length, cluster_section(cluster),
    )  # fmt: skip
    commands.report(options.source(), settings, options.output)


@app.command("losses")
def losses(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")],
    model: Annotated[str, typer.Option(help="Policy: folder (may be an adapter) or hub id.")],
    output: Annotated[Path, output_folder("Folder to write into.")],
    reference: Annotated[
        str | None, typer.Option(help="Reference model; default: the model without its adapter.")
    ] = None,
    parameters: Annotated[str | None, typer.Option(help="Regular expression: measure only these parameters.")] = None,
    sums: Annotated[list[str] | None, typer.Option("--sum", help="A sum to compare too: --sum madpo=1,nll=0.1")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of pairs to measure.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 1024,
    optimizer: Annotated[
        str | None,
        typer.Option(help="Also under AdamW's preconditioner: first-step, or a checkpoint with optimizer.pt."),
    ] = None,
    column: Columns = None,
    split: Split = "train",
    cluster: Cluster = None,
) -> None:
    """Every loss on the same pairs: which of them would lower your chosen responses, and how much NLL prevents it."""
    from align.commands.entangle_losses import LossesSettings, compare

    settings = LossesSettings(
        model, reference, parameters, tuple(sums or ()), limit, batch_tokens, max_length, optimizer,
        cluster_section(cluster),
    )  # fmt: skip
    compare(pair_source(pairs, column, split), settings, output)


@app.command("trace")
def trace(
    run: Annotated[Path, typer.Argument(help="Folder of a run, e.g. runs/my-madpo.")],
    method: Annotated[str, typer.Option(help="Method whose checkpoints to measure.")],
    limit: Annotated[int, typer.Option(min=4, help="Number of pairs to measure at each checkpoint.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a pair [as trained].")] = None,
) -> None:
    """Measure the same pairs at each saved checkpoint of a training: when do steps start to go wrong?"""
    from align.commands import entangle as commands

    commands.trace(run, method, limit=limit, batch_tokens=batch_tokens, max_length=max_length)


@app.command("check")
@expand_options
def check(
    options: MeasureOptions,
    sgd: Annotated[float, typer.Option(help="Learning rate of the SGD steps.")] = 1e-2,
    adamw: Annotated[float, typer.Option(help="Learning rate of the AdamW steps.")] = 1e-5,
    limit: Annotated[int, typer.Option(min=1, help="Number of pairs to predict; half of them are trained on.")] = 16,
) -> None:
    """Compare predicted with observed changes of log-probs over real optimizer steps on a copy (JSON)."""
    from align.commands import entangle as commands

    commands.check(
        options.source(), options.model, options.output, loss=options.loss, parameters=options.parameters(),
        rates={"sgd": sgd, "adamw": adamw}, limit=limit, max_length=options.max_length,
    )  # fmt: skip


@app.command("influence")
def influence(
    pairs: Annotated[str, typer.Argument(help="Pairs whose influence is measured: file, saved dataset or hub id.")],
    held_out: Annotated[str, typer.Option(help="Held-out pairs whose loss is explained.")],
    model: Annotated[str, typer.Option(help="Policy: folder (may be an adapter) or hub id; of a run, its start.")],
    output: Annotated[Path, output_folder("Folder to write into.")],
    run: Annotated[Path | None, typer.Option(help="Folder of a run: sum over its checkpoints.")] = None,
    method: Annotated[str | None, typer.Option(help="Method of the run.")] = None,
    loss: Annotated[str | None, typer.Option(help="Training loss [of the run, or dpo].")] = None,
    parameter: Annotated[list[str] | None, typer.Option(help="Parameter of the loss: --parameter beta=0.1")] = None,
    target: Annotated[
        str | None, typer.Option(help="Held-out loss: a loss, or likelihood (of given responses) [the training loss].")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="Reference model [the model without its adapter].")] = None,
    by: Annotated[list[str] | None, typer.Option(help="Column of the pairs to sum over, beside source, group.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare predictions with real steps instead (JSON).")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Number of pairs to measure.")] = 256,
    shown: Annotated[int, typer.Option(min=0, help="Number of pairs at either end to show as text.")] = 10,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a pair [as trained, or 1024].")] = None,
    column: Columns = None,
    held_out_column: Annotated[list[str] | None, typer.Option(help="Column mapping of the held-out pairs.")] = None,
    split: Split = "train",
) -> None:
    """Which pairs raised or lowered a held-out loss? A table, JSON and a page: an explanation, not a filter score."""
    from align.commands.influence import InfluenceSettings
    from align.commands.influence import influence as measure

    settings = InfluenceSettings(
        model, loss, loss_parameters(parameter or []), target, reference, run, method, tuple(by or ()), limit, shown,
        batch_tokens, max_length,
    )  # fmt: skip
    measure(
        pair_source(pairs, column, split), pair_source(held_out, held_out_column, split), settings, output, check=check
    )
