"""The arguments of the chat template that a policy was trained with: kept in its folder, compared where it samples."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.config.columns import TEMPLATE_KWARGS
from align.data.messages import split_arguments, with_arguments
from align.io.console import log
from align.io.files import read_json, write_json
from align.models.loading import load_tokenizer
from align.models.tokenization import apply_template

RECORD = "chat_template_kwargs.json"
"""File of a policy's folder: the different ``chat_template_kwargs`` of the conversations that it was trained on."""
MOST = 16
"""Different arguments that are recorded; with more, each prompt may have its own, and nothing is recorded."""


def different_arguments(pairs: Dataset) -> set[str]:
    """The different ``chat_template_kwargs`` of pairs, as JSON; none for plain text, which no template renders."""
    if not len(pairs) or isinstance(pairs[0]["chosen"], str):
        return set()
    cells = pairs[TEMPLATE_KWARGS] if TEMPLATE_KWARGS in pairs.column_names else [None]
    return {_kwargs(with_arguments([], {TEMPLATE_KWARGS: cell})) for cell in cells}


def write_record(found: Collection[str], folder: Path) -> None:
    """Write ``RECORD`` for a policy trained on pairs with these ``different_arguments``; nothing for plain text."""
    if 0 < len(found) <= MOST:
        write_json(folder / RECORD, [json.loads(text) for text in sorted(found)])


def report_other_arguments(prompts: Sequence[Any], model: str, *, trust_remote_code: bool = False) -> None:
    """Warn if prompts are rendered with other ``chat_template_kwargs`` than the policy was trained with.

    Warn also of those that the chat template does not read, such as misspelled ones. Only what changes the text of a
    prompt counts. A folder without ``RECORD`` was not trained here, or on plain text.

    Args:
        prompts: text or messages, perhaps ``with_arguments``.
        model: folder or hub id.
        trust_remote_code: whether code of the model folder may run.
    """
    different = {_kwargs(prompt): prompt for prompt in prompts if not isinstance(prompt, str)}
    record = Path(model) / RECORD
    if not different or (not record.exists() and set(different) == {"{}"}):
        return
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    source = json.dumps(tokenizer.chat_template)
    unread = sorted({key for text in different for key in json.loads(text) if key not in source})
    if unread:
        log.warning("%s: its chat template does not read %s (chat_template_kwargs)", model, ", ".join(unread))
    trained = read_json(record) if record.exists() else []
    for text, prompt in different.items():
        messages, arguments = split_arguments(prompt)
        tools = {name: value for name, value in arguments.items() if name != TEMPLATE_KWARGS}
        written = _text(messages, tools | json.loads(text), tokenizer)
        if trained and all(_text(messages, tools | kwargs, tokenizer) != written for kwargs in trained):
            others = " or ".join(json.dumps(kwargs) for kwargs in trained)
            log.warning("%s: prompts are rendered with chat_template_kwargs %s, and it was trained with %s",
                        model, text, others)  # fmt: skip


def _text(messages: Sequence[Any], settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(apply_template(messages, tokenizer, generation_prompt=True, settings=settings))


def _kwargs(prompt: Any) -> str:
    """The ``chat_template_kwargs`` of a prompt, as JSON."""
    return json.dumps(split_arguments(prompt)[1].get(TEMPLATE_KWARGS, {}), sort_keys=True)
