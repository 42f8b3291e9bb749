"""A prompt column next to responses that contain the prompt: taken once, as trl takes it, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from trl.data_utils import maybe_extract_prompt

from align.config import PairsSection
from align.data.pairs import load_pairs
from align.data.prompts import draw_prompts, read_prompts
from align.errors import DataError
from tests.data.test_pairs import CHAT, jsonl, turn

TURNS = ("prompt", "chosen", "rejected")
CONVERSATION: dict[str, Any] = {
    "chosen": [*CHAT["prompt"], *CHAT["chosen"]],
    "rejected": [*CHAT["prompt"], *CHAT["rejected"]],
}


def load(folder: Path, *rows: Any) -> list[dict[str, Any]]:
    return [{name: row[name] for name in TURNS} for row in load_pairs(PairsSection(path=jsonl(folder, *rows)))]


def test_a_conversation_that_goes_on_keeps_a_response(tmp_path: Path) -> None:
    longer = [*CONVERSATION["chosen"], turn("user", "more"), turn("assistant", "b")]
    (row,) = load(tmp_path, {"chosen": CONVERSATION["chosen"], "rejected": longer})
    assert row == {"prompt": CHAT["prompt"], "chosen": CHAT["chosen"], "rejected": longer[1:]}


@pytest.mark.parametrize("system", [[], [turn("system", "be kind")]])
def test_a_text_prompt_of_whole_conversations_is_taken_as_trl_takes_it(system: list[Any], tmp_path: Path) -> None:
    row = {"prompt": "hello", **{name: [*system, *turns] for name, turns in CONVERSATION.items()}}
    assert load(tmp_path, row) == [maybe_extract_prompt(row)]
    assert load(tmp_path, row)[0]["prompt"] == [*system, *CHAT["prompt"]]


def test_a_text_prompt_of_answers_is_a_user_message(tmp_path: Path) -> None:
    assert load(tmp_path, {**CHAT, "prompt": "hello"}) == [CHAT]


def test_another_text_prompt_than_that_of_the_conversations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="found a prompt text that the responses do not begin with, expected it as a user"
    ):
        load(tmp_path, {"prompt": "good night", **CONVERSATION})


def test_a_prompt_that_the_responses_repeat_is_taken_once(tmp_path: Path) -> None:
    assert load(tmp_path, {"prompt": CHAT["prompt"], **CONVERSATION}) == [CHAT]
    text = {"prompt": "How is the film?", "chosen": "How is the film? Good.", "rejected": "How is the film? Bad."}
    assert load(tmp_path, text) == [{"prompt": text["prompt"], "chosen": " Good.", "rejected": " Bad."}]
    by_chance = {"prompt": "I", "chosen": "I think so", "rejected": "It depends"}
    assert load(tmp_path, by_chance) == [by_chance]


def test_a_response_that_begins_with_another_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="chosen: found a first message by user, expected one by assistant or tool"):
        load(tmp_path, {**CONVERSATION, "prompt": [turn("user", "good night")]})


def test_a_limit_draws_the_same_prompts_in_any_order(tmp_path: Path) -> None:
    """For every command that reads prompts; equal prompts count once each."""
    prompts = [f"{'easy' if k < 30 else 'hard'} {k % 50}" for k in range(60)]
    found = []
    for order in (prompts, prompts[::-1]):
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in order))
        drawn, total = draw_prompts(str(file), 20)
        assert total == 60 and len(drawn) == 20 and drawn != order[:20]
        assert [row.prompt for row in read_prompts(PairsSection(path=str(file), limit=20))] == drawn
        assert draw_prompts(str(file), None) == (order, 60) == draw_prompts(str(file), 99)
        found.append(sorted(drawn))
    assert found[0] == found[1]
