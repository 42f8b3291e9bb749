"""Write docs/reference/ from the code: `python -m scripts.docs.reference`; a test holds the pages to it."""

import argparse
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import align
import reward_models
from align.cli.main import app
from align.config import RunConfig, Section
from align.config.iterate import IterateConfig
from align.config.schema import field_texts, sections_of

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
WRITTEN = "Written by `python -m scripts.docs.reference`; do not edit it."
FILES: dict[str, type[Section]] = {"align run": RunConfig, "align iterate": IterateConfig}
LONG = 60


def pages() -> dict[str, str]:
    """Name of each page -> its text."""
    return {"run-file.md": run_file(), "commands.md": commands(), "python-api.md": python_api()}


def run_file() -> str:
    """Every key of the YAML files, with type, default and description."""
    lines = ["# Keys of a run file", "", WRITTEN, "", "`align schema` prints the same as JSON Schema, for editors.", ""]
    seen: set[type[Section]] = set()
    for command, root in FILES.items():
        for section in sections_of(root):
            if section in seen:
                continue
            seen.add(section)
            title = f"`{command}`: the file" if section is root else f"{_paths(root, section)}"
            lines += [f"## {title}", "", " ".join((section.__doc__ or "").split()), ""]
            lines += ["| key | type | default | what it is |", "|---|---|---|---|"]
            texts = field_texts(section)
            lines += [_row(name, field, texts.get(name, "")) for name, field in section.model_fields.items()]
            lines.append("")
    return "\n".join(lines)


def commands() -> str:
    """Every verb with its arguments and options."""
    lines = ["# Commands", "", WRITTEN, ""]
    root = typer.main.get_command(app)

    def visit(command: Any, words: list[str]) -> None:
        if hasattr(command, "commands"):
            for name in command.list_commands(None):
                visit(command.commands[name], [*words, name])
            return
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        shown = [one.name.upper() if one.required else f"[{one.name.upper()}]" for one in arguments]
        lines.extend([f"## {' '.join(words)}", "", " ".join((command.help or "").split()), ""])
        lines.extend(["```text", " ".join([*words, *shown, "[OPTIONS]"]), "```", ""])
        lines.extend(["| option | default | what it is |", "|---|---|---|"])
        for one in command.params:
            if one.name == "help":
                continue
            name = (
                one.name.upper() if one in arguments else ", ".join(f"`{o}`" for o in (*one.opts, *one.secondary_opts))
            )
            default = "required" if one.required else _shown(one.default)
            lines.append(f"| {name} | {default} | {_cell(getattr(one, 'help', '') or '')} |")
        lines.append("")

    visit(root, ["align"])
    return "\n".join(lines)


def python_api() -> str:
    """Every public name with its signature and its docstring; [python.md](../python.md) is the guide."""
    lines = ["# Python API", "", WRITTEN, "", "The guide with examples is [Python](../python.md).", ""]
    for module in (align, reward_models):
        for name in module.__all__:
            value = getattr(module, name)
            lines += [f"## {module.__name__}.{name}", ""]
            if callable(value):
                lines += [
                    "```python",
                    f"{name}{_signature(value)}",
                    "```",
                    "",
                    "```text",
                    inspect.getdoc(value) or "",
                    "```",
                    "",
                ]
            else:
                known = ", ".join(f"`{one}`" for one in value)
                lines += [f"{len(value)} entries: {known}.", ""]
    return "\n".join(lines)


def _signature(value: Any) -> str:
    shown = re.sub(r"<factory>|<object object at 0x[0-9a-f]+>", "...", str(inspect.signature(value)))
    if value.__name__.endswith("Config"):
        return "(output_dir, ...)"
    return (
        shown
        if len(shown) <= LONG
        else "(\n    " + _split(shown[1:].rpartition(")")[0]) + "\n)" + shown.rpartition(")")[2]
    )


def _split(arguments: str) -> str:
    """One argument per line; commas within brackets do not separate."""
    depth, parts, part = 0, [], ""
    for character in arguments:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return ",\n    ".join([*parts, part.strip()])


def _paths(root: type[Section], wanted: type[Section]) -> str:
    """Where a section stands: ``train.methods.<name>``, and so on."""
    found: list[str] = []

    def visit(section: type[Section], path: str) -> None:
        if section is wanted:
            found.append(f"`{path}`")
            return
        for name, field in section.model_fields.items():
            mapping = typing.get_origin(_bare(field.annotation)) is dict
            for inner in _sections(field.annotation):
                visit(inner, f"{path}.{name}{'.<name>' if mapping else ''}".lstrip("."))

    visit(root, "")
    return ", ".join(dict.fromkeys(found))


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [one for inner in typing.get_args(annotation) for one in _sections(inner)]


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _row(name: str, field: FieldInfo, text: str) -> str:
    default = "required" if field.is_required() else _shown(_default(field))
    return f"| `{name}` | {_cell(_kind(field.annotation))} | {default} | {_cell(text)} |"


def _default(field: FieldInfo) -> Any:
    return field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)


def _kind(annotation: Any) -> str:
    """The type as a reader of YAML would call it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is typing.Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if origin is dict:
        return f"mapping of names to {_kind(inner[1])}"
    if origin in (list, tuple):
        return f"list of {_kind(inner[0])}"
    if inner:
        return " or ".join(_kind(one) for one in inner if one is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any value"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        return "its defaults"
    if value in (None, (), [], {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
