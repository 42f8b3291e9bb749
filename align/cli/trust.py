"""`align trust` and `align advise`: measure before any training how far labels and margins can be trusted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import NearCopies, Seed, Split, expand_options, output_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustOptions:
    """Pairs with margins and the reference model."""

    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id, with a `margin` column.")]
    model: Annotated[str, typer.Option(help="Reference model: folder or hub id.")]
    output: Annotated[Path, output_folder("Folder to write trust.json and trust.html into; keeps the features.")]
    margins: Annotated[
        str | None,
        typer.Option(
            help="Origin of the margins: outside, cross-fitted or in-sample; default: what their run recorded."
        ),
    ] = None
    allow_in_sample: Annotated[
        bool, typer.Option("--allow-in-sample", help="Accept margins of a model that was trained on these labels.")
    ] = False
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 1024
    seed: Seed = 0
    column: Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. margin=score_gap.")] = None
    split: Split = "train"
    near_copies: NearCopies = False


@expand_options
def trust(options: TrustOptions) -> None:
    """Measure on held-out labels, before any training, how far to trust the labels and how far the margins."""
    from align.commands.trust import MEASURED

    _run(options, MEASURED)


@expand_options
def advise(options: TrustOptions) -> None:
    """Advise before the GPU hours: the best setting, its expected gain, the use of more pairs, shared errors."""
    from align.commands.trust import ADVICE

    _run(options, ADVICE)


def _run(options: TrustOptions, sentences: tuple[str, ...]) -> None:
    from align.cli.options import pair_source
    from align.commands import trust as commands
    from align.data.training_pairs import SOURCES
    from align.errors import ConfigError

    if options.margins is not None and options.margins not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(f"--margins {options.margins}: expected one of {known}", code="config-option")
    commands.trust(
        pair_source(options.pairs, options.column, options.split, near_copies=options.near_copies), options.model,
        options.output,
        margins=options.margins, allow_in_sample=options.allow_in_sample, max_length=options.max_length,
        seed=options.seed, printed=sentences,
    )  # fmt: skip
