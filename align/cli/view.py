"""`align view` and `align data apply`: look at pairs, and take over what was decided about them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Columns, Split, output_folder, pair_source


def view(
    given: Annotated[
        list[str], typer.Argument(help="Pair tables, folders of runs, folders of measurements.", metavar="PAIRS|RUN...")
    ],
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


def apply(
    pairs: Annotated[str, typer.Argument(help="The pair table that was judged.")],
    decisions: Annotated[list[Path], typer.Argument(help="decisions.jsonl of one or several people.")],
    output: Annotated[Path, output_folder("Folder to write pairs.parquet, apply.json and decisions.jsonl into.")],
    column: Columns = None,
    split: Split = "train",
    skip_changed: Annotated[
        bool, typer.Option("--skip-changed", help="Leave pairs as they are whose texts have changed since.")
    ] = False,
) -> None:
    """Carry out the decisions of `align view`: a corrected table with who decided what; conflicts are listed."""
    from align.commands.apply_decisions import apply_decisions
    from align.io.console import out

    found = apply_decisions(pair_source(pairs, column, split), decisions, output, skip_changed=skip_changed)
    out.print_json(json.dumps({name: found[name] for name in ("rows", "done", "left_out", "conflicts")}))
