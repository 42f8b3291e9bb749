"""From messages to text, in one way for filter, judges and pages; the texts of a pair table as Arrow columns."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from align.config.columns import TEXT
from align.data.messages import content_text, message_lists, split_arguments

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"\w+", re.UNICODE)
SPEAKERS = frozenset({"user", "assistant"})
"""Roles that need no label in a list of one message: the column says who speaks."""
SYSTEM = frozenset({"system", "developer"})
"""Roles of the messages that set a conversation up."""
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))
"""Characters that are not seen; ``str.translate`` removes them."""
LONG = 40
"""Width from which a text that recurs is a copy; shorter ones ("Yes") recur by chance."""


def plain(part: Any) -> str:
    """A prompt or a response as text: a string as it is, messages one after the other, without a template's arguments.

    Several messages begin with their roles, ``user: ...`` and ``assistant: ...``; one message by the user or the
    assistant is its content, so a response reads the same as text and as a message. Every other key that has a value
    follows on a line of its own, as JSON unless it is a string: ``tool_calls: [...]``.
    """
    part, _ = split_arguments(part)
    if isinstance(part, str):
        return part
    labeled = len(part) != 1 or part[0]["role"] not in SPEAKERS
    return "\n".join(_message_text(message, labeled=labeled) for message in part)


def bare(text: str) -> str:
    """A text as copies of it are recognized: without case, white space and invisible characters, in Unicode's NFKC."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().translate(INVISIBLE).split())


def text_key(text: str) -> bytes:
    """Digest of 16 bytes of a text; texts with the same ``bare`` form have the same."""
    return hashlib.blake2b(bare(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_long(text: str) -> bool:
    """Whether a text is ``LONG`` characters wide; characters of East Asian scripts, which say more, are two wide."""
    text = " ".join(text.split())
    if len(text) >= LONG or 2 * len(text) < LONG:
        return len(text) >= LONG
    return len(text) + sum(unicodedata.east_asian_width(character) in "WF" for character in text) >= LONG


def _message_text(message: Mapping[str, Any], *, labeled: bool) -> str:
    content = content_text(message.get("content"))
    lines = [f"{message['role']}: {content}"] if labeled else [content] if content else []
    for key in sorted(message.keys() - {"role", "content"}):
        value = _without_gaps(message[key])
        if value is not None:
            lines.append(f"{key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines)


def _without_gaps(value: Any) -> Any:
    """``value`` without the keys that are None: Arrow gives a struct every key that any row of its column has."""
    if isinstance(value, Mapping):
        return {key: _without_gaps(value[key]) for key in sorted(value) if value[key] is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def words(part: Any) -> list[str]:
    """Words of a prompt or response in lower case, without punctuation."""
    return WORD.findall(plain(part).lower())


def count_words(part: Any) -> int:
    """Number of words of a prompt or response, split at white space; only the contents of messages count."""
    texts = [part] if isinstance(part, str) else [content_text(turn.get("content")) for turn in part]
    return sum(len(text.split()) for text in texts)


def without_system(part: Any) -> Any:
    """A prompt or a response without its system messages; text as it is."""
    return part if isinstance(part, str) else [turn for turn in part if turn["role"] not in SYSTEM]


def texts(pairs: "Dataset", start: int = 0, stop: int | None = None) -> pa.Array:
    """Plain texts [3 n] of the rows from ``start`` to ``stop``: prompt, chosen, rejected, prompt, ..."""
    rows = pairs.with_format("arrow")[start : len(pairs) if stop is None else stop]
    return interleaved(*(rows[part] for part in TEXT))


def texts_of(pairs: "Dataset", rows: list[int], *, system: bool = True) -> pa.Array:
    """Plain texts [3 R] of the rows at these indices, in the order of ``texts``; with or without system messages."""
    found = pairs.select(rows).with_format("arrow")[:]
    return interleaved(*(found[part] for part in TEXT), system=system)


def column(part: pa.ChunkedArray, *, system: bool = True) -> pa.Array:
    """One column of a pair table as plain text, with or without system messages."""
    part = part.combine_chunks()
    if pa.types.is_string(part.type) or pa.types.is_large_string(part.type):
        return part.cast(pa.string())
    items = message_lists(part)
    return pa.array([plain(item if system else without_system(item)) for item in items], type=pa.string())


def interleaved(
    prompt: pa.ChunkedArray, chosen: pa.ChunkedArray, rejected: pa.ChunkedArray, *, system: bool = True
) -> pa.Array:
    """The texts of three columns of n rows, row by row, [3 n]."""
    parts = pa.concat_arrays([column(part, system=system) for part in (prompt, chosen, rejected)])
    count = len(parts) // 3
    return parts.take(pa.array(np.arange(3 * count).reshape(3, count).T.ravel()))


def cells(pairs: "Dataset", name: str) -> pa.ChunkedArray:
    """One column of a pair table; works also if its rows were selected from another table."""
    return pairs.select_columns([name]).with_format("arrow")[:][name]
