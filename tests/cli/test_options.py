"""Dataclasses as options of a command."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from align.cli.options import Seed, expand_options

SEEN: list[object] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    prompts: Annotated[list[str], typer.Argument()]
    judge: Annotated[str, typer.Option()]
    limit: Annotated[int | None, typer.Option(min=1)] = None
    seed: Seed = 0


@expand_options
def command(options: Options, shown: Annotated[int, typer.Option(help="Shown.")] = 3) -> None:
    """Runs with options."""
    SEEN.append((options, shown))


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments), terminal_width=120)
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("arguments", "options", "shown"),
    [
        (("a", "b", "--judge", "vader"), Options(prompts=["a", "b"], judge="vader"), 3),
        (
            ("--limit", "2", "--judge", "x", "a", "--seed", "5", "--shown", "0"),
            Options(prompts=["a"], judge="x", limit=2, seed=5),
            0,
        ),
    ],
)
def test_fields_are_options(arguments: tuple[str, ...], options: Options, shown: int) -> None:
    SEEN.clear()
    assert run(*arguments)[0] == 0 and [(options, shown)] == SEEN


@pytest.mark.parametrize(
    "arguments",
    [("a",), ("--judge", "v"), ("a", "--judge", "v", "--limit", "0"), ("a", "--judge", "v", "--no")],
)
def test_what_the_fields_do_not_allow_is_refused(arguments: tuple[str, ...]) -> None:
    SEEN.clear()
    assert run(*arguments)[0] == 2 and not SEEN


def test_help_is_that_of_the_command() -> None:
    code, output = run("--help")
    assert code == 0 and "Runs with options." in output and "--limit" in output and "--shown" in output
