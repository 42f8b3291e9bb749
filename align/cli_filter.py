"""`align filter`: keep the pairs that are worth training on, and say why of every other."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Keep the pairs that are worth training on.", no_args_is_help=True)
Column = Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. chosen=preferred.")]


@app.command("run")
def run(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id; with a `margin` column if any.")],
    output: Annotated[Path, typer.Option(help="Folder to write kept.parquet and dropped.parquet into.")],
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the pairs that pass the rules.")] = 0.5,
    method: Annotated[str, typer.Option(help="top, greedy or threshold.")] = "top",
    margin: Annotated[float, typer.Option(help="Weight of the margin.")] = 1.0,
    quality: Annotated[float, typer.Option(help="Weight of the quality.")] = 0.5,
    diversity: Annotated[float, typer.Option(help="Weight of the diversity.")] = 0.5,
    minimum: Annotated[float | None, typer.Option(help="Least importance, for --method threshold.")] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="k of the k-nearest-neighbour entropy.")] = 5,
    per_group: Annotated[bool, typer.Option("--per-group", help="The same share of each group.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Rule to leave out.")] = None,
    longest: Annotated[int, typer.Option(min=1, help="Words of a response, at most.")] = 2048,
    held_out: Annotated[Path | None, typer.Option(help="Evaluation pairs that nothing may overlap with.")] = None,
    embedding_model: Annotated[str, typer.Option(help="Encoder of the prompts: hub id or folder.")] = (
        "sentence-transformers/all-MiniLM-L6-v2"
    ),
    seed: int = 0,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")] = "train",
) -> None:
    """Hard rules, then margin + quality + diversity; kept and dropped tables and a page."""
    from align.cli import pair_source
    from align.errors import ConfigError
    from align.filtering.rules import RULES
    from align.filtering.run import FilterSettings, filter_pairs

    if method not in {"top", "greedy", "threshold"}:
        raise ConfigError(f"--method {method}: expected top, greedy or threshold", code="filter-option")
    unknown = sorted(set(skip or ()) - {*RULES, "contamination"})
    if unknown:
        known = ", ".join([*RULES, "contamination"])
        raise ConfigError(f"--skip {unknown[0]}: no such rule; rules are {known}", code="filter-option")
    settings = FilterSettings(
        keep=keep, method=method, weights=(margin, quality, diversity), minimum=minimum, neighbours=neighbours,
        per_group=per_group, skip=tuple(skip or ()), longest=longest, embedding_model=embedding_model, seed=seed,
    )  # fmt: skip
    filter_pairs(pair_source(pairs, column, split), settings, output, held_out)


@app.command("explain")
def explain(
    output: Annotated[Path, typer.Argument(help="Folder that `align filter run` wrote.")],
    pair_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a pair.")],
) -> None:
    """All scores of one pair and why it was kept or dropped (JSON)."""
    import json

    from align.console import out
    from align.filtering import run

    out.print_json(json.dumps(run.explain(output, pair_id), default=str))
