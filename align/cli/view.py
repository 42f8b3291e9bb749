"""`align view` and `align data apply`: look at pairs, and take over what was decided about them."""

from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Columns, Split, pair_source


def view(
    given: Annotated[list[str], typer.Argument(help="Pair tables, or folders of runs.", metavar="PAIRS|RUN...")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    who: Annotated[str | None, typer.Option(help="Name that goes with your decisions; default: yours here.")] = None,
    decisions: Annotated[
        Path | None, typer.Option(help="File of the decisions; default: decisions.jsonl beside the table.")
    ] = None,
    text_cache: Annotated[bool, typer.Option(help="Copy the texts to the temporary folder for fast search.")] = True,
    column: Columns = None,
    split: Split = "train",
) -> None:
    """Open a local page to see, sort, compare and correct pairs, and to follow runs."""
    from align.commands.view import view as serve

    columns = pair_source(given[0], column, split).columns if column else {}
    serve(
        given, port=port, browser=browser, who=who, decisions=decisions, columns=columns, split=split,
        text_cache=text_cache,
    )  # fmt: skip
