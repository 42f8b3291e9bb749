"""`align filter`: keep the pairs that are worth training on, and record for each other pair why it was dropped."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from align.cli.options import (
    Cluster,
    Columns,
    LoadingOptions,
    Seed,
    Split,
    cluster_section,
    expand_options,
    output_folder,
    pair_source,
)

if TYPE_CHECKING:
    from align.config import FilterSection

app = typer.Typer(help="Keep the pairs that are worth training on.", no_args_is_help=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """The ``filter`` section of a configuration; None leaves the section's default."""

    keep: Annotated[
        float | None, typer.Option(help="Share to keep of the pairs that pass the rules, 0.5 if it is not given.")
    ] = None
    method: Annotated[str, typer.Option(help="top, greedy or threshold.")] = "top"
    margin: Annotated[float, typer.Option(help="Weight of the margin.")] = 1.0
    quality: Annotated[float, typer.Option(help="Weight of the quality.")] = 0.5
    diversity: Annotated[float, typer.Option(help="Weight of the diversity.")] = 0.5
    minimum: Annotated[float | None, typer.Option(help="Smallest importance to keep, for --method threshold.")] = None
    in_spreads: Annotated[bool, typer.Option("--in-spreads", help="Divide the margin by `margin_std`.")] = False
    per_group: Annotated[
        bool, typer.Option("--per-group", help="Keep the same share of each group, for --method top.")
    ] = False
    skip: Annotated[list[str] | None, typer.Option(help="Rule to skip, repeatable.")] = None
    longest: Annotated[int, typer.Option(help="Largest number of words of a response.")] = 2048
    language: Annotated[str | None, typer.Option(help="Language code, e.g. en, required of both responses.")] = None
    held_out: Annotated[
        str | None,
        typer.Option(help="Evaluation pairs that no kept pair may overlap with: prompts, responses, runs of words."),
    ] = None
    drop_doubtful: Annotated[
        bool, typer.Option("--drop-doubtful", help="Drop pairs whose margin contradicts the label strongly.")
    ] = False
    neighbours: Annotated[int, typer.Option(help="k of the k-nearest-neighbor entropy.")] = 5
    index: Annotated[str, typer.Option(help="auto, exact, ivf or hnsw.")] = "auto"
    embedding_model: Annotated[str | None, typer.Option(help="Encoder of the prompts: hub id or folder.")] = None
    embedding: Annotated[
        str, typer.Option(help="encoder, or static: token vectors, much faster, blind to word order.")
    ] = "encoder"
    embeddings: Annotated[Path | None, typer.Option(help=".npy file of unit vectors, one row per pair.")] = None
    quality_scorers: Annotated[
        list[str] | None, typer.Option("--quality-scorer", help="screen, fluency, rubric or yes_no; repeatable.")
    ] = None
    quality_model: Annotated[str | None, typer.Option(help="Language model of the quality scorers.")] = None
    ood_model: Annotated[str | None, typer.Option(help="Reward model whose features measure distances.")] = None
    ood_pairs: Annotated[str | None, typer.Option(help="Pairs that this reward model was trained on.")] = None
    processes: Annotated[int, typer.Option(help="Number of processes that read texts.")] = 1

    def section(self, loading: LoadingOptions) -> "FilterSection":
        """The options, and how the reward model of the distances is loaded, as a section of the configuration.

        Raises:
            ConfigError: an option cannot be used; the message names each of them.
        """
        from pydantic import ValidationError

        from align.config import FilterSection
        from align.errors import ConfigError, listed

        if (self.ood_model is None) != (self.ood_pairs is None):
            raise ConfigError("--ood-model and --ood-pairs: give both or neither", code="filter-option")
        given: dict[str, Any] = {name: value for name, value in asdict(self).items() if value is not None}
        if self.embeddings is not None:
            given["embeddings"] = str(self.embeddings)
        if self.ood_model is not None:
            pairs = {"path": given.pop("ood_pairs")}
            given["ood"] = {"model": given.pop("ood_model"), "pairs": pairs} | asdict(loading)
        elif loading != LoadingOptions():
            raise ConfigError(
                "--dtype, --trust-remote-code and --text-pair are of --ood-model, which is not given",
                code="filter-option", hint="leave them out",
            )  # fmt: skip
        try:
            return FilterSection.model_validate(given)
        except ValidationError as error:
            problems = [
                f"--{str(item['loc'][0]).replace('_', '-')}: found {item['input']!r}; {item['msg']}"
                for item in error.errors()
            ]
            raise ConfigError(f"align filter:\n{listed(problems)}", code="filter-option") from None


@app.command("run")
@expand_options
def run(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id; a `margin` column is used.")],
    output: Annotated[Path, output_folder("Folder to write kept.parquet and dropped.parquet into.")],
    options: FilterOptions,
    loading: LoadingOptions,
    cluster: Cluster = None,
    seed: Seed = 0,
    column: Columns = None,
    split: Split = "train",
) -> None:
    """Apply hard rules, then rank by margin + quality + diversity; write kept and dropped pairs and a page."""
    settings = options.section(loading)
    from align.commands.filter import CACHE, filter_source
    from align.io.console import log

    filter_source(
        pair_source(pairs, column, split), settings, output, seed=seed, cache=output / CACHE,
        cluster=cluster_section(cluster),
    )  # fmt: skip
    log.info("train on it: pairs.path: %s", output / "kept.parquet")


@app.command("explain")
def explain(
    output: Annotated[Path, typer.Argument(help="Folder that `align filter run` wrote.")],
    pair_id: Annotated[str, typer.Argument(metavar="ID", help="Id of a pair.")],
) -> None:
    """All scores of one pair and why it was kept or dropped (JSON)."""
    import json

    from align.filtering.tables import explain
    from align.io.console import out

    out.print_json(json.dumps(explain(output, pair_id), default=str))
