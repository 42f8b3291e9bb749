"""`align trust` and `align advise`: how far to believe label and margin, before any training."""

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Seed, output_folder

Pairs = Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id, with a `margin` column.")]
Model = Annotated[str, typer.Option(help="Reference model: folder or hub id.")]
Output = Annotated[Path, output_folder("Folder to write trust.json and trust.html into; keeps the features.")]
Margins = Annotated[
    str | None,
    typer.Option(help="Where the margins come from: outside, cross-fitted or in-sample; default: what their run says."),
]
Insist = Annotated[bool, typer.Option("--allow-in-sample", help="Go on with margins that have seen the labels.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")]
Column = Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. margin=score_gap.")]
Split = Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")]


def trust(
    pairs: Pairs,
    model: Model,
    output: Output,
    margins: Margins = None,
    allow_in_sample: Insist = False,
    max_length: MaxLength = 1024,
    seed: Seed = 0,
    column: Column = None,
    split: Split = "train",
) -> None:
    """How far to believe the label, how far the margin: measured on held-out labels, before any training."""
    _run(pairs, model, output, margins, allow_in_sample, max_length, seed, column, split, advise_only=False)


def advise(
    pairs: Pairs,
    model: Model,
    output: Output,
    margins: Margins = None,
    allow_in_sample: Insist = False,
    max_length: MaxLength = 1024,
    seed: Seed = 0,
    column: Column = None,
    split: Split = "train",
) -> None:
    """Advice before the GPU hours: which setting, what to expect of it, would more pairs help, shared errors."""
    _run(pairs, model, output, margins, allow_in_sample, max_length, seed, column, split, advise_only=True)


def _run(
    pairs: str,
    model: str,
    output: Path,
    margins: str | None,
    allow_in_sample: bool,
    max_length: int,
    seed: int,
    column: list[str] | None,
    split: str,
    *,
    advise_only: bool,
) -> None:
    from align.cli.options import pair_source
    from align.commands import trust as commands
    from align.errors import ConfigError
    from align.trust.measure import SOURCES

    if margins is not None and margins not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(f"--margins {margins}: expected one of {known}", code="config-option")
    commands.trust(
        pair_source(pairs, column, split), model, output, margins=margins, allow_in_sample=allow_in_sample,
        max_length=max_length, seed=seed, printed=commands.ADVICE if advise_only else commands.MEASURED,
    )  # fmt: skip
