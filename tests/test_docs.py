"""The documents cannot rot: every YAML block is a valid configuration, every `align` command parses."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
import yaml

from align.cli import app
from align.config import load_config
from align.stages import check_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Lines of shell blocks that call `align`, those that go on in the next line joined."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("align ")]


YAML = [pytest.param(text, id=f"{page.name}-{k}") for page in PAGES for k, text in enumerate(blocks(page, "yaml"))]
COMMANDS = [pytest.param(line, id=line[:60]) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("text", YAML)
def test_yaml_blocks_are_valid(text: str, tmp_path: Path) -> None:
    """A block with a name is a whole run; any other is a part of one, put into the smallest run that can hold it."""
    tree = yaml.safe_load(text)
    if "name" not in tree:
        tree = {"name": "part", "pairs": {"path": "pairs.jsonl"}, **tree}
        tree["train"] = {"model": "some/model", "methods": {"dpo": {"loss": "dpo"}}, **tree.get("train", {})}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    check_config(load_config(file))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """Verbs and options exist and take what they are given; nothing is run."""
    command: click.Command = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)[1:]
    context = click.Context(command)
    while isinstance(command, click.Group):
        assert arguments and arguments[0] in command.commands, line
        name, *arguments = arguments
        command = command.commands[name]
    context = command.make_context(command.name or "align", arguments, parent=context)
    assert context.params
