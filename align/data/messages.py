"""Messages as sources bring them, and as a pair table keeps them: every message with the keys that its row gives it.

A prompt is text, a list of messages, or an object of ``messages`` and what their chat template is given besides
(``TEMPLATE_COLUMNS``); see ``with_arguments``.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from align.config.columns import TEMPLATE_COLUMNS, TEXT

if TYPE_CHECKING:
    from datasets import Dataset

MESSAGES = "messages"
"""Key of the messages in a prompt with arguments of the chat template."""
PLAIN_KEYS = frozenset({"role", "content"})
JSON_MESSAGES = pa.list_(pa.json_())
"""Arrow type of a column whose messages have keys other than role and content, or content parts: one JSON text per
message. A struct would give each message, and each object inside it, the keys of all others, with nulls."""
PLAIN_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function": "tool"}
"""Names of ShareGPT's turns that are not roles already."""
LISTED = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value|tool_calls|name)["']\s*:""")
"""Start of a text that is a list of messages, as JSON or as Python prints it."""


def content_text(content: Any) -> str:
    """The content of a message as text: a string as it is, the texts of content parts one after the other, nothing for
    None."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return str(content or "")


def as_messages(value: Any) -> Any:
    """A cell as text or messages: parses text that is a list of messages, and renames ShareGPT's ``from``/``value``.

    One message becomes a list of one. Any other value is returned as it is, also text that cannot be parsed
    (``unparsed`` names it).
    """
    if isinstance(value, str):
        parsed = _parsed(value) if LISTED.match(value) else None
        return as_messages(parsed) if _are_messages(parsed) else value
    if isinstance(value, Mapping) and (value.keys() >= PLAIN_KEYS or {"from", "value"} <= value.keys()):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):  # JSON_MESSAGES
        decoded = [_parsed(item) if item.startswith("{") else None for item in value]
        return decoded if all(isinstance(item, dict) and "role" in item for item in decoded) else value
    if isinstance(value, list) and any(isinstance(item, dict) and "from" in item for item in value):
        return [_turn(item) if isinstance(item, dict) else item for item in value]
    return value


def with_arguments(prompt: Any, row: Mapping[str, Any]) -> Any:
    """A prompt with the arguments that a row gives its chat template, as one JSON value; the prompt alone without any.

    Args:
        prompt: messages; text is returned as it is, because no template renders it.
        row: may have ``TEMPLATE_COLUMNS``, as values or as JSON.
    """
    given = {name: arguments for name in TEMPLATE_COLUMNS if (arguments := _argument(row.get(name)))}
    return {MESSAGES: prompt, **given} if given and not isinstance(prompt, str) else prompt


def split_arguments(prompt: Any) -> tuple[Any, dict[str, Any]]:
    """(text or messages, arguments of the chat template by their column) of a prompt."""
    if not isinstance(prompt, Mapping):
        return prompt, {}
    return prompt[MESSAGES], {name: prompt[name] for name in TEMPLATE_COLUMNS if name in prompt}


def argument_cells(prompt: Any) -> dict[str, str]:
    """The arguments of a prompt's chat template as a table keeps them, column -> JSON."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in split_arguments(prompt)[1].items()}


def _argument(value: Any) -> Any:
    """An argument without keys that are None, which Arrow adds to objects; its cell may be JSON."""
    found = json.loads(value) if isinstance(value, str) else value
    return {key: item for key, item in found.items() if item is not None} if isinstance(found, Mapping) else found


def unparsed(text: str) -> bool:
    """Whether a text looks like a list of messages that ``as_messages`` cannot parse."""
    return LISTED.match(text) is not None and text.rstrip().endswith("]") and "content" in text


def without_nulls(value: Any) -> Any:
    """Messages from an Arrow struct without the keys that are null, which are those of other rows; content stays."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_without_nulls(item, keep="content") for item in value]
    return value


def exact_messages(table: "Dataset") -> "Dataset":
    """The table with messages, and arguments of the chat template, that have no keys of other rows.

    A column of objects in Arrow gives every object the keys of all others, with nulls: the arguments of one tool call
    those of another. Such a column becomes ``JSON_MESSAGES``, or JSON texts; others stay as they are.
    """
    from datasets import Dataset

    for name in (*TEXT, *TEMPLATE_COLUMNS):
        kind = pa.null() if name not in table.column_names else table.data.schema.field(name).type
        objects = pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)
        if kind == PLAIN_MESSAGES or not (objects or (name in TEMPLATE_COLUMNS and pa.types.is_struct(kind))):
            continue
        if name in TEMPLATE_COLUMNS:
            values = [_without_nulls(value) for value in table[name]]
            texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            column = pa.array(texts, pa.string())
        else:
            column = text_array([without_nulls(value) for value in table[name]])
        rows = table.with_format("arrow")[:].combine_chunks()
        table = Dataset(rows.set_column(rows.column_names.index(name), name, column).replace_schema_metadata(None))
    return table


def text_array(values: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """A column of texts or messages [N], of the type ``kind`` or what ``text_type`` gives.

    Raises:
        TypeError, ValueError, pa.ArrowException: a value does not fit the column.
    """
    kind = kind or text_type(values)
    if kind != JSON_MESSAGES:
        return pa.array(values, type=kind)
    offsets = np.cumsum([0, *(len(messages) for messages in values)], dtype=np.int32)
    encoded = [json.dumps(message, ensure_ascii=False) for messages in values for message in messages]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(encoded, pa.json_()))


def text_type(values: Sequence[Any]) -> pa.DataType:
    """Arrow type of a column: ``JSON_MESSAGES`` if a message has keys other than role and content, or content parts."""
    if not values or isinstance(values[0], str):
        return pa.string()
    plain = all(
        message.keys() == PLAIN_KEYS and not isinstance(message["content"], list)
        for messages in values
        for message in messages
    )
    return PLAIN_MESSAGES if plain else JSON_MESSAGES


def message_lists(part: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The messages of a column that ``text_array`` made."""
    rows: list[Any] = part.to_pylist()
    return [[json.loads(message) for message in row] for row in rows] if _is_json(part.type) else rows


def _is_json(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and isinstance(kind.value_type, pa.JsonType)


def _are_messages(value: Any) -> bool:
    """Whether a parsed text is a list of messages; other JSON is a text that happens to be JSON."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and (("role" in item and len(item) > 1) or {"from", "value"} <= item.keys())
        for item in value
    )


def _parsed(text: str) -> Any:
    """The value of a JSON text, or of Python's print of lists and dicts; None if it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _turn(message: dict[str, Any]) -> dict[str, Any]:
    """A message with ``role`` and ``content`` for ShareGPT's ``from`` and ``value``."""
    if "role" in message or "content" in message or not {"from", "value"} <= message.keys():
        return message
    others = {key: item for key, item in message.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"], **others}


def _without_nulls(value: Any, keep: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == keep}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
