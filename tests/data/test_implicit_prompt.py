"""Implicit prompts: pairs of one question have one prompt, whatever their responses share."""

import pytest
from trl.data_utils import extract_prompt as trl_prompt

from align.data.implicit_prompt import extract_prompt

RESPONSES = (" Apples are red.", " Apricots are not.", " A cherry.", " Apples, I think.", " Cherries")
QUESTIONS = (
    "Human: name a red fruit. Assistant:",
    "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: name a red fruit.\n\nAssistant:",
    "<|im_start|>user\nname a red fruit<|im_end|>\n<|im_start|>assistant\n",
    "[INST] name a red fruit [/INST]",
    "### Instruction:\nname a red fruit\n\n### Response:\n",
    "Q: a red fruit? A:",
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_pairs_of_one_question_have_one_prompt(question: str) -> None:
    for chosen in RESPONSES:
        for rejected in RESPONSES:
            if chosen != rejected:
                found = extract_prompt(question + chosen, question + rejected)
                assert found == {"prompt": question, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Pick one now", "Pick one later", "Pick one"),
        ("The sky is blue today", "The sky is blurred", "The sky is"),
        ("Pick 👍🏽 now", "Pick 👍🏿 later", "Pick"),
        ("天気は良い", "天気は悪い", "天気は"),
        ("Paris ", "London", ""),
        ("It is", "Is it", ""),
    ],
)
def test_without_turns_a_prompt_ends_with_a_word(chosen: str, rejected: str, prompt: str) -> None:
    found = extract_prompt(chosen, rejected)
    assert found["prompt"] == prompt
    assert (prompt + found["chosen"], prompt + found["rejected"]) == (chosen, rejected)


def test_words_that_differ_from_the_first_letter_are_cut_as_in_trl() -> None:
    pair = {"chosen": "What is it? Good", "rejected": "What is it? Bad"}
    assert extract_prompt(**pair) == trl_prompt(pair)


def test_messages() -> None:
    """A shared turn of the assistant at the end is a response; one within a conversation is part of the prompt."""
    turns = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("user", "more"))]
    ends = [{"role": "assistant", "content": text} for text in "BC"]
    assert extract_prompt([*turns, ends[0]], [*turns, ends[1]]) == {
        "prompt": turns, "chosen": [ends[0]], "rejected": [ends[1]]
    }  # fmt: skip
    found = extract_prompt(turns[:2], [*turns, ends[0]])
    assert (found["prompt"], found["chosen"]) == (turns[:1], turns[1:2])


def test_a_text_that_the_other_begins_with_is_not_cut() -> None:
    """No character of it becomes a response."""
    assert extract_prompt("The sky", "The sky is blue") == {
        "prompt": "The sky", "chosen": "", "rejected": " is blue"
    }  # fmt: skip
