"""Verbs for the time before a run: init, recipes, doctor, schema, explain."""

import json
from pathlib import Path
from typing import Annotated

import typer

from align.cli.options import Columns, Split, pair_source

app = typer.Typer(help="Run files that come with the program.", invoke_without_command=True)


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the run files that come with the program; `align recipes show NAME` prints one."""
    if context.invoked_subcommand is not None:
        return
    from align.commands.recipes import recipes as known
    from align.io.console import out

    for name, purpose in known().items():
        out.print(f"{name}: {purpose}", markup=False)


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="Name of a recipe.")]) -> None:
    """Print a recipe: `align recipes show helpfulness > run.yaml`."""
    from align.commands.recipes import recipe
    from align.io.console import out

    out.print(recipe(name), markup=False, end="")


def init(
    pairs: Annotated[str | None, typer.Argument(help="Pair file, saved dataset or hub id.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to train: folder or hub id.")] = None,
    goal: Annotated[str, typer.Option(help="quality, speed or small-memory.")] = "quality",
    output: Annotated[Path | None, typer.Option(help="File to write; default: print it.")] = None,
    column: Columns = None,
    split: Split = "train",
    demo: Annotated[bool, typer.Option("--demo", help="The demo's run file, for no pairs and no model.")] = False,
) -> None:
    """Print a run file for these pairs and this model; its comments say why each value is there."""
    from align.commands.recipes import recipe
    from align.errors import ConfigError
    from align.io.console import log, out

    if demo == (pairs is not None or model is not None) or (pairs is None) != (model is None):
        raise ConfigError("init: expected PAIRS and --model, or --demo alone", code="config-option")
    from align.commands.init import run_file, write_run_file

    if pairs is None or model is None:
        text = recipe("demo")
    else:
        columns = pair_source(pairs, column, split).columns if column else None
        text = run_file(pairs, model, goal=goal, split=split, columns=columns)
    if output is None:
        out.print(text, markup=False, end="")
        return
    write_run_file(text, output)
    log.info("wrote %s; check it with `align run %s --dry-run`", output, output)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    self_test: Annotated[bool, typer.Option(help="Run the self-test, about ten seconds.")] = True,
    network: Annotated[bool, typer.Option("--network", help="Also ask whether the hub answers.")] = False,
) -> None:
    """This machine, installed packages and a short self-test; exit 2 if a check fails. Paste it into a bug report."""
    from align.commands.doctor import as_text, examine
    from align.errors import EnvironmentProblem
    from align.io.console import out
    from align.io.secrets import redact_text

    found = examine(self_test=self_test, network=network)
    out.print(redact_text(json.dumps(found, indent=2) if as_json else as_text(found)), markup=False)
    if found["problems"]:
        raise EnvironmentProblem(f"failed: {', '.join(found['problems'])}", code="doctor", hint="see the lines above")


def schema(kind: Annotated[str, typer.Argument(help="run or iterate.")] = "run") -> None:
    """Print the JSON Schema of a run file, for editors: `align schema > run.schema.json`."""
    from align.commands.schema import schema as file_schema
    from align.io.console import out

    out.print(json.dumps(file_schema(kind), indent=1), markup=False)


def explain(
    code: Annotated[str, typer.Argument(help="Code of an error message, such as config-key.")],
) -> None:
    """Print the cause of an error and what to do."""
    from align.commands.explain import explain as find
    from align.io.console import out

    found = find(code)
    out.print(f"{found['code']}\n  cause: {found['cause']}\n  do: {found['fix']}", markup=False)
