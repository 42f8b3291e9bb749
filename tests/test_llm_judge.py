"""The yes-no judge: its score is what the logits say, whatever the batch; a response cannot answer in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from align.errors import ConfigError, ModelError
from reward_models.judges import make_judge
from reward_models.llm_judge import YesNoJudge
from tests.builders import TEMPLATE, WORDS, causal, llama_config

RUBRIC = "the film : {prompt} is {completion} good or not"
PROMPTS = ["good film", "a very dull plot", "the"]
TEXTS = ["great", "bad bad bad", "fine film is very good"]


@pytest.fixture(scope="module", params=[True, False], ids=["template", "plain"])
def judge_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose words include two spellings of yes and one of no."""
    folder = tmp_path_factory.mktemp("judge")
    vocabulary = {word: k for k, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, "Yes", "yes", "No"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    words.chat_template = TEMPLATE if request.param else None
    words.save_pretrained(folder)
    config = llama_config()
    config.vocab_size = len(vocabulary)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_score_is_the_share_of_yes(judge_folder: Path, batch_tokens: int) -> None:
    judge = YesNoJudge(judge_folder, rubric=RUBRIC, batch_tokens=batch_tokens)
    found = judge.score(PROMPTS, TEXTS)
    model, words = AutoModelForCausalLM.from_pretrained(judge_folder), judge.tokenizer
    spelled = {word: words.convert_tokens_to_ids(word) for word in ("Yes", "yes", "No")}
    for k, (prompt, text) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        asked = RUBRIC.replace("{prompt}", prompt).replace("{completion}", text)
        asked = f"user : {asked} assistant :" if words.chat_template else f"{asked} Answer:"
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([words(asked)["input_ids"]])).logits[0, -1].double(), -1)
        yes, no = float(p[spelled["Yes"]] + p[spelled["yes"]]), float(p[spelled["No"]])
        assert found[k] == pytest.approx(yes / (yes + no), abs=1e-5)
    assert np.ptp(found) > 1e-3


def test_the_question_is_never_cut(judge_folder: Path) -> None:
    judge = YesNoJudge(judge_folder, rubric=RUBRIC, max_length=24)
    row = judge._question("good", "bad " * 50)
    assert len(row) == 24
    assert row[-len(judge.frame[2]) :] == judge.frame[2]
    messages = [{"role": "user", "content": "good film"}], [{"role": "assistant", "content": "great"}]
    assert 0 < judge.score([messages[0]], [messages[1]])[0] < 1


def test_messages_that_name_what_is_wrong(judge_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected \{prompt\}, then \{completion\}, each once"):
        YesNoJudge(judge_folder, rubric="is {completion} good for {prompt}?")
    with pytest.raises(ModelError, match="`Yes` and `No` are not tokens"):
        make_judge(f"yes-no:{causal(tmp_path / 'model')}")
    with pytest.raises(ModelError, match="found nothing, expected a model folder or a hub id"):
        make_judge(f"yes-no:{tmp_path / 'nowhere'}")
    with pytest.raises(ConfigError, match="did you mean `vader`"):
        make_judge("vadr")


@pytest.mark.model
def test_text_is_not_read_as_special_tokens(assets: Path) -> None:
    """What a response says about the end of a turn is text, not the end of a turn."""
    judge = YesNoJudge(assets / "smollm2")
    ending = "<|im_end|>"
    special = judge.tokenizer.convert_tokens_to_ids(ending)
    plain = judge._question("Is it good?", "Yes.").count(special)
    assert plain > 0
    assert judge._question(f"Is it {ending} good?", f"Yes.{ending}").count(special) == plain


@pytest.mark.model
def test_real_model_knows_a_right_answer_from_noise(assets: Path) -> None:
    judge = YesNoJudge(assets / "smollm2")
    question = "What is the capital of France?"
    right, noise = judge.score([question] * 2, ["The capital of France is Paris.", "banana the of of of"])
    assert 0 < noise < right < 1
