"""Reading YAML into sections; a wrong key is an error that names its path and the nearest valid key."""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import ValidationError

from align.config.base import Section
from align.config.safe_yaml import load_yaml
from align.errors import ConfigError, listed

S = TypeVar("S", bound=Section)
SHOWN_CHARACTERS = 60


def load_section(path: Path, overrides: list[str] | None, kind: type[S]) -> S:
    """``load_config`` for a file whose root is the section ``kind``.

    Raises:
        ConfigError: see ``load_config``.
    """
    tree = read_yaml(path)
    for override in overrides or []:
        apply_override(tree, override)
    return section_from(tree, kind, str(path), hint="see configs/ for working files")


def section_from(tree: Any, kind: type[S], where: str, *, hint: str = "") -> S:
    """``tree`` as the section ``kind``.

    Args:
        tree: a mapping of keys to values, or such a section.
        kind: class of the section.
        where: what messages call ``tree``.
        hint: what to do if it is wrong.

    Raises:
        ConfigError: every wrong key and value at once.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(item, kind) for item in error.errors()]
        raise ConfigError(f"{where}:\n{listed(problems)}", code="config-key", hint=hint) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping read with ``yaml.safe_load``.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})", code="config-file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}", code="config-yaml") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys to values, found {type(tree).__name__}", code="config-yaml"
        )
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=c`` in a tree of dicts, the value read as YAML.

    Raises:
        ConfigError: no ``=``, an empty key, or a path through something that is not a mapping.
    """
    key, found, text = override.partition("=")
    parts = key.split(".")
    if not found or not all(parts):
        raise ConfigError(f"--set {override}: expected key.path=value", code="config-override")
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            path = ".".join(parts[: depth + 1])
            raise ConfigError(f"--set {override}: {path} is a value, not a section", code="config-override")
    try:
        node[parts[-1]] = load_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value", code="config-override") from None


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean `x`?)`` with the nearest known name, or the list of known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean `{close[0]}`?)" if close else f" (known: {', '.join(sorted(known))})"


def _problem(item: Any, root: type[Section]) -> str:
    path = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(path)}: unknown key{nearest(path[-1], _keys_at(path[:-1], root))}"
    if item["type"] == "missing":
        return f"{'.'.join(path)}: missing key"
    if item["type"] == "value_error":
        return f"{'.'.join(path) or 'top level'}: {item['ctx']['error']}"
    if item["type"] == "too_short":
        return f"{'.'.join(path)}: expected at least {item['ctx']['min_length']} entry, found {_short(item['input'])}"
    expected = item["msg"].removeprefix("Input should be ")
    if item["type"] == "string_pattern_mismatch":
        expected = "a name of at most 100 letters, digits and . _ - + =, because it becomes the name of a folder"
    return f"{'.'.join(path)}: expected {expected}, found {_short(item['input'])}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."


def _keys_at(path: list[str], root: type[Section]) -> list[str]:
    """Valid keys of the section at ``path`` below ``root``."""
    section: type[Section] | None = root
    for part in path:
        if section is None:
            return []
        if part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation)
    return sorted(section.model_fields) if section else []


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, dict, Annotated):
        for argument in typing.get_args(annotation):
            if (found := _section_in(argument)) is not None:
                return found
    return None
