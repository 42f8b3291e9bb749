"""Every stage reads the same ids of the same pair, which are trl's; crossed over tokenizers and chat templates."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, RobertaConfig
from trl import DPOTrainer, RewardTrainer

from align.config.columns import ID_COLUMNS
from align.errors import AlignError, DataError, ModelError
from align.models.chat_template import templated
from align.models.tokenization import encode_pair, encode_prompt, encode_reward_texts, render, tokenize_pairs
from align.training.pair_tables import tokenize_table
from align.training.trainer import PreferenceTrainer
from reward_models.tokenization import pair_tokens, told_apart
from tests.helpers.builders import rows, tokenizer

MARKS = ["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<think>", "</think>", "<|head|>", "<|/head|>", "<|eot|>"]
PLAIN = ["system", "tool", "model", "\n"]
HEAD = "{% for m in messages %}<|im_start|> {{ m.role }} \n "
END = "{{ m.content }} <|im_end|> \n {% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
CHATML = HEAD + END + ASK
REFUSE_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    + ALTERNATE
    + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
THINKING = CHATML.replace(
    "assistant \n {% endif %}",
    "assistant \n {% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}{% endif %}",
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|head|> {{ m.role }} <|/head|> \n {{ m.content | trim }} <|eot|> "
    "{% endfor %}{% if add_generation_prompt %}<|head|> assistant <|/head|> \n {% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + REFUSE_SYSTEM + "{% for m in messages %}" + ALTERNATE
    + "<|im_start|> {{ 'model' if m.role == 'assistant' else m.role }} \n {{ m.content | trim }} <|im_end|> \n "
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|> model \n {% endif %}"
)  # fmt: skip
QWEN_3 = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|> {{ m.role }} \n "
    "{% set parts = m.content.split('</think>') %}{% if m.role == 'assistant' and loop.index0 > ns.asked %}<think> "
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }} </think> {% endif %}"
    "{{ parts[-1].lstrip() }} <|im_end|> \n {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n "
    "{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}{% endif %}"
)
"""Reasoning stands in answers after the last question only, and there also where an answer has none."""
STRIPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
OPENED = STRIPS.replace("\n {% endif %}", "\n <think> {% endif %}")
"""As of R1's distilled models: a prompt ends in an opened thought, which no response that is written has."""
TOOLS = "{% if tools %}system {% for t in tools %}{{ t.name }} {% endfor %}{% endif %}" + CHATML
GOOD_TEMPLATES: dict[str, Any] = {
    "chatml": CHATML,
    "llama": "{{ bos_token }}" + CHATML,
    "llama_3": LLAMA_3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "qwen_3": QWEN_3,
    "trims": CHATML.replace("m.content", "m.content | trim"),
    "strips": STRIPS,
    "dated": "{{ strftime_now('%Y') }} " + CHATML,
    "named": {"default": CHATML, "tool_use": TOOLS},
    "tools": TOOLS,
}
ADDED = {"neither": "$A", "bos": "<bos> $A", "eos": "$A <eos>", "both": "<bos> $A <eos>"}
SIDES = list(itertools.product(("left", "right"), repeat=2))
ASKED = [{"role": "user", "content": "is the film good"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("very good", "not very good"))
AGAIN = [*ASKED, *BAD, {"role": "user", "content": "the plot"}]
CHAT = [
    {"id": "c1", "prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    {"id": "c2", "prompt": AGAIN, "chosen": GOOD, "rejected": BAD},
]
CALL = [{"type": "function", "function": {"name": "plot", "arguments": {}}}]


def made(added: str, template: Any = CHATML, sides: tuple[str, str] = ("right", "right")) -> PreTrainedTokenizerBase:
    """A word tokenizer that adds special tokens around a text, with a template and its own sides."""
    found = tokenizer(template=False)
    found.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": MARKS})
    found.add_tokens(PLAIN)
    ids = [(token, found.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    found._tokenizer.post_processor = TemplateProcessing(single=ADDED[added], special_tokens=ids)
    found.chat_template = template
    found.padding_side, found.truncation_side = sides
    return found


def prepared(kind: Any, pairs: Dataset, found: PreTrainedTokenizerBase, max_length: int | None = 128) -> Dataset:
    """The table that a trainer of this kind trains on, without a model."""
    settings: Any = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    if kind is PreferenceTrainer:
        return tokenize_table(pairs, found, settings, [])
    trainer: Any = SimpleNamespace(_tokenizer=found)
    return kind._prepare_dataset(trainer, pairs, found, settings, "train")


def trained(pairs: Dataset, found: PreTrainedTokenizerBase) -> list[tuple[list[int], ...]]:
    table = prepared(PreferenceTrainer, pairs, found)
    return list(zip(*(table[name] for name in ID_COLUMNS), strict=True))


def as_expected(pairs: Dataset, found: PreTrainedTokenizerBase, *, by_trl: bool = True) -> None:
    """All ways from a pair to ids agree with each other and, unless it is wrong, with trl."""
    training = trained(pairs, found)
    measured = tokenize_pairs(pairs, found)
    assert training == list(zip(*(measured[name] for name in ID_COLUMNS), strict=True))
    read, count = pair_tokens(pairs, found, 128), len(pairs)
    scored = [*read.chosen, *read.rejected]
    for k, (prompt, chosen, rejected) in enumerate(training):
        settings = {} if isinstance(pairs[k]["prompt"], str) else {"settings": arguments(pairs[k])}
        assert encode_prompt(pairs[k]["prompt"], found, **settings)[: len(prompt)] == prompt
        assert scored[k] == [*prompt, *chosen] and scored[k + count] == [*prompt, *rejected]
    if by_trl:
        table, rewards = prepared(DPOTrainer, pairs, found), prepared(RewardTrainer, pairs, found)
        assert training == list(zip(*(table[name] for name in ID_COLUMNS), strict=True))
        assert scored == [*rewards["chosen_ids"], *rewards["rejected_ids"]]


def arguments(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("tools",) if row.get(name)} | (row.get("chat_template_kwargs") or {})


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("template", GOOD_TEMPLATES)
def test_messages_have_the_ids_of_trl(template: str, added: str) -> None:
    """What the tokenizer adds around a text has no part in messages."""
    sides = SIDES[(list(GOOD_TEMPLATES).index(template) + list(ADDED).index(added)) % 4]
    found = made(added, GOOD_TEMPLATES[template], sides)
    as_expected(Dataset.from_list(CHAT), found)
    assert encode_prompt(ASKED, found) == encode_pair(CHAT[0], found).prompt, "sampled as trained"
    for pad in (found.eos_token, None):
        found.pad_token = pad
        as_expected(Dataset.from_list(CHAT), found)


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("sides", SIDES)
def test_plain_texts_begin_and_end_once(added: str, sides: tuple[str, str]) -> None:
    """trl is right unless the tokenizer adds an end: then its responses end twice and its prompt ends before them."""
    found, pairs = made(added, None, sides), Dataset.from_list(rows(6))
    as_expected(pairs, found, by_trl="eos" not in ADDED[added])
    plain = trained(pairs, made("bos" if added in ("bos", "both") else "neither", None))
    assert trained(pairs, found) == plain
    for row, (prompt, chosen, _) in zip(pairs, plain, strict=True):
        assert encode_prompt(row["prompt"], found) == prompt and found.eos_token_id not in prompt
        assert chosen.count(found.eos_token_id) == 1 and chosen[-1] == found.eos_token_id
    ended = pairs.map(lambda row: {side: row[side] + "<eos>" for side in ("chosen", "rejected")})
    assert trained(ended, found) == plain


@pytest.mark.parametrize("added", ["bos", "both"])
def test_a_beginning_that_a_text_carries_is_not_doubled(added: str, caplog: pytest.LogCaptureFixture) -> None:
    """trl doubles it."""
    found, pairs = made(added, None), Dataset.from_list(rows(6))
    found.name_or_path = f"begun-{added}"
    begun = pairs.map(lambda row: {"prompt": f"<bos> {row['prompt']}"})
    as_expected(begun, found, by_trl=False)
    assert trained(begun, found) == trained(pairs, found)
    assert caplog.text.count(f"begun-{added}: texts begin with '<bos>', which the tokenizer adds as well") == 1


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("named", [{"cls_token": "<eos>", "sep_token": "<eos>"}, {"cls_token": "<bos>"}])
def test_a_decoder_that_names_a_cls_token_is_read_as_any_other(named: dict[str, str], added: str) -> None:
    """As h2o-danube's tokenizer does: neither a second beginning nor an end goes around what a template writes."""
    found = made(added, GOOD_TEMPLATES["llama"])
    found.add_special_tokens(named)
    as_expected(Dataset.from_list(CHAT), found)


@pytest.mark.parametrize("added", ADDED)
def test_a_response_ends_where_texts_hold_no_special_tokens(added: str) -> None:
    """trl writes the name of the end as plain characters, so that its policies never learn to stop."""
    found, pairs = made(added, None), Dataset.from_list(rows(6))
    usual = trained(pairs, found)
    found.split_special_tokens = True
    as_expected(pairs, found, by_trl=False)
    assert trained(pairs, found) == usual
    literal = trained(pairs.map(lambda row: {"chosen": row["chosen"] + "<eos>"}), found)
    assert all(chosen[-1] == found.eos_token_id and chosen.count(chosen[-1]) == 1 for _, chosen, _ in literal)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("added", ADDED)
def test_reward_texts_are_truncated_on_the_right(added: str, sides: tuple[str, str]) -> None:
    found = made(added, None, sides)
    (ids,) = encode_reward_texts(["the film is very " * 9], found, 8)
    (whole,) = encode_reward_texts(["the film is very " * 9], found, 99)
    assert ids == [*whole[:7], found.eos_token_id]


def test_tools_and_arguments_of_a_row_reach_the_template() -> None:
    """Also as JSON, as a pair table has them."""
    tools, off = [{"name": "plot"}], {"enable_thinking": False}
    found = made("bos", GOOD_TEMPLATES["named"])
    given = [{**CHAT[0], "tools": tools}]
    as_expected(Dataset.from_list(given), found)
    plain, with_tools = encode_pair(CHAT[0], found), encode_pair(given[0], found)
    assert len(with_tools.prompt) == len(plain.prompt) + 2
    assert encode_pair({**CHAT[0], "tools": '[{"name": "plot"}]'}, found) == with_tools
    found = made("neither", THINKING)
    ids = encode_prompt(ASKED, found, settings=off)
    assert ids[-2:] == found.convert_tokens_to_ids(["<think>", "</think>"])
    row = {**CHAT[0], "chat_template_kwargs": '{"enable_thinking": false}'}
    assert encode_pair(row, found).unused == ids[-2:]
    table = prepared(DPOTrainer, Dataset.from_list([{**CHAT[0], "chat_template_kwargs": off}]), found)
    assert encode_pair(row, found)[:3] == tuple(table[0][name] for name in ID_COLUMNS)


def test_reasoning_is_read_as_the_template_writes_it() -> None:
    """A thought of an answer is trained, sampled and scored; of an earlier answer it is no part of the prompt."""
    answers = [[{"role": "assistant", "content": f"<think> {word} </think> very good"}] for word in ("plot", "film")]
    before = [*ASKED, *answers[0], {"role": "user", "content": "the plot"}]
    thought = [{"id": "t", "prompt": before, "chosen": answers[0], "rejected": answers[1]}]
    found = made("bos", QWEN_3)
    as_expected(Dataset.from_list([*thought, *CHAT]), found)
    ids = encode_pair(thought[0], found)
    marks = found.convert_tokens_to_ids(["<think>", "</think>"])
    assert not {*marks} & {*ids.prompt} and ids.chosen[0] == marks[0] and ids.chosen != ids.rejected
    off = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in CHAT]
    as_expected(Dataset.from_list(off), found)
    assert (
        encode_pair(off[0], found).prompt[-2:] == marks == encode_prompt(ASKED, found, settings=arguments(off[0]))[-2:]
    )


def test_a_thought_that_a_prompt_opens_and_no_response_has() -> None:
    """It is sampled after it, and trained, measured and scored without it, as in trl; a message says so."""
    found = made("bos", OPENED)
    as_expected(Dataset.from_list(CHAT), found)
    opened, plain = encode_pair(CHAT[0], found), encode_pair(CHAT[0], made("bos", STRIPS))
    assert opened.unused == [found.convert_tokens_to_ids("<think>")] and opened[:3] == plain[:3]
    assert encode_prompt(ASKED, found) == [*opened.prompt, *opened.unused]


def test_a_message_that_only_calls_a_tool_is_read_by_what_it_has() -> None:
    """Content that is None, as Arrow has it where it is absent, is not the word None; nor is a key of other rows."""
    found = made("neither", TOOLS.replace("{{ m.content }}", "{{ m.content }}{% if 'name' in m %}tool{% endif %}"))
    turns = [
        {"role": "assistant", "tool_calls": CALL} | content for content in ({}, {"content": None}, {"content": ""})
    ]
    rendered = [templated([*ASKED, turn], found, generation_prompt=False) for turn in turns]
    assert rendered[0] == rendered[1] == rendered[2]
    named = [{"role": "user", "content": "good", "name": name} for name in (None, "user")]
    without, with_name = (templated([turn, *GOOD], found, generation_prompt=False) for turn in named)
    assert found.convert_tokens_to_ids("tool") in with_name and found.convert_tokens_to_ids("tool") not in without
    as_expected(Dataset.from_list([{**CHAT[0], "chosen": [turns[1]], "rejected": [turns[2] | BAD[0]]}]), found)


SYSTEM = [{"role": "system", "content": "very"}, *ASKED]
ALWAYS = HEAD + END + "<|im_start|> assistant \n "
LLAMA_ALWAYS = (
    "{% for m in messages %}[INST]{{ m.role }}[/INST] {{ m.content }} <eos>{% endfor %}[INST]assistant[/INST] "
)
REFUSALS: list[tuple[Any, list[dict[str, str]], type[AlignError], str]] = [
    (GOOD_TEMPLATES["gemma"], SYSTEM, DataError, "pair c1: .* System role not supported"),
    (MISTRAL, [*ASKED, *ASKED], DataError, "pair c1: .* roles must alternate"),
    ("{% for %}", ASKED, ModelError, "its chat template is not valid"),
    ({"rag": CHATML}, ASKED, ModelError, "its chat template is not valid"),
    (None, ASKED, ModelError, "no chat template"),
    (ALWAYS, ASKED, ModelError, "ends a conversation in 'assistant' although its last message is an answer"),
    (LLAMA_ALWAYS, ASKED, ModelError, r"ends a conversation in 'assistant\[/INST\]' although"),
]


@pytest.mark.parametrize(("template", "prompt", "kind", "words"), REFUSALS)
def test_what_cannot_be_right_is_refused_in_every_way(
    template: Any, prompt: list[dict[str, str]], kind: type[AlignError], words: str
) -> None:
    found, pairs = made("bos", template), Dataset.from_list([{**CHAT[0], "prompt": prompt}])
    for read in (trained, tokenize_pairs, lambda table, its: pair_tokens(table, its, 64)):
        with pytest.raises(kind, match=words):
            read(pairs, found)


def test_pairs_that_a_template_makes_the_same_are_left_out_of_reward_training(caplog: pytest.LogCaptureFixture) -> None:
    """A template that drops reasoning, or white space at the ends."""
    thought = [{"role": "assistant", "content": f"<think> {word} </think> very good"} for word in ("plot", "film")]
    same = {"id": "s", "prompt": ASKED, "chosen": thought[:1], "rejected": thought[1:]}
    found = made("neither", GOOD_TEMPLATES["strips"])
    table = Dataset.from_list([CHAT[0], same])
    read = pair_tokens(table, found, 64)
    assert read.alike.tolist() == [False, True] and told_apart(table, read.alike, 64).tolist() == [0]
    assert "1 of 2 pairs are left out: their two responses are the same tokens within max_length 64: s" in caplog.text


@pytest.mark.parametrize("added", ADDED)
def test_the_architecture_decides_whether_a_cls_token_is_an_encoder_s(added: str, tmp_path: Path) -> None:
    """RoBERTa's tokenizer also has cls = bos and sep = eos, and adds both; an adapter's is read as that of its base."""
    words = made(added, GOOD_TEMPLATES["llama"])
    words.add_special_tokens({"cls_token": "<bos>", "sep_token": "<eos>"})
    folders = {name: tmp_path / name for name in ("llama", "roberta", "adapter")}
    RobertaConfig(vocab_size=len(words)).save_pretrained(folders["roberta"])
    LlamaConfig(vocab_size=len(words)).save_pretrained(folders["llama"])
    LoraConfig(base_model_name_or_path=str(folders["llama"])).save_pretrained(folders["adapter"])
    read = {}
    for name, folder in folders.items():
        words.save_pretrained(folder)
        found = AutoTokenizer.from_pretrained(folder)
        assert found.cls_token_id == words.bos_token_id
        if name != "roberta":
            as_expected(Dataset.from_list(CHAT), found)
        read[name] = encode_reward_texts([render(ASKED, GOOD, found)], found, 99)
    assert (read["roberta"] == read["llama"]) == (added in ("neither", "eos")) and read["adapter"] == read["llama"]
