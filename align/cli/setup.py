"""Verbs for the time before a run: recipes, doctor, schema, explain."""

import json
from typing import Annotated

import typer

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
