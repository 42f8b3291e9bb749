"""Every script shows its help, and every command of a script that is written down anywhere parses."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from scripts.tables import END, insert

ROOT = Path(__file__).parents[2]
FILES = [file for file in sorted(ROOT.glob("scripts/**/*.py")) if "__main__" in file.read_text(encoding="utf-8")]
SCRIPTS = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("studies/**/*.md"), *ROOT.glob("configs/**/*.yaml")]
COMMAND = re.compile(r"python -m (scripts(?:\.\w+){2})([^\n#>&;|`]*)")


def commands(text: str) -> list[tuple[str, str]]:
    """(module, arguments) of every command; backslashes and inline code spans join lines."""
    blocks = re.split(r"```", text)
    inline = [re.sub(r"(?<!`)`[^`]+`", lambda span: span[0].replace("\n", " "), block) for block in blocks[::2]]
    joined = "\n".join([*inline, *blocks[1::2]]).replace("\\\n", " ")
    return [(module, arguments.strip()) for module, arguments in COMMAND.findall(joined)]


def written() -> dict[str, tuple[str, str]]:
    """Place -> command, for every command in the pages, the Makefile and the docstrings of scripts."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    texts |= {file: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in FILES}
    texts[ROOT / "Makefile"] = re.sub(r"\$\((\w+)\)", r"\1", (ROOT / "Makefile").read_text(encoding="utf-8"))
    return {
        f"{file.relative_to(ROOT)}-{number}": command
        for file, text in texts.items()
        for number, command in enumerate(commands(text))
    }


WRITTEN = written()


class ParsedError(Exception):
    """Raised as soon as the arguments are parsed."""


@pytest.mark.parametrize("module", SCRIPTS)
def test_help_shows_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
    assert any(named == module for named, _ in commands(importlib.import_module(module).__doc__ or ""))


@pytest.mark.parametrize("place", WRITTEN)
def test_command_parses(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, arguments = WRITTEN[place]
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        parse(parser)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *shlex.split(arguments)])
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()


def test_commands_of_a_text() -> None:
    text = "`python -m scripts.a.b --x\n1` and `c`\n\n```\npython -m scripts.c.d \\\n    --y 2 > z\n```\nmore `d\ne`"
    assert commands(text) == [("scripts.a.b", "--x 1"), ("scripts.c.d", "--y 2")]


def test_tables_need_both_marks() -> None:
    page = f"a\n<!-- tables of x -->\nold\n{END}\nb"
    assert insert(page, "new", "x") == f"a\n<!-- tables of x -->\n\nnew\n\n{END}\nb"
    for text, mark in ((page, "y"), (page.replace(END, ""), "x")):
        with pytest.raises(ValueError, match=f"found no '<!-- tables of {mark} -->'"):
            insert(text, "new", mark)
