"""`align pairs`: preference pairs from sampled completions, or from a table of responses."""

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
    from align.data.pair_selection import Mode
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


@app.command("from")
@expand_options
def from_responses(
    table: Annotated[str, typer.Argument(help="Responses with scores, votes, battles or thumbs (docs/data.md).")],
    output: Annotated[Path, output_folder("Folder to write pairs.parquet, lists.jsonl or thumbs.jsonl into.")],
    view: Annotated[
        list[str] | None,
        typer.Option(
            help="best_worst (default), all, adjacent, band, votes, raters, ties; or lists; or thumbs. Views of "
            "pairs can be given together."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="responses, rows, ultrafeedback, helpsteer or arena; default: by the columns.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="HelpSteer: ATTRIBUTE=WEIGHT of the score; default: helpfulness=1.")
    ] = None,
    band: Annotated[tuple[float, float] | None, typer.Option(help="Smallest and largest margin, for band.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least score of a thumb up, for thumbs.")] = None,
    drop_invalid: Annotated[bool, typer.Option(help="Leave invalid rows out.")] = False,
) -> None:
    """Make pairs, lists or thumbs of a table of responses; print what was made and what was left out (JSON)."""
    import json

    from align.commands.pairs_from import ViewSettings, pairs_from, read_weights
    from align.config import PairsSection
    from align.data.response_table import Shape
    from align.data.response_views import View
    from align.io.console import out

    settings = ViewSettings(
        views=cast(tuple[View, ...], tuple(view or ["best_worst"])),
        shape=cast(Shape | None, shape),
        weights=read_weights(score or []),
        band=band,
        threshold=threshold,
    )
    metrics = pairs_from(PairsSection(path=table, drop_invalid=drop_invalid), settings, output)
    out.print_json(json.dumps(metrics))
