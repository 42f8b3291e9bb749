"""`align eval`: is the aligned model better, by how much, at what price."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from align.cli.options import Cluster, Seed, cluster_called, output_folder

if TYPE_CHECKING:
    from align.commands.evaluate import Settings
    from align.generation.types import EngineName

app = typer.Typer(help="Rewards, win rates and KL of policies; accuracy of reward models.", no_args_is_help=True)
Policies = Annotated[list[str], typer.Argument(metavar="POLICY...", help="NAME=FOLDER or FOLDER; an adapter's too.")]
Prompts = Annotated[str, typer.Option(help="Held-out prompts: a file with one `prompt` per row.")]
Output = Annotated[Path, output_folder("Folder to write into; several commands share one page there.")]
Judge = Annotated[str, typer.Option(help="vader, yes-no:MODEL, a reward model, or llm:MODEL (compare only).")]
Reference = Annotated[str | None, typer.Option(help="Reference model; default: what the adapters were trained on.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of a completion, at most.")]
Rows = Annotated[int, typer.Option(min=1, help="Completions per forward pass.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first so many prompts.")]
Shown = Annotated[int, typer.Option(min=0, help="Prompts whose completions the page shows.")]
Engine = Annotated[str, typer.Option(help="auto, vllm or transformers.")]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens that a reward model or llm: judge reads (1024).")]
Heat = Annotated[float, typer.Option(min=0.0, help="Decoding temperature; 0 is greedy.")]


@app.command("reward")
def reward(
    policies: Policies,
    prompts: Prompts,
    output: Output,
    judge: Judge = "vader",
    reference: Reference = None,
    temperature: Heat = 1.0,
    max_new_tokens: Tokens = 64,
    engine: Engine = "auto",
    batch_size: Rows = 64,
    limit: Limit = None,
    shown: Shown = 100,
    max_length: Length = None,
    seed: Seed = 0,
    cluster: Cluster = None,
) -> None:
    """Reward of policies on held-out prompts, gain over the reference, KL, gain per sqrt(2 KL), what degraded."""
    from align.commands import evaluate as commands

    settings = _settings(
        prompts, output, judge, temperature, max_new_tokens, engine, batch_size, limit, shown, seed,
        cluster, max_length,
    )  # fmt: skip
    commands.reward(policies, reference, settings)


@app.command("compare")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Policy: NAME=FOLDER or FOLDER.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.")],
    prompts: Prompts,
    output: Output,
    judge: Judge = "vader",
    temperature: Heat = 1.0,
    max_new_tokens: Tokens = 64,
    engine: Engine = "auto",
    batch_size: Rows = 64,
    limit: Limit = None,
    shown: Shown = 100,
    max_length: Length = None,
    seed: Seed = 0,
    cluster: Cluster = None,
) -> None:
    """Win rate of A over B: both orders asked, ties half, length-controlled, with intervals over prompts."""
    from align.commands import evaluate as commands

    settings = _settings(
        prompts, output, judge, temperature, max_new_tokens, engine, batch_size, limit, shown, seed,
        cluster, max_length,
    )  # fmt: skip
    commands.write_comparison(a, b, settings)


@app.command("frontier")
def frontier(
    policies: Policies,
    prompts: Prompts,
    output: Output,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="Decoding temperatures, repeated.")] = None,
    checkpoints: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER with checkpoint-<step> folders, repeated.")
    ] = None,
    judge: Judge = "vader",
    reference: Reference = None,
    max_new_tokens: Tokens = 64,
    engine: Engine = "auto",
    batch_size: Rows = 64,
    limit: Limit = None,
    max_length: Length = None,
    seed: Seed = 0,
    cluster: Cluster = None,
) -> None:
    """Reward against KL over decoding temperatures and over training checkpoints, as one plot."""
    from align.commands import evaluate as commands

    settings = _settings(
        prompts, output, judge, 1.0, max_new_tokens, engine, batch_size, limit, 0, seed, cluster,
        max_length,
    )  # fmt: skip
    commands.frontier(policies, reference, temperature or [0.5, 0.75, 1.0], checkpoints or [], settings)


@app.command("reward-model")
def reward_model(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id; RewardBench's columns are known.")],
    model: Annotated[str, typer.Option(help="Reward model: folder or hub id.")],
    output: Annotated[Path, output_folder("Folder to write reward_model.json and reward_model.html into.")],
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--text", help="Plain pairs as a user's and an assistant's message, or joined."),
    ] = None,
    column: Annotated[list[str] | None, typer.Option(help="Column mapping, e.g. group=category.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub dataset or saved dataset.")] = "train",
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="Leave invalid rows out.")] = False,
    limit: Limit = None,
    trained_on: Annotated[str | None, typer.Option(help="Its training pairs: say which pairs are unlike them.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Padded tokens per batch.")] = 4096,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens per text.")] = 1024,
    seed: Seed = 0,
) -> None:
    """Pair accuracy by category, calibration, global AUC, length bias, unlike pairs, worst disagreements."""
    from align.cli.options import pair_source
    from align.commands.evaluate_reward_model import evaluate

    source = pair_source(pairs, column, split).model_copy(update={"drop_invalid": drop_invalid, "limit": limit})
    evaluate(
        source, model, output, chat=chat, batch_tokens=batch_tokens, max_length=max_length, seed=seed,
        trained_on=trained_on,
    )  # fmt: skip


@app.command("page")
def page(output: Annotated[Path, typer.Argument(help="Folder of an evaluation.")]) -> None:
    """Render report.html of an evaluation again from its report.json."""
    from align.commands import evaluate as commands

    commands.page(output)


def _settings(
    prompts: str,
    output: Path,
    judge: str,
    temperature: float,
    max_new_tokens: int,
    engine: str,
    batch_size: int,
    limit: int | None,
    shown: int,
    seed: int,
    cluster: str | None,
    max_length: int | None,
) -> "Settings":
    from align.commands.evaluate import Settings
    from align.generation.types import Sampling

    sampling = Sampling(
        max_new_tokens, temperature, seed=seed, engine=cast("EngineName", engine), batch_size=batch_size
    )
    return Settings(prompts, output, judge, sampling, limit, shown, max_length, cluster_called(cluster))
