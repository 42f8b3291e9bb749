"""`align pairs`: preference pairs from sampled completions."""

from pathlib import Path
from typing import Annotated, cast

import typer

from align.cli.options import LoadingOptions, expand_options, output_folder

app = typer.Typer(help="Build preference pairs.", no_args_is_help=True)


@app.command("build")
@expand_options
def build(
    completions: Annotated[str, typer.Argument(help="What `align generate` wrote: its folder or file.")],
    output: Annotated[Path, output_folder("Folder to write pairs.parquet into.")],
    reward_model: Annotated[str | None, typer.Option(help="Reward model: folder or hub id.")] = None,
    judge: Annotated[str | None, typer.Option(help="vader, or yes-no:MODEL for a language model.")] = None,
    mode: Annotated[str, typer.Option(help="best_worst, band or all.")] = "best_worst",
    band: Annotated[tuple[float, float] | None, typer.Option(help="Smallest and largest margin, for band.")] = None,
    guard_margin: Annotated[float, typer.Option(help="Drop a pair whose scores differ by less.")] = 0.0,
    guard_ratio: Annotated[float | None, typer.Option(help="Largest P(yes) of rejected / P(yes) of chosen.")] = None,
    temperature: Annotated[float, typer.Option(help="Divides the rewards.")] = 1.0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 4096,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text.")] = 2048,
    *,
    loading: LoadingOptions,
) -> None:
    """Score the completions of each prompt and pair them; print the counts (JSON)."""
    import json

    from align.commands.build_pairs import METRICS, BuildSettings, build_pairs
    from align.generation.pair_selection import Mode
    from align.io.console import log, out
    from align.io.files import read_json
    from reward_models.scorers import ScorerSpec

    settings = BuildSettings(
        scorer=ScorerSpec(reward_model, judge, batch_tokens, max_length, loading.load_options()),
        mode=cast(Mode, mode),
        guard_margin=guard_margin,
        guard_ratio=guard_ratio,
        band=band,
        temperature=temperature,
    )
    build_pairs(completions, settings, output)
    out.print_json(json.dumps(read_json(output / METRICS)))
    log.info("train on them with `pairs.path: %s`", output / "pairs.parquet")
