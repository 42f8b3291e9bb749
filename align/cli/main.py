"""The ``align`` command: one verb per stage, ``align run`` for all of them; arguments only, no logic."""

import json
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from align.cli import entangle as cli_entangle
from align.cli import evaluate as cli_eval
from align.cli import filter as cli_filter
from align.cli import generate as cli_generate
from align.cli import pairs as cli_pairs
from align.cli import setup as cli_setup
from align.cli import sources as cli_sources
from align.cli import trust as cli_trust
from align.cli import view as cli_view
from align.cli.options import (
    Cluster,
    Columns,
    ImplicitOptions,
    LoadingOptions,
    NearCopies,
    Split,
    cluster_section,
    expand_options,
    output_folder,
    pair_source,
)

if TYPE_CHECKING:
    from align.config import RunConfig

STOPPED = {128 + signal.SIGINT: "stopped", 128 + signal.SIGTERM: "terminated"}
TOGETHER = frozenset({"run", "train", "reward", "entangle", "iterate"})
"""Verbs that all processes of a launcher run together; rank 0 runs the others alone."""
ORDER = (
    "doctor", "init", "recipes", "schema", "data", "view", "pairs", "reward", "filter", "trust", "advise", "generate",
    "run", "train", "entangle", "eval", "best-of-n", "iterate", "report", "push", "reproduce", "explain",
)  # fmt: skip
"""Verbs in the order of the work."""


class InOrder(TyperGroup):
    """Shows the verbs in ``ORDER``."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs; one that ``ORDER`` lacks comes last."""
        return sorted(super().list_commands(ctx), key=lambda name: (*ORDER, name).index(name))


app = typer.Typer(
    name="align",
    cls=InOrder,
    help="Margin-adaptive preference alignment: reward models, MADPO and related losses, one report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at preference data.", no_args_is_help=True)
reward = typer.Typer(help="Train and apply reward models.", no_args_is_help=True)
app.add_typer(data, name="data")
data.command("sources")(cli_sources.sources)
data.command("next-to-check")(cli_sources.next_to_check)
app.add_typer(reward, name="reward")
app.add_typer(cli_filter.app, name="filter")
app.add_typer(cli_entangle.app, name="entangle")
app.command("generate")(cli_generate.generate)
app.command("best-of-n")(cli_generate.best_of_n)
app.command("iterate")(cli_generate.iterate)
app.add_typer(cli_pairs.app, name="pairs")
app.add_typer(cli_eval.app, name="eval")
app.command("trust")(cli_trust.trust)
app.command("advise")(cli_trust.advise)
app.add_typer(cli_setup.app, name="recipes")
app.command("init")(cli_setup.init)
app.command("view")(cli_view.view)
data.command("apply")(cli_view.apply)
app.command("doctor")(cli_setup.doctor)
app.command("schema")(cli_setup.schema)
app.command("explain")(cli_setup.explain)
Config = Annotated[Path, typer.Argument(help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.peft.r=8")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the resolved plan as JSON, stop.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        sys.stdout.write(f"align {version('margin-align')}\n")
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")] = False,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Options that every verb shares."""
    from align.distributed import process_rank
    from align.errors import ConfigError
    from align.io.console import LEVELS, configure

    if log_level.lower() not in LEVELS:
        raise ConfigError(f"--log-level {log_level}: expected one of {', '.join(LEVELS)}", code="config-option")
    configure(quiet=quiet, level=log_level)
    if process_rank() > 0 and context.invoked_subcommand not in TOGETHER:
        raise typer.Exit


@app.command("run")
def run(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """All stages of a run, each skipped when its inputs have not changed; ends in report.html."""
    _pipeline(config, overrides, dry_run, until=())


@app.command("train")
def train(config: Config, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """The stages of a run up to the trained policies."""
    _pipeline(config, overrides, dry_run, until=("train",))


@reward.command("train")
def reward_train(
    config: Config,
    overrides: Overrides = None,
    head: Annotated[str | None, typer.Option(help="full, logistic or naive-bayes; sets reward.head.")] = None,
    dry_run: DryRun = False,
) -> None:
    """The stages of a run up to the reward model and its cross-fitted margins."""
    chosen = [] if head is None else [f"reward.head={head}"]
    _pipeline(config, [*(overrides or []), *chosen], dry_run, until=("reward", "crossfit"))


@reward.command("score")
@expand_options
def reward_score(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")],
    model: Annotated[str, typer.Option(help="Reward model: folder or hub id.")],
    output: Annotated[Path, output_folder("Folder to write pairs.parquet into.")],
    loading: LoadingOptions,
    policy: ImplicitOptions,
    column: Columns = None,
    split: Split = "train",
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens per batch.")] = 4096,
    max_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 1024,
    calibrated: Annotated[bool, typer.Option("--calibrated", help="Apply the model's calibration.json.")] = False,
    cluster: Cluster = None,
) -> None:
    """Add reward_chosen, reward_rejected and margin to a pair table, and margin_std if the model is an ensemble."""
    from align.commands.score import score_pairs

    source = pair_source(pairs, column, split)
    score_pairs(
        source, model, output, batch_tokens=batch_tokens, max_length=max_length, calibrated=calibrated,
        cluster=cluster_section(cluster), options=loading.load_options(), implicit=policy.source(model),
    )  # fmt: skip


@data.command("check")
def data_check(
    pairs: Annotated[str, typer.Argument(help="Pair file, saved dataset or hub id.")],
    drop_invalid: Annotated[bool, typer.Option("--drop-invalid", help="Split valid and invalid rows.")] = False,
    output: Annotated[Path, output_folder("Folder for --drop-invalid.")] = Path("checked"),
    column: Columns = None,
    split: Split = "train",
    near_copies: NearCopies = False,
    model: Annotated[str | None, typer.Option(help="Also read every pair as this model's tokenizer does.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also: what can these pairs teach? A page in --output.")] = False,
    loss: Annotated[str, typer.Option(help="--deep: loss whose first step is predicted.")] = "dpo",
    held_out: Annotated[str | None, typer.Option(help="--deep: evaluation pairs or prompts; must not overlap.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="--deep: tokens of prompt and response.")] = 1024,
    cost: Annotated[bool, typer.Option(help="--deep: measure seconds and memory of training steps.")] = True,
) -> None:
    """Validate every row; print a summary and the offending rows. --deep: shortcuts, noise, distance, cost."""
    from align.commands.data import check_data

    source = pair_source(pairs, column, split, near_copies=near_copies)
    if deep:
        from align.commands.diagnose import diagnose_source

        diagnose_source(
            source, output, model=model, loss=loss, held_out=held_out, max_length=max_length, probe=cost
        )  # fmt: skip
        return
    check_data(source, drop_to=output if drop_invalid else None, model=model)


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, e.g. runs/demo.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Page of several runs, e.g. runs.html.")] = None,
) -> None:
    """Render report.html of a run again from its report.json, or one page of several runs side by side."""
    from align.commands.report import render_report, render_runs

    if len(runs) == 1 and output is None:
        render_report(runs[0])
    else:
        render_runs(runs, output)


@app.command("push")
def push_command(
    folder: Annotated[Path, typer.Argument(help="Folder that a command wrote: a run, a stage, tables.")],
    address: Annotated[
        str,
        typer.Argument(help="s3://bucket/prefix, new or of an earlier push; hf://user/name, hf://datasets/user/name."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="hf://: print what would be uploaded, without network.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="hf://: everybody may read the repository.")] = False,
    base_model: Annotated[str | None, typer.Option(help="hf://: hub id of an adapter's base model.")] = None,
) -> None:
    """Copy a finished folder to an object store, or a model or pair table to the Hugging Face hub (private)."""
    from align.commands.push import push
    from align.io.console import out

    planned = push(folder, address, dry_run=dry_run, public=public, base_model=base_model)
    if planned is not None:
        out.print_json(json.dumps(planned))


@app.command("reproduce")
def reproduce(
    manifest: Annotated[Path, typer.Argument(help="run.json of a finished run.")],
    output: Annotated[Path, output_folder("Folder to write the run into again; not its own folder.")],
) -> None:
    """Make a run again from its manifest and compare every file; exit 2 with a list if something differs."""
    from align.io.console import out
    from align.run.reproduce import check_reproduced, same_run

    found = same_run(manifest, output, command=shlex.join(["align", *sys.argv[1:]]))
    out.print_json(json.dumps(found))
    check_reproduced(found, manifest)


def main() -> NoReturn:
    """Entry point. Exit codes: 0; 2 after a mistake of the user, 1 after a defect, 130 Ctrl-C, 143 SIGTERM."""
    from align.distributed import lost_process, shutdown
    from align.errors import AlignError
    from align.io.disk import disk_problem
    from align.io.secrets import redact_text

    signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except AlignError as error:
        sys.stderr.write(redact_text(f"error {error}\n"))
        sys.exit(2)
    except SystemExit as stop:
        if stop.code in STOPPED:
            sys.stderr.write(f"{STOPPED[stop.code]}; what is finished is kept, the same command resumes from there\n")
        elif not stop.code:
            shutdown()
        raise
    except Exception as error:
        if (problem := disk_problem(error) or lost_process(error)) is not None:
            sys.stderr.write(redact_text(f"error {problem}\n"))
            sys.exit(2)
        sys.stderr.write(redact_text(traceback.format_exc()))
        sys.stderr.write("this is a defect of the program, not of your input: please report it with the lines above\n")
        sys.exit(1)
    sys.exit(0)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _pipeline(path: Path, overrides: list[str] | None, dry_run: bool, until: tuple[str, ...]) -> None:
    from align.config import load_config

    config = load_config(path, overrides)
    from align.distributed import process_rank
    from align.io.console import log, out
    from align.io.secrets import redact_text
    from align.run import pipeline

    pipeline.check(config, tables=dry_run)
    if dry_run:
        if process_rank() == 0:
            out.print_json(json.dumps(pipeline.describe(config), default=str))
        return
    _announce(config)
    command = redact_text(shlex.join(["align", *sys.argv[1:]]))
    report_path = pipeline.run_pipeline(config, command=command, until=until)
    log.info("result: %s", config.folder)
    if report_path.exists():
        log.info("look at it: open %s", report_path)


def _announce(config: "RunConfig") -> None:
    from align.io.console import log

    methods = ", ".join(config.train.methods) if config.train else "no policy"
    model = config.train.model if config.train else (config.reward.model if config.reward else "")
    log.info("run %s: %s (%s), seed %d, writes %s", config.name, methods, model, config.seed, config.folder)
