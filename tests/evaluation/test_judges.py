"""Judges of an evaluation: sentiment, a language model that prefers, a reward model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.errors import AlignError, ConfigError
from reward_models.judges import VaderJudge
from reward_models.pairwise_judges import (
    ANSWER,
    QUESTION,
    LanguageModelJudge,
    RewardModelJudge,
    judge_key,
    make_pairwise,
    make_score_judge,
)
from reward_models.score import RewardScorer
from tests.helpers.builders import causal, llama_reward, tokenizer

PROMPTS = [f"the {word} film {'very ' * k}is" for k, word in enumerate(["good", "bad", "dull", "fine"])]


def test_an_answer_to_messages_is_judged_as_text_of_its_own() -> None:
    judge, asked = VaderJudge(), [{"role": "user", "content": "Continue the review"}]
    for answer in ("Great movie!", "Wonderful acting.", "Terrible film."):
        alone = judge.score(["Continue the review "], [answer])
        assert alone[0] != 0
        for form in (answer, [{"role": "assistant", "content": answer}]):
            assert judge.score([asked], [form]) == pytest.approx(alone)
    assert judge.score(["a good fi"], ["lm"]) == judge.score(["a good film"], [""])


@pytest.mark.parametrize("template", [False, True])
def test_a_language_model_judge_reads_the_labels(tmp_path: Path, template: bool) -> None:
    """Its preference is the softmax of two logits, computed one row at a time without padding."""
    folder = causal(tmp_path / "judge", seed=2)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    words = tokenizer(template=template)
    words.add_tokens([" A", " B"])
    words.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    judge = LanguageModelJudge(str(folder))
    answers = ["good", "very very bad film", "dull", "a plot"]
    found = judge.prefer(PROMPTS, answers, answers[::-1])
    labels = [words.convert_tokens_to_ids(label) for label in (" A", " B")]
    for k, value in enumerate(found):
        asked = QUESTION.format(prompt=PROMPTS[k], first=answers[k], second=answers[::-1][k]).strip()
        text = f"user : {asked} assistant :{ANSWER}" if template else asked + "\n\n" + ANSWER
        with torch.no_grad():
            logits = model(torch.tensor([words(text)["input_ids"]])).logits[0, -1]
        assert value == pytest.approx(float(logits[labels].softmax(-1)[0]), abs=1e-5)
    assert make_pairwise(f"llm:{folder}").name == f"llm:{folder}"


@pytest.mark.model
def test_a_response_cannot_end_its_turn_and_long_ones_are_cut_alike(assets: Path) -> None:
    judge = LanguageModelJudge(str(assets / "smollm2"), max_length=200)
    ending = "<|im_end|>"
    special = judge._tokenizer.convert_tokens_to_ids(ending)
    usual = judge._question("Is it?", "Yes.", "No.").count(special)
    assert usual > 0
    assert judge._question(f"Is{ending}", f"Yes.{ending}", f"No.{ending}").count(special) == usual
    row = judge._question("one " * 500, "two " * 500, "three")
    assert len(row) <= 200 and row[-len(judge._frame[3]) :] == judge._frame[3]
    text = judge._tokenizer.decode(row)
    assert text.count("two") >= 40 and text.count("one") >= 20 and "three" in text


def test_a_language_model_without_labels_is_refused(tiny_policy: Path) -> None:
    with pytest.raises(ConfigError, match="as the same token"):
        LanguageModelJudge(str(tiny_policy))


def test_a_reward_model_is_a_judge(tmp_path: Path) -> None:
    folder = llama_reward(tmp_path / "rm")
    judge = make_score_judge(str(folder))
    assert isinstance(judge, RewardModelJudge)
    plain = judge.score(["the film is"], [" good"])
    alone = RewardScorer(folder, batch_tokens=64, max_length=64).score_texts(["the film is good"])
    assert plain == pytest.approx(alone, abs=1e-5)
    preferred = make_pairwise(str(folder)).prefer(PROMPTS, ["good"] * 4, ["good"] * 4)
    assert preferred.tolist() == [0.5] * 4


def test_a_judge_that_is_asked_for_yes_or_no_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slashes of its model's folder do not make it a reward model, and its key differs from that of `llm:`."""
    asked: list[str] = []
    monkeypatch.setattr("reward_models.pairwise_judges.make_judge", lambda name: asked.append(name) or VaderJudge())
    model = tmp_path / "judge"
    model.mkdir()
    make_score_judge(f"yes-no:{model}")
    assert asked == [f"yes-no:{model}"]
    before = {kind: judge_key(f"{kind}{model}") for kind in ("", "llm:", "yes-no:")}
    assert len(set(before.values())) == 3
    (model / "weights").write_text("other")
    assert not {judge_key(f"{kind}{model}") for kind in before} & set(before.values())


@pytest.mark.parametrize(
    ("name", "message"), [("vadre", "did you mean `vader`"), ("llm:x/y", "only says which of two")]
)
def test_judges_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(AlignError, match=message):
        make_score_judge(name)
