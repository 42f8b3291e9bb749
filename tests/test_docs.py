"""The documents stay true: YAML blocks are valid, `align` commands parse, links lead somewhere, files named exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

import pytest
import typer
import yaml

from align.cli.main import app
from align.config import load_config
from align.run.checks import check_config
from tests.helpers.python_page import write_page_folder

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(?<![\w/.-])(?:align|reward_models|scripts|studies|tests|configs|docs)/[\w./*-]*\w")
"""Paths of this project, as pages name them."""
SEPARATORS = ("&&", "||", ";", "|", ">")
DOCUMENTS = sorted(page for folder in ("", "docs/", "studies/") for page in ROOT.glob(f"{folder}*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Calls of `align` in shell blocks; lines that go on in the next are joined, the block's variables filled in."""
    found = []
    for block in blocks(page, "bash"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(Template(line).safe_substitute(variables), posix=True, punctuation_chars=";&|>")
            lexer.whitespace_split = True
            words = list(lexer)
            variables |= dict(word.split("=", 1) for word in words if re.match(r"[A-Za-z_]+=", word))
            calls = [list(part) for end, part in groupby(words, lambda word: word in SEPARATORS) if not end]
            found += [shlex.join(call) for call in calls if call[0] == "align"]
    return found


def python_sections() -> dict[str, list[str]]:
    """Title of a section of docs/python.md -> its Python blocks."""
    parts = re.split(r"^## (.*)$", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    named = zip(parts[::2], parts[1::2], strict=True)
    found = {title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for title, text in named}
    return {title: code for title, code in found.items() if code}


YAML = [pytest.param(text, id=f"{page.name}-{k}") for page in PAGES for k, text in enumerate(blocks(page, "yaml"))]
COMMANDS = [pytest.param(line, id=line[:60]) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("text", YAML)
def test_yaml_blocks_are_valid(text: str, tmp_path: Path) -> None:
    """A block with a name is a whole run; any other is a part of one, put into the smallest run that can hold it."""
    tree = yaml.safe_load(text)
    if "name" not in tree:
        tree = {"name": "part", "pairs": {"path": "pairs.jsonl"}, **tree}
        tree["train"] = {"model": "some/model", "methods": {"dpo": {"loss": "dpo"}}, **tree.get("train", {})}
    if "evaluate" in tree:  # a page names a file of its reader's
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "a film"}\n')
        tree["evaluate"]["prompts"] = str(tmp_path / "prompts.jsonl")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    check_config(load_config(file))


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """Verbs and options exist and take what they are given; nothing is run."""
    assert parse(line) is not None


@pytest.mark.parametrize("title", python_sections())
def test_python_examples_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a section, one after the other, on tiny models under the names of the page."""
    write_page_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict[str, Any] = {}
    for code in python_sections()[title]:
        exec(compile(code, f"docs/python.md, {title}", "exec"), names)


@pytest.mark.parametrize("line", ["align trian run.yaml", "align train run.yaml --method dpo", "align eval reward"])
def test_wrong_commands_do_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r"trian|No such option|Missing parameter"):
        parse(line)


def parse(line: str) -> dict[str, Any]:
    """The parameters that the command line takes from ``line`` before it runs anything."""
    command = typer.main.get_command(app)
    verb, *arguments = shlex.split(line)
    context = command.make_context("align", [], resilient_parsing=True)
    while hasattr(command, "commands") and (arguments or not command.invoke_without_command):
        verb, *arguments = arguments
        assert verb in command.commands, f"no verb {verb}"
        command = command.commands[verb]
    return dict(command.make_context(verb, arguments, parent=context).params)


def links(page: Path) -> Iterator[tuple[str, Path]]:
    """Every link of a page that leads to a file of this project, and that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://|#", target):
            yield target, (page.parent / target.partition("#")[0]).resolve()


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page: Path) -> None:
    assert [target for target, file in links(page) if not file.exists()] == []
    text = page.read_text(encoding="utf-8")
    named = {name.rstrip(".") for name in NAMED.findall(text)}
    assert [name for name in sorted(named) if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_anchors_exist(page: Path) -> None:
    """`#title` in a link is a title of the page that it leads to."""
    missing = []
    for target, file in links(page):
        anchor = target.partition("#")[2]
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        missing += [target] if anchor and anchor not in slugs else []
    assert missing == []


def test_every_kept_result_has_a_line() -> None:
    """studies/README.md lists what lies beside it, and nothing else."""
    folder = ROOT / "studies"
    listed = {file for target, file in links(folder / "README.md") if folder in file.parents}
    assert listed == {file for file in folder.rglob("*") if file.is_file()} - {folder / "README.md"}
    used = {file for page in DOCUMENTS if page.parent != folder for _, file in links(page)}
    assert {file for file in listed if not {file, file.parent} & used} == set()


def test_lint_settings_name_files() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert [pattern for pattern in settings["per-file-ignores"] if not list(ROOT.glob(pattern))] == []
