"""`align entangle`: gradient entanglement measured, explained, and its predictions checked."""

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Cluster, cluster_called, output_folder

app = typer.Typer(help="Measure how the gradients of chosen and rejected responses interact.", no_args_is_help=True)
Pairs = Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")]
Model = Annotated[str, typer.Option(help="Policy: folder (an adapter's too) or hub id.")]
Output = Annotated[Path, output_folder("Folder to write into.")]
Loss = Annotated[str, typer.Option(help="Loss in use: dpo, madpo, ipo, simpo, dpop, ...")]
Parameter = Annotated[list[str] | None, typer.Option(help="Parameter of the loss: --parameter beta=0.1")]
Column = Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. chosen=preferred.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")]


@app.command("report")
def report(
    pairs: Pairs,
    model: Model,
    output: Output,
    loss: Loss = "dpo",
    parameter: Parameter = None,
    reference: Annotated[str | None, typer.Option(help="Reference model; default: the adapter off.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Measure only parameters whose name matches.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Pairs to measure.")] = 256,
    shown: Annotated[int, typer.Option(min=0, help="Pairs to show token by token.")] = 8,
    matrices: Annotated[int, typer.Option(min=0, help="Of these, pairs to show token against token.")] = 1,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    max_length: MaxLength = 1024,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")] = "train",
    cluster: Cluster = None,
) -> None:
    """Exact gradient products of each pair, verdicts, a table (Parquet) and a page (HTML)."""
    from align.cli.options import pair_source
    from align.commands import entangle as commands

    settings = commands.ReportSettings(
        model, loss, _numbers(parameter), reference, parameters, limit, shown, matrices, batch_tokens, max_length,
        cluster_called(cluster),
    )  # fmt: skip
    commands.report(pair_source(pairs, column, split), settings, output)


@app.command("trace")
def trace(
    run: Annotated[Path, typer.Argument(help="Folder of a run, e.g. runs/my-madpo.")],
    method: Annotated[str, typer.Option(help="Method whose checkpoints to measure.")],
    limit: Annotated[int, typer.Option(min=4, help="Pairs to measure at each checkpoint.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 2048,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a pair [as trained].")] = None,
) -> None:
    """The same pairs over the saved checkpoints of a training: from which step on would steps go wrong?"""
    from align.commands import entangle as commands

    commands.trace(run, method, limit=limit, batch_tokens=batch_tokens, max_length=max_length)


@app.command("check")
def check(
    pairs: Pairs,
    model: Model,
    output: Output,
    loss: Loss = "dpo",
    parameter: Parameter = None,
    sgd: Annotated[float, typer.Option(help="Learning rate of the SGD steps.")] = 1e-2,
    adamw: Annotated[float, typer.Option(help="Learning rate of the AdamW steps.")] = 1e-5,
    limit: Annotated[int, typer.Option(min=1, help="Pairs to predict; half of them are trained on.")] = 16,
    max_length: MaxLength = 1024,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")] = "train",
) -> None:
    """Are the predictions true? Real steps on a copy, predicted against observed changes (JSON)."""
    from align.cli.options import pair_source
    from align.commands import entangle as commands

    rates = {"sgd": sgd, "adamw": adamw}
    commands.check(
        pair_source(pairs, column, split), model, output, loss=loss, parameters=_numbers(parameter), rates=rates,
        limit=limit, max_length=max_length,
    )  # fmt: skip


def _numbers(items: list[str] | None) -> dict[str, float | bool]:
    """``name=value`` of each, read as the parameters of a run's loss are."""
    from pydantic import ValidationError
    from yaml import YAMLError

    from align.config import LossSection
    from align.config.safe_yaml import load_yaml
    from align.errors import ConfigError

    found: dict[str, float | bool] = {}
    for item in items or []:
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
