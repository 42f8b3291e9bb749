"""The JSON Schema of a run file, with which editors complete and check it."""

import ast
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from align.config.base import Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def file_schema(kind: type[Section]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file whose root is the section ``kind``; each key has its description."""
    schema = kind.model_json_schema()
    parts = {one.__name__: one for one in sections_of(kind)}
    for name, part in [(kind.__name__, schema), *schema.get("$defs", {}).items()]:
        texts = field_texts(parts[name])
        for key, field in part.get("properties", {}).items():
            field.pop("title", None)
            if texts.get(key):
                field["description"] = texts[key]
    return {"$schema": DIALECT} | schema


def sections_of(kind: type[Section]) -> Iterator[type[Section]]:
    """``kind`` and every section below it, each once."""
    seen: list[type[Section]] = []
    waiting = [kind]
    while waiting:
        one = waiting.pop(0)
        if one in seen:
            continue
        seen.append(one)
        for field in one.model_fields.values():
            waiting += _sections_in(field.annotation)
    yield from seen


def field_texts(kind: type[Section]) -> dict[str, str]:
    """Name of each field -> the text under it in the source, on one line, without marks of code."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not (isinstance(owner, type) and issubclass(owner, Section)):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = text.value.value if isinstance(text.value, ast.Constant) else None
                if isinstance(value, str):
                    found[field.target.id] = " ".join(value.replace("``", "`").split())
    return found


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in _sections_in(inner)]
