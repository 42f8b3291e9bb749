"""Prompts are completed with the ``tools`` and ``chat_template_kwargs`` that training reads, by every engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align.commands.build_pairs import BuildSettings, build_pairs
from align.commands.evaluation_tables import Policy, write_completions
from align.commands.generate import GenerateSettings, generate_completions
from align.config import PairsSection
from align.data.completions import read_groups
from align.data.messages import split_arguments
from align.data.pairs import load_pairs
from align.data.prompts import draw_prompts, load_prompts, read_prompts
from align.data.text import plain
from align.errors import ConfigError, DataError
from align.generation.engines import make_engine
from align.generation.server_engine import ServerEngine
from align.generation.types import Sampling
from align.io.stage import read_manifest
from align.models.loading import load_tokenizer
from align.models.template_arguments import RECORD, different_arguments, report_other_arguments, write_record
from align.models.tokenization import encode_pair, encode_prompt
from reward_models.scorers import ScorerSpec
from reward_models.tokenization import reward_text
from tests.generation.test_server_engine import Fake, Reply, echo
from tests.helpers.builders import causal, tokenizer

THINKING = "{% if enable_thinking is defined and not enable_thinking %}not {% endif %}"
THINKS = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}{{ m.role }} : "
    "{% if m.role == 'assistant' %}" + THINKING + "{% endif %}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : " + THINKING + "{% endif %}"
)
"""Like Qwen3's: without thinking, an answer begins with what shows that it is off."""
ASKED = [{"role": "user", "content": "is the film good"}]
OFF: dict[str, Any] = {"enable_thinking": False}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": ASKED, "chat_template_kwargs": OFF},
    {"id": "b", "prompt": ASKED, "tools": [{"name": "review"}]},
    {"id": "c", "prompt": ASKED},
]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    made = tokenizer()
    made.chat_template = THINKS
    folder = causal(tmp_path / "policy")
    made.save_pretrained(folder)
    return folder


def file_of(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "prompts.jsonl")


@pytest.mark.parametrize("column", ["own", "option"])
def test_what_is_sampled_is_what_is_trained(column: str, policy: Path, tmp_path: Path) -> None:
    """From prompts over completions to pairs: the trained prompt is the one that was completed, token by token."""
    rows = ROWS if column == "own" else [{"id": "a", "prompt": ASKED}]
    kwargs = {} if column == "own" else OFF
    source = PairsSection(path=file_of(tmp_path, rows))
    settings = GenerateSettings(
        str(policy), Sampling(6, n=4, engine="transformers"), format="jsonl", chat_template_kwargs=kwargs
    )
    generate_completions(source, settings, tmp_path / "sampled")
    words = load_tokenizer(str(policy))
    prompts = {row.id: row.prompt for row in read_prompts(source, kwargs)}
    assert {group.id: group.prompt for group in read_groups(tmp_path / "sampled" / "completions.jsonl")} == prompts
    build_pairs(tmp_path / "sampled", BuildSettings(ScorerSpec(judge="vader"), mode="all"), tmp_path / "built")
    pairs = load_pairs(PairsSection(path=str(tmp_path / "built" / "pairs.parquet")))
    assert {pair["id"].split(":")[0] for pair in pairs} == set(prompts)
    for pair in pairs:
        prompt = prompts[pair["id"].split(":")[0]]
        assert pair["prompt"] == ASKED
        assert encode_pair(pair, words).prompt == encode_prompt(prompt, words)
    assert words.decode(encode_prompt(prompts["a"], words)[-1:]) == "not"


def test_the_transformers_engine_completes_the_rendered_prompt(policy: Path, tmp_path: Path) -> None:
    """With thinking off the completions are those of the same text, given as text."""
    made = make_engine("transformers", str(policy), batch_size=4)
    (prompt,) = load_prompts(file_of(tmp_path, ROWS[:1]))
    text = "user : is the film good assistant : not"
    sampling = Sampling(6, n=3)
    ids = [one.token_ids for one in made.generate([prompt], sampling, ["k"])[0]]
    assert ids == [one.token_ids for one in made.generate([text], sampling, ["k"])[0]]
    assert ids != [one.token_ids for one in made.generate([ASKED], sampling, ["k"])[0]]


def test_arguments_are_in_the_keys_of_what_was_sampled(policy: Path, tmp_path: Path) -> None:
    keys = []
    for kwargs in ({}, OFF):
        prompts, _ = draw_prompts(file_of(tmp_path, ROWS[2:]), None, kwargs)
        written = write_completions(
            Policy("p", str(policy)), prompts, Sampling(3, engine="transformers"), tmp_path / "e"
        )
        keys.append(written.key)
        settings = GenerateSettings(str(policy), Sampling(3, engine="transformers"), chat_template_kwargs=kwargs)
        generate_completions(PairsSection(path=file_of(tmp_path, ROWS[2:])), settings, tmp_path / "g")
        manifest = read_manifest(tmp_path / "g")
        assert manifest is not None
        keys.append(manifest["key"])
    assert len(set(keys)) == 4


def test_a_server_is_told_and_its_tokens_are_compared(caplog: pytest.LogCaptureFixture) -> None:
    """A server that ignores an argument gives the same tokens with and without it."""
    prompt = {"messages": ASKED, "tools": [{"name": "review"}], "chat_template_kwargs": OFF}

    def answer(reads: bool) -> Any:
        def reply(path: str, body: dict[str, Any], number: int) -> Reply:
            ids = [7, len(body.get("tools", [])), len(body.get("chat_template_kwargs", {}))] if reads else [7]
            return 200, {**echo(path, body, number)[1], "prompt_token_ids": ids}  # type: ignore[dict-item]

        return reply

    for reads in (True, False):
        caplog.clear()
        fake = Fake(answer(reads))
        with fake.running() as address, caplog.at_level("WARNING"):
            ServerEngine("policy", base_url=address).generate([prompt, prompt], Sampling(2))
        body = fake.bodies[-1][1]
        assert body["messages"] == ASKED and body["chat_template_kwargs"] == OFF
        assert body["tools"] == prompt["tools"] and body["tool_choice"] == "none"
        assert len(fake.bodies) == 2 * 2 + 2  # both arguments, with and without; then the completions
        assert ('chat_template_kwargs {"enable_thinking": false} changes no token' in caplog.text) is not reads
        assert ("tools  changes no token" in caplog.text) is not reads


def test_reward_models_and_judges_read_prompts_with_arguments(policy: Path) -> None:
    words = load_tokenizer(str(policy))
    prompt = {"messages": ASKED, "tools": [{"name": "review"}]}
    answer = [{"role": "assistant", "content": "good"}]
    text = reward_text(prompt, answer, words, text_pair=False)
    assert text == reward_text(ASKED, answer, words, text_pair=False, settings={"tools": prompt["tools"]})
    assert text.startswith("review ") and plain(prompt) == plain(ASKED)


def test_wrong_arguments_are_named_and_text_takes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_of(tmp_path, [ROWS[2], {"id": "d", "prompt": ASKED, "chat_template_kwargs": "off"}])
    for read in (lambda: read_prompts(PairsSection(path=path)), lambda: load_prompts(path)):
        with pytest.raises(
            DataError, match="row 2: chat_template_kwargs: found 'off', expected an object of arguments"
        ):
            read()
    text = file_of(tmp_path, [{"prompt": "the film is", "tools": [{"name": "plot"}]}])
    with pytest.raises(ConfigError, match="plain text, which no chat template renders"):
        load_prompts(text, OFF)
    with caplog.at_level("WARNING"):
        assert load_prompts(text) == ["the film is"]
    assert "tools: without effect" in caplog.text
    assert split_arguments(load_prompts(file_of(tmp_path, ROWS[:1]), {"enable_thinking": True, "more": 1})[0])[1] == {
        "chat_template_kwargs": {"enable_thinking": False, "more": 1}
    }


def test_other_arguments_than_in_training_are_told(policy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only what changes the text of a prompt counts; arguments that the template does not read are named."""
    answers = {
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    row = {"id": "a", "prompt": ASKED, **answers, "chat_template_kwargs": json.dumps(OFF)}
    write_record(different_arguments(Dataset.from_list([row])), policy)
    assert json.loads((policy / RECORD).read_text()) == [OFF]
    same = {"messages": ASKED, "chat_template_kwargs": OFF | {"misspelled": 1}}
    with caplog.at_level("WARNING"):
        report_other_arguments([{"messages": ASKED, "chat_template_kwargs": OFF}, "text"], str(policy))
        assert not caplog.records
        report_other_arguments([same], str(policy))
        assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
            "its chat template does not read misspelled (chat_template_kwargs)"
        ]
        report_other_arguments([ASKED], str(policy))
    assert 'rendered with chat_template_kwargs {}, and it was trained with {"enable_thinking": false}' in caplog.text
