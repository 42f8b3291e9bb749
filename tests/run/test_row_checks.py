"""Messages are tried on the chat templates, row by row, before a model loads; what a template writes is in the keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from align import PreferenceConfig, PreferenceTrainer
from align.commands.data import check_data
from align.config import PairsSection, RunConfig, load_config
from align.data.pairs import load_pairs
from align.data.prompts import read_prompts
from align.data.text import count_words, plain
from align.errors import DataError, ModelError
from align.models import chat_template
from align.models.chat_template import rendered_today
from align.models.message_checks import AsTokens, check_prompts_of, survey_pairs
from align.models.row_lengths import beyond_positions
from align.run import pipeline
from align.run.row_checks import check_table_rows
from tests.helpers.builders import TEMPLATE, causal, llama_reward, rows, tokenizer
from tests.helpers.command_line import jsonl

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
STRIPS = TEMPLATE.replace("m.content", "m.content.split('</think>')[-1] | trim")
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("very good", "not very good"))
ASKED = [{"role": "user", "content": "is the film good"}]
SYSTEM = [{"role": "system", "content": "very"}, *ASKED]
CALL = [{"type": "function", "function": {"name": "plot", "arguments": {}}}]


def pair(name: str, **parts: Any) -> dict[str, Any]:
    return {"id": name, "prompt": ASKED, "chosen": GOOD, "rejected": BAD} | parts


def saved(file: Path, table: list[dict[str, Any]]) -> Path:
    jsonl(file, table)
    return file


def model(folder: Path, template: str) -> Path:
    causal(folder)
    made = tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def run_file(folder: Path, table: list[dict[str, Any]], template: str) -> Path:
    model(folder / "policy", template)
    jsonl(folder / "pairs.jsonl", table)
    run = {
        "name": "r", "output_dir": str(folder / "runs"), "pairs": {"path": str(folder / "pairs.jsonl")},
        "train": {"model": str(folder / "policy"), "methods": {"dpo": {"loss": "dpo"}}},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def test_a_refused_row_far_down_is_found_before_a_model_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the dry run and by the first stage; every refused row is named."""
    table = [pair(f"p{k}", prompt=SYSTEM if k in (3, 7) else ASKED) for k in range(9)]
    config = load_config(run_file(tmp_path, table, NO_SYSTEM), None)
    monkeypatch.setattr("align.training.trainer_inputs.load_policy", None)
    for act in (lambda: pipeline.check(config, tables=True), lambda: pipeline.run_pipeline(config, command="")):
        with pytest.raises(DataError) as caught:
            act()
        assert caught.value.code == "chat-template" and "2 of 9 rows cannot be read by" in caught.value.message
        for name in ("p3", "p7"):
            assert f"pair {name}: the chat template of {tmp_path / 'policy'} does not take" in caught.value.message
        assert "no system here" in caught.value.message


def test_check_with_a_model_names_refused_same_and_begun_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = {"chosen": [{"role": "assistant", "content": "<think> a </think> good"}],
               "rejected": [{"role": "assistant", "content": " good "}]}  # fmt: skip
    source = PairsSection(path=str(saved(tmp_path / "same.jsonl", [pair("p0"), pair("p1", **thought)])))
    check_data(source, drop_to=None, model=str(model(tmp_path / "strips", STRIPS)))
    assert "1 of 2 pairs become the same tokens on both sides" in (said := capsys.readouterr().out) and ": p1\n" in said
    refused = PairsSection(path=str(saved(tmp_path / "system.jsonl", [pair("p0"), pair("p1", prompt=SYSTEM)])))
    with pytest.raises(DataError, match=r"pair p1: the chat template of .* no system here"):
        check_data(refused, drop_to=None, model=str(model(tmp_path / "strict", NO_SYSTEM)))
    begins = model(tmp_path / "begins", TEMPLATE)
    made = tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    made.save_pretrained(begins)
    begun = [row | {"prompt": f"<unk> {row['prompt']}"} if k == 2 else row for k, row in enumerate(rows(4))]
    found = PairsSection(path=str(saved(tmp_path / "begun.jsonl", begun)))
    assert survey_pairs(load_pairs(found), str(begins)) == AsTokens([], ["p2"], "<unk>")


def test_prompts_are_tried_with_and_without_an_answer(tmp_path: Path) -> None:
    always = TEMPLATE.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    folder = str(model(tmp_path / "always", always))
    check_prompts_of([ASKED, "plain text"], [folder])
    with pytest.raises(ModelError, match="ends a conversation in 'assistant :' although its last message is an answer"):
        check_prompts_of([ASKED], [folder], answered=True)


def test_messages_that_only_call_tools_and_empty_system_messages_are_taken(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": CALL}
    silent = [{"role": "system", "content": ""}, *ASKED]
    done = [*ASKED, call, {"role": "tool", "content": ""}]
    table = [pair(f"p{k}", chosen=[call | more]) for k, more in enumerate([{}, {"content": None}, {"content": ""}])]
    table += [pair("p3", prompt=silent), pair("p4", prompt=done)]
    loaded = load_pairs(PairsSection(path=str(saved(tmp_path / "pairs.jsonl", table))))
    assert loaded["id"][:] == ["p0", "p1", "p2", "p3", "p4"]
    assert "None" not in plain(loaded[0]["chosen"]) and count_words(loaded[0]["chosen"]) == 0
    assert len(read_prompts(PairsSection(path=str(saved(tmp_path / "prompts.jsonl", table))))) == 5
    for wrong in ({"role": "assistant", "content": ""}, {"role": "assistant", "content": None, "tool_calls": []}):
        with pytest.raises(DataError, match=r"chosen\[1\]: found"):
            load_pairs(PairsSection(path=str(saved(tmp_path / "wrong.jsonl", [pair("p0", chosen=[wrong])]))))


def test_arguments_of_a_prompt_go_with_it(tmp_path: Path) -> None:
    row = pair("p0", tools=[{"name": "plot"}], chat_template_kwargs={"enable_thinking": False})
    source = PairsSection(path=str(saved(tmp_path / "pairs.jsonl", [row])))
    arguments = {name: row[name] for name in ("tools", "chat_template_kwargs")}
    assert read_prompts(source)[0].prompt == {"messages": row["prompt"], **arguments}
    loaded = load_pairs(source)[0]
    assert json.loads(loaded["tools"]) == row["tools"]
    assert json.loads(loaded["chat_template_kwargs"]) == {"enable_thinking": False}


def test_a_date_that_the_template_writes_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of tables of messages, and only for a template that writes it."""
    dated = model(tmp_path / "dated", "{{ strftime_now('%d %b %Y') }} " + TEMPLATE)
    today = rendered_today(str(dated), lambda: True)
    assert set(today) == {"rendered"} and today == rendered_today(str(dated), lambda: True)
    assert rendered_today(str(dated), lambda: False) == {}
    assert rendered_today(str(model(tmp_path / "plain", TEMPLATE)), lambda: True) == {}
    monkeypatch.setattr(chat_template, "_rendered", lambda *given: "another day")
    assert rendered_today(str(dated), lambda: True) != today


@pytest.mark.parametrize(("count", "prompts", "folds", "words"), [
    (1, 1, 0, "1 pairs leave"),
    (9, 1, 2, None),
    (3, 3, 4, "pairs to train on fill"),
    (40, 40, 4, ""),
])  # fmt: skip
def test_the_dry_run_splits_as_the_run_will(
    count: int, prompts: int, folds: int, words: str | None, tmp_path: Path
) -> None:
    """What its first stage refuses for want of pairs, the dry run refuses with the same numbers."""
    table = [
        {
            "id": f"p{k}",
            "prompt": f"the film {'very ' * (k % prompts)}is",
            "chosen": f" good {k}",
            "rejected": f" bad {k}",
        }
        for k in range(count)
    ]
    file = run_file(tmp_path, table, TEMPLATE)
    run = yaml.safe_load(file.read_text())
    run["reward"] = {"model": run["train"]["model"], "folds": folds}
    file.write_text(yaml.safe_dump(run))
    config = load_config(file, None)
    found = []
    for act in (
        lambda: pipeline.check(config, tables=True),
        lambda: pipeline.run_pipeline(config, command="", until=("pairs",)),
    ):
        try:
            act()
            found.append("")
        except DataError as error:
            assert error.code == "data-too-few"
            found.append(error.message)
    assert found[0] == found[1]
    if words is not None:
        assert words in found[0] and bool(words) == bool(found[0])


def learned(folder: Path, positions: int) -> str:
    """A GPT-2 with few positions."""
    made = tokenizer()
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    config = GPT2Config(n_positions=positions, n_embd=32, n_layer=2, n_head=4, vocab_size=len(made), **ends)
    GPT2LMHeadModel(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


def test_pairs_beyond_the_learned_positions_are_named_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long pairs are refused with their ids at --dry-run; what max_length cuts, and a filter may drop, is not."""
    table = [{"id": str(k), "prompt": "the film is", "chosen": " good", "rejected": " bad"} for k in range(6)]
    table[2]["chosen"] = table[4]["rejected"] = " good" * 40
    table[5]["chosen"] = table[5]["rejected"] = " good" * 50
    file = saved(tmp_path / "pairs.jsonl", table[:5])
    policy = learned(tmp_path / "gpt2", 24)
    tree: dict[str, Any] = {
        "name": "r", "output_dir": str(tmp_path / "runs"), "pairs": {"path": str(file)},
        "train": {"model": policy, "methods": {"dpo": {"loss": "dpo"}}},
    }  # fmt: skip
    with pytest.raises(DataError, match=r"2 of 5 pairs are longer than the 24 positions") as refused:
        check_table_rows(RunConfig.model_validate(tree))
    assert "2: found" in str(refused.value) and "4: found" in str(refused.value)
    tree["train"]["trainer"] = {"max_length": 24}
    check_table_rows(RunConfig.model_validate(tree))
    tree["train"] |= {"trainer": {"max_length": None}, "model": str(causal(tmp_path / "llama"))}
    check_table_rows(RunConfig.model_validate(tree))
    assert beyond_positions(Dataset.from_list(table), policy, None)[0][-1].startswith("pair 4: found")  # 5 is left out
    check_data(PairsSection(path=str(file)), drop_to=None, model=policy)
    assert "2 of 5 pairs are longer than the 24 positions" in " ".join(capsys.readouterr().out.split())


def test_padding_beyond_the_learned_positions_is_refused_too(tmp_path: Path) -> None:
    """The look-up of a position fails for padding as it does for a token."""
    table = [{"id": str(k), "prompt": "the film is", "chosen": " good", "rejected": " bad"} for k in range(4)]
    file = saved(tmp_path / "pairs.jsonl", table)
    train: dict[str, Any] = {"model": learned(tmp_path / "gpt2", 24), "methods": {"dpo": {"loss": "dpo"}}}
    tree: dict[str, Any] = {"name": "r", "output_dir": str(tmp_path / "runs"), "pairs": {"path": str(file)}}
    for multiple, limit in ((8, 1024), (24, 1024), (8, 20)):
        fields = {"pad_to_multiple_of": multiple, "max_length": limit}
        check_table_rows(RunConfig.model_validate(tree | {"train": train | {"trainer": fields}}))
    message = r"pad_to_multiple_of: found 32, with which a row of 5 tokens gets 32, expected at most 24"
    fields = {"pad_to_multiple_of": 32, "max_length": 20}
    with pytest.raises(DataError, match=message):
        check_table_rows(RunConfig.model_validate(tree | {"train": train | {"trainer": fields}}))
    args = PreferenceConfig(str(tmp_path), report_to="none", bf16=False, **fields)
    with pytest.raises(DataError, match=message):
        PreferenceTrainer(train["model"], args=args, train_dataset=Dataset.from_list(table))


@pytest.mark.parametrize("prefix", ["", "reward-server:"])
def test_prompts_that_a_judge_cannot_read_are_found_before_training(tmp_path: Path, prefix: str) -> None:
    judge = llama_reward(tmp_path / "judge")
    made = tokenizer()
    made.chat_template = NO_SYSTEM
    made.save_pretrained(judge)
    run = yaml.safe_load(run_file(tmp_path, [pair("p0")], TEMPLATE).read_text())
    asked = saved(tmp_path / "prompts.jsonl", [{"prompt": SYSTEM}, {"prompt": ASKED}])
    run["evaluate"] = {"prompts": str(asked), "judge": f"{prefix}{judge}"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(DataError, match=f"the chat template of {judge} does not take"):
        pipeline.check(load_config(tmp_path / "run.yaml", None), tables=False)
    saved(asked, [{"prompt": ASKED}])
    pipeline.check(load_config(tmp_path / "run.yaml", None), tables=False)
