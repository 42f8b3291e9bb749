"""`align filter`: keep the pairs that are worth training on, and say why of every other."""

from pathlib import Path
from typing import Annotated, Any

import typer

from align.cli.options import Cluster, Seed, cluster_called, output_folder

app = typer.Typer(help="Keep the pairs that are worth training on.", no_args_is_help=True)
Column = Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. chosen=preferred.")]


@app.command("run")
def run(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id; with a `margin` column if any.")],
    output: Annotated[Path, output_folder("Folder to write kept.parquet and dropped.parquet into.")],
    keep: Annotated[float, typer.Option(help="Share of the pairs that pass the rules.")] = 0.5,
    method: Annotated[str, typer.Option(help="top, greedy or threshold.")] = "top",
    margin: Annotated[float, typer.Option(help="Weight of the margin.")] = 1.0,
    quality: Annotated[float, typer.Option(help="Weight of the quality.")] = 0.5,
    diversity: Annotated[float, typer.Option(help="Weight of the diversity.")] = 0.5,
    minimum: Annotated[float | None, typer.Option(help="Least importance, for --method threshold.")] = None,
    in_spreads: Annotated[bool, typer.Option("--in-spreads", help="Divide the margin by `margin_std`.")] = False,
    per_group: Annotated[bool, typer.Option("--per-group", help="The same share of each group.")] = False,
    skip: Annotated[list[str] | None, typer.Option(help="Rule to leave out.")] = None,
    longest: Annotated[int, typer.Option(help="Words of a response, at most.")] = 2048,
    language: Annotated[str | None, typer.Option(help="Code, e.g. en, that both responses must be in.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Evaluation pairs that nothing may overlap with.")] = None,
    drop_doubtful: Annotated[bool, typer.Option("--drop-doubtful", help="Drop labels that margins deny.")] = False,
    neighbours: Annotated[int, typer.Option(help="k of the k-nearest-neighbour entropy.")] = 5,
    index: Annotated[str, typer.Option(help="auto, exact, ivf or hnsw.")] = "auto",
    embedding_model: Annotated[str | None, typer.Option(help="Encoder of the prompts: hub id or folder.")] = None,
    embedding: Annotated[str, typer.Option(help="encoder, or static: far faster, no stand-in for it.")] = "encoder",
    embeddings: Annotated[Path | None, typer.Option(help=".npy file of unit vectors, a row per pair.")] = None,
    quality_scorer: Annotated[list[str] | None, typer.Option(help="screen, fluency, rubric or yes_no.")] = None,
    quality_model: Annotated[str | None, typer.Option(help="Language model of the quality scorers.")] = None,
    ood_model: Annotated[str | None, typer.Option(help="Reward model to measure distances with.")] = None,
    ood_pairs: Annotated[str | None, typer.Option(help="Pairs that the reward model was trained on.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that read texts.")] = 1,
    cluster: Cluster = None,
    seed: Seed = 0,
    column: Column = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")] = "train",
) -> None:
    """Hard rules, then margin + quality + diversity; kept and dropped tables and a page."""
    from align.cli.options import pair_source
    from align.errors import ConfigError

    if (ood_model is None) != (ood_pairs is None):
        raise ConfigError("--ood-model and --ood-pairs: give both or neither", code="filter-option")
    given: dict[str, Any] = {
        "keep": keep, "method": method, "margin": margin, "quality": quality, "diversity": diversity,
        "minimum": minimum, "in_spreads": in_spreads, "per_group": per_group, "skip": skip, "longest": longest,
        "language": language, "held_out": held_out, "drop_doubtful": drop_doubtful,
        "neighbours": neighbours, "index": index, "embedding_model": embedding_model, "embedding": embedding,
        "embeddings": embeddings and str(embeddings), "quality_scorers": quality_scorer, "quality_model": quality_model,
        "ood": ood_model and {"model": ood_model, "pairs": {"path": ood_pairs}}, "processes": processes,
    }  # fmt: skip
    settings = _settings({name: value for name, value in given.items() if value is not None})
    from align.commands.filter import CACHE, filter_source
    from align.io.console import log

    log.info("filter %s: keep %g of what passes the rules, seed %d, writes %s", pairs, settings.keep, seed, output)
    filter_source(
        pair_source(pairs, column, split),
        settings,
        output,
        seed=seed,
        cache=output / CACHE,
        cluster=cluster_called(cluster),
    )
    log.info("train on it: pairs.path: %s", output / "kept.parquet")


@app.command("explain")
def explain(
    output: Annotated[Path, typer.Argument(help="Folder that `align filter run` wrote.")],
    pair_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a pair.")],
) -> None:
    """All scores of one pair and why it was kept or dropped (JSON)."""
    import json

    from align.filtering import tables as result
    from align.io.console import out

    out.print_json(json.dumps(result.explain(output, pair_id), default=str))


def _settings(given: dict[str, Any]) -> Any:
    """The options as a ``filter`` section; what is wrong with them is said by option."""
    from pydantic import ValidationError

    from align.config import FilterSection
    from align.errors import ConfigError, listed

    try:
        return FilterSection.model_validate(given)
    except ValidationError as error:
        problems = [
            f"--{str(item['loc'][0]).replace('_', '-')}: found {item['input']!r}; {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(f"align filter:\n{listed(problems)}", code="filter-option") from None
