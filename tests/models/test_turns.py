"""Whose words count in responses of several messages; ids stay those of trl."""

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer

from align.config.columns import ID_COLUMNS, MASK_COLUMNS
from align.errors import DataError
from align.models import message_checks
from align.models.message_checks import check_turns_of, survey_pairs
from align.models.tokenization import collate, encode_table
from align.models.turns import TURNS, Turns, counted, has_turns
from align.training.pair_tables import as_table, tokenize_table
from align.training.trainer import PreferenceTrainer
from tests.models.test_conformance import ASK, ASKED, BAD, CHATML, GOOD, MISTRAL, THINKING, made, prepared

BLOCKS = (
    "{% for m in messages %}<|im_start|> {{ m.role }} \n {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} <|im_end|> {% endgeneration %}{% else %}{{ m.content }} <|im_end|> {% endif %}\n {% endfor %}"
    + ASK
)
LAST_THINKS = (
    "{% for m in messages %}<|im_start|> {{ m.role }} \n {% if loop.last and m.role == 'assistant' %}<think> </think> "
    "{% endif %}{{ m.content }} <|im_end|> \n {% endfor %}" + ASK
)
"""As Qwen3: only the last answer is written with its empty thoughts, so no rendered prefix ends an earlier one."""
COUNTS = "{% for m in messages %}{{ messages | length }} {{ m.role }} {{ m.content }} {% endfor %}"
"""Every message is written differently in a longer conversation; only a mark in its content tells where it is."""
FOLLOWED = [*GOOD, {"role": "user", "content": "the plot is not good"}, *BAD]
ROW = {"id": "m", "prompt": ASKED, "chosen": FOLLOWED, "rejected": BAD}


def words(row: dict[str, Any], found: PreTrainedTokenizerBase, turns: Turns, side: int = 0) -> str:
    """The text of the tokens that count in a response."""
    table = encode_table(Dataset.from_list([row]), found, turns=turns)
    ids, mask = (table[0].get(names[side]) for names in (ID_COLUMNS[1:], MASK_COLUMNS))
    kept = ids if mask is None else [token for token, one in zip(ids, mask, strict=True) if one]
    return " ".join(found.decode(kept).replace("\n", "").split())


OWN = "very good <|im_end|> not very good <|im_end|>"
EXPECTED: dict[str, tuple[str, str, str, str]] = {
    "chatml": (CHATML, OWN, "not very good <|im_end|>", "<|im_start|> user the plot is not good <|im_end|>"),
    "blocks": (BLOCKS, OWN, "not very good <|im_end|>", "<|im_start|> user the plot is not good <|im_end|>"),
    "mistral": (MISTRAL, "very good<eos> not very good<eos>", "not very good<eos>", "[INST] the plot is not good"),
    "thinking": (THINKING, OWN, "not very good <|im_end|>", "<|im_start|> user the plot is not good <|im_end|>"),
    "last thinks": (
        LAST_THINKS, "very good <|im_end|> <think> </think> not very good <|im_end|>",
        "<think> </think> not very good <|im_end|>", "<|im_start|> user the plot is not good <|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_only_the_assistants_words_count(name: str) -> None:
    template, own, last, others = EXPECTED[name]
    found = made("neither", template)
    joined = {turns: words(ROW, found, turns).replace(" <eos>", "<eos>") for turns in TURNS}
    assert joined["assistant"] == own and joined["last"] == last
    assert others in joined["all"] and "plot" not in joined["assistant"]
    assert words(ROW, found, "assistant", side=1) == words(ROW, found, "all", side=1), "one message: as in trl"


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_stay_those_of_trl(name: str) -> None:
    pairs, found = Dataset.from_list([ROW]), made("bos", EXPECTED[name][0])
    ours, theirs = (prepared(kind, pairs, found) for kind in (PreferenceTrainer, DPOTrainer))
    assert [ours[column] for column in ID_COLUMNS] == [theirs[column] for column in ID_COLUMNS]
    assert [len(mask) for mask in ours["chosen_mask"]] == [len(ids) for ids in ours["chosen_ids"]]


def test_tool_results_are_read_and_carry_no_loss() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "plot", "arguments": {}}}]}
    write = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    )
    talk = [call, {"role": "tool", "content": "the film is good"}, *BAD]
    row = {**ROW, "chosen": talk}
    assert words(row, made("neither", write), "assistant") == "plot <|im_end|> not very good <|im_end|>"


def test_a_message_is_found_by_its_content_where_everything_else_changes() -> None:
    assert words(ROW, made("neither", COUNTS), "assistant") == "very good not very good"


def test_a_call_is_found_where_only_the_last_message_has_thoughts() -> None:
    """As in Qwen3: no rendered prefix ends the call, and it has no content to put a mark into."""
    calls = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    found = made("neither", LAST_THINKS.replace("{{ m.content }}", calls))
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "plot", "arguments": {}}}]}
    row = {**ROW, "chosen": [call, {"role": "tool", "content": "the film is good"}, *BAD]}
    expected = "plot <|im_end|> <think> </think> not very good <|im_end|>"
    assert words(row, found, "assistant") == expected


def test_what_cannot_be_told_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Dataset.from_list([{**ROW, "chosen": [{"role": "assistant", "content": ""}, *FOLLOWED[1:]]}])
    found = made("neither", COUNTS)
    found.name_or_path = "counting"
    with pytest.raises(
        DataError, match=r"pair m: chosen\[1\]: the chat template of counting .* cannot be told"
    ) as caught:
        encode_table(pairs, found)
    assert caught.value.code == "turns" and "generation" in caught.value.hint
    assert MASK_COLUMNS[0] not in encode_table(pairs, found, turns="all").column_names
    monkeypatch.setattr(message_checks, "load_tokenizer", lambda *_, **__: found)
    with pytest.raises(DataError, match="cannot be told"):
        check_turns_of(pairs, "model", "assistant")
    check_turns_of(pairs, "model", "all")


def test_one_message_a_response_needs_no_mask() -> None:
    pairs = Dataset.from_list([{**ROW, "chosen": GOOD}])
    assert not has_turns(pairs)
    assert MASK_COLUMNS[0] not in encode_table(pairs, made("neither", COUNTS)).column_names


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 8, 14, 20])
def test_the_batch_masks_the_tokens_that_are_left(truncation: str, max_length: int | None) -> None:
    table = encode_table(Dataset.from_list([ROW]), made("neither"))
    row = table[0]
    batch = collate(table, 0, max_length=max_length, truncation=truncation)
    for k, side in enumerate(("chosen", "rejected")):
        whole = [0] * len(row["prompt_ids"]) + row[f"{side}_mask"]
        cut = whole if max_length is None else whole[-max_length:] if truncation == "keep_end" else whole[:max_length]
        assert batch["completion_mask"][k].tolist()[: len(cut)] == cut
        assert int(batch["completion_mask"][k].sum()) == sum(cut)
    left = all(batch["completion_mask"].sum(dim=1) > 0)
    assert counted(row, max_length, truncation) == left


def test_a_pair_of_which_only_words_of_others_are_left_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tool = [{"role": "tool", "content": "the film is good the plot is good"}, *GOOD]
    pairs = Dataset.from_list([{**ROW, "id": "t", "chosen": tool}, {**ROW, "chosen": GOOD}])
    found = made("neither")
    table = tokenize_table(pairs, found, _args(max_length=18), [])
    assert len(table) == 1 and "1 of 2 pairs are left out: " in caplog.text
    assert len(tokenize_table(pairs, found, _args(max_length=None), [])) == 2


def test_the_share_of_others_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made("neither")
    monkeypatch.setattr(message_checks, "load_tokenizer", lambda *_, **__: found)
    pairs = Dataset.from_list([ROW])
    survey = survey_pairs(pairs, "model")
    table = encode_table(pairs, found)
    masks = [mask for name in MASK_COLUMNS for mask in table[name]]
    assert survey.tokens == sum(map(len, masks)) and survey.others == survey.tokens - sum(map(sum, masks)) > 5
    assert survey_pairs(pairs.select([]), "model")[3:] == (0, 0)


def test_rows_in_memory_have_no_keys_of_other_rows() -> None:
    """datasets gives every tool call the arguments of all others, as nulls."""
    write = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.arguments | tojson }}{% endfor %}"
    )
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"arguments": one}]} for one in ({"film": 1}, {"plot": 2})
    ]
    given = [{**ROW, "chosen": [call], "tools": [{"name": f"n{k}", f"k{k}": {"a": k}}]} for k, call in enumerate(calls)]
    for table in (as_table(given, "t"), as_table(Dataset.from_list(given), "t")):
        assert [row["chosen"][0]["tool_calls"] for row in table] == [call["tool_calls"] for call in calls]
        assert table[1]["tools"] == '[{"name": "n1", "k1": {"a": 1}}]'
    ids = [encode_table(as_table(rows, "t"), made("neither", write))["chosen_ids"] for rows in (given, given[:1])]
    assert ids[0][0] == ids[1][0]


def _args(**changed: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**{"dataset_num_proc": None, "max_length": 128, "truncation_mode": "keep_start"} | changed)


def test_parts_that_a_template_prints_are_refused() -> None:
    """trl trains on Python's print of the list."""
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "very good"}]}]
    pairs = Dataset.from_list([{**ROW, "chosen": parts}])
    with pytest.raises(DataError, match=r"pair m: .* it writes content parts as Python prints them"):
        encode_table(pairs, made("neither", CHATML))
    reads = CHATML.replace("m.content", "m.content if m.content is string else m.content[0].text")
    ours, theirs = (prepared(kind, pairs, made("neither", reads)) for kind in (PreferenceTrainer, DPOTrainer))
    assert [ours[column][:] for column in ID_COLUMNS] == [theirs[column][:] for column in ID_COLUMNS]
