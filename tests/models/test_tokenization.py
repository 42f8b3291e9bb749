"""Token ids and masks: equality with trl's preparation, special tokens of chat templates, messages of failures."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from align.config.columns import ID_COLUMNS, MASK_COLUMNS
from align.errors import AlignError, DataError, ModelError
from align.models.tokenization import (
    Rendered,
    apply_template,
    collate,
    encode_pair,
    encode_prompt,
    encode_reward_texts,
    pad,
    render,
    tokenize_pairs,
)
from reward_models.tokenization import pair_tokens
from tests.helpers.builders import TEMPLATE, beginning, rows, tokenizer

ASKED = [{"role": "user", "content": "is the film good"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("very good", "not very good"))
CHAT = {"id": "c1", "prompt": ASKED, "chosen": GOOD, "rejected": BAD}
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message\n comes first') }}{% endif %}"


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    made = tokenizer()
    made.chat_template = template
    return made


def by_trl(pairs: Dataset, made: PreTrainedTokenizerBase) -> Dataset:
    """trl's own preparation of a table, without a trainer."""
    settings: Any = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=made)
    return DPOTrainer._prepare_dataset(trainer, pairs, made, settings, "pairs")


MERGED = {"id": "m", "prompt": "the film", "chosen": "good plot", "rejected": " bad"}
"""Its prompt ends in a word that goes on in the chosen response."""
TABLES: list[list[dict[str, Any]]] = [
    rows(6),
    [MERGED, {"id": "e", "prompt": "the plot", "chosen": " fine<eos>", "rejected": " dull"}],
    [CHAT, CHAT | {"id": "c2", "prompt": [*ASKED, *BAD, *ASKED], "chosen": [*GOOD, *ASKED, *GOOD]}],
]


@pytest.mark.parametrize("table", TABLES, ids=["plain", "merged", "chat"])
@pytest.mark.parametrize("kind", ["words", "bos", "odd end"])
def test_ids_of_pairs_are_those_of_trl(table: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    """Also where the generation prompt is not what a response follows."""
    made = beginning(tmp_path) if kind == "bos" else tokenizer()
    if kind == "odd end":
        made.chat_template = TEMPLATE.replace("assistant :{% endif", "assistant : dull{% endif")
    pairs = Dataset.from_list(table)
    expected, found = by_trl(pairs, made), tokenize_pairs(pairs, made)
    for name in ID_COLUMNS:
        assert found[name][:] == expected[name][:], name
    assert [name for name in found.column_names if name not in MASK_COLUMNS] == expected.column_names
    assert found["chosen"][:] == pairs["chosen"][:], "texts are left as they are"


def test_an_end_of_the_prompt_that_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pairs = Dataset.from_list([MERGED, MERGED | {"id": "n"}])
    ids = encode_pair(pairs[0], tokenizer())
    film = tokenizer().convert_tokens_to_ids("film")
    assert ids.unused == [film] and film not in ids.prompt
    tokenize_pairs(pairs, tokenizer())
    assert caplog.text.count("pair m, and perhaps others: the last tokens of its prompt, 'film', differ") == 1


def test_a_prompt_ends_with_what_begins_an_answer() -> None:
    made = tokenizer()
    assert encode_prompt("the film", made) == made.convert_tokens_to_ids(["the", "film"])
    own = made.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(ASKED, made) == own
    assert encode_prompt(str(apply_template(ASKED, made, generation_prompt=True)), made) == own
    assert encode_prompt(str(apply_template(ASKED, made)), made) == own[:-2]


def test_a_rendered_text_has_no_further_special_tokens(tmp_path: Path) -> None:
    made = beginning(tmp_path)
    text = render(ASKED, GOOD, made)
    assert isinstance(text, Rendered) and not isinstance(render("the film", " is good", made), Rendered)
    ids = encode_reward_texts([text, "the film"], made, 64)
    assert ids[0] == made.apply_chat_template([*ASKED, *GOOD], return_dict=False)
    assert ids[1] == [made.bos_token_id, *made.convert_tokens_to_ids(["the", "film"]), made.eos_token_id]


FAILURES = [
    (None, ModelError, "no-chat-template", "no chat template, and the texts are lists of messages"),
    ("{% if %}", ModelError, "chat-template", "its chat template is not valid (line 1: Expected an expression"),
    (STRICT, DataError, "chat-template", "does not take these messages: a system message comes first"),
    ("{{ messages[0].name.first }}", DataError, "chat-template", "has no attribute 'name'"),
    ("{{ messages[0].content + 1 }}", DataError, "chat-template", "can only concatenate str"),
]


@pytest.mark.parametrize(("template", "kind", "code", "words"), FAILURES)
def test_a_template_that_fails_is_named_with_its_words(
    template: str | None, kind: type[AlignError], code: str, words: str
) -> None:
    made = with_template(template)
    pairs = Dataset.from_list([CHAT])
    for call in (
        lambda: encode_pair(CHAT, made),
        lambda: tokenize_pairs(pairs, made),
        lambda: pair_tokens(pairs, made, 64),
        lambda: encode_prompt(ASKED, made, row="pair c1"),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.code == code and words in caught.value.message
        assert kind is ModelError or caught.value.message.startswith("pair c1: ")


def test_messages_without_an_id_are_shown() -> None:
    with pytest.raises(DataError, match=r"\[\{'role': 'user', 'content': 'is the film good'\}\]: the chat template"):
        encode_prompt(ASKED, with_template(STRICT))


def test_plain_responses_need_a_token_that_ends_them() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token, expected one to end responses"):
        encode_pair(rows(1)[0], tokenizer(eos=False))
    assert encode_pair(CHAT, tokenizer(eos=False)).chosen


def test_rows_are_padded_on_either_side() -> None:
    """A row may be empty or the longest."""
    right, left = pad([[5], [6, 7], []], 9), pad([[5], [6, 7], []], 9, left=True)
    assert right.input_ids.tolist() == [[5, 9], [6, 7], [9, 9]]
    assert right.attention_mask.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert left.input_ids.tolist() == [[9, 5], [6, 7], [9, 9]]
    assert left.attention_mask.tolist() == [[0, 1], [1, 1], [0, 0]]
    assert right.input_ids.dtype == left.attention_mask.dtype == torch.long


@pytest.mark.parametrize(("truncation", "chosen"), [("keep_start", [5, 6, 7, 8]), ("keep_end", [6, 7, 8, 9])])
def test_a_batch_is_truncated_and_masked(truncation: str, chosen: list[int]) -> None:
    """Chosen rows first; the mask of the completion follows the tokens that are left."""
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [3], "margin": 1.0}
    batch = collate([row], 0, max_length=4, truncation=truncation)
    assert batch["input_ids"].tolist() == [chosen, [5, 6, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["completion_mask"].tolist() == [[int(token > 6) for token in chosen], [0, 0, 1, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
