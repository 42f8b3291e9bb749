"""`align data sources` and `align data next-to-check`: whose labels to doubt, and which pairs to check."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from align.cli.options import Columns, Seed, Split, expand_options, output_folder, pair_source

if TYPE_CHECKING:
    from align.config import PairsSection

ORDERS = ("random", "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Pairs, and those of them or others that a person has checked."""

    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")]
    checked: Annotated[str | None, typer.Option(help="Pairs whose label a person vouches for, a source as PAIRS.")] = (
        None
    )
    by: Annotated[
        str | None, typer.Option(help="Column of the sources; default: source, dataset or group, the first there is.")
    ] = None
    column: Columns = None
    split: Split = "train"

    def source(self) -> "PairsSection":
        """The section of the pairs, with the checked ones."""
        from align.config import CheckedSection

        section = pair_source(self.pairs, self.column, self.split)
        if self.checked is None:
            return section
        return section.model_copy(update={"checked": CheckedSection(path=self.checked, columns=section.columns)})


@expand_options
def sources(
    table: TableOptions,
    model: Annotated[str, typer.Option(help="Model whose frozen features the heads read: folder or hub id.")],
    output: Annotated[Path, output_folder("Folder to write sources.json into; keeps the features.")],
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 1024,
    seed: Seed = 0,
) -> None:
    """Judge the labels of each source by the other sources and the checked pairs; advise pairs.checked.share."""
    from align.commands.judge_sources import judge

    judge(table.source(), model, output, by=table.by, max_length=max_length, seed=seed)


@expand_options
def next_to_check(
    table: TableOptions,
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines to write, e.g. to-check.jsonl.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Pairs to write, at most.")] = 50,
    order: Annotated[
        str,
        typer.Option(
            help="random: a fair sample of every source, for training and for the rate of wrong labels; margin: the "
            "lowest cross-fitted margins first, for reading."
        ),
    ] = "random",
) -> None:
    """Write the pairs that a person should check next; those of --checked are left out."""
    from align.commands.judge_sources import next_to_check as write
    from align.errors import ConfigError

    if order not in ORDERS:
        raise ConfigError(f"--order {order}: expected one of {', '.join(ORDERS)}", code="config-option")
    write(table.source(), output, count=n, order=order, by=table.by)
