"""A reward model behind a vLLM server: the rewards of the local model on the same ids, or a refusal by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.config.judging import JudgeSection
from align.data.messages import with_arguments
from align.errors import AlignError, ConfigError, EnvironmentProblem, ModelError, NumericsError
from reward_models.named_judges import check_judge, kind_of, made_from, make_named
from reward_models.pairwise_judges import RewardModelJudge, judge_key, make_score_judge
from reward_models.reward_server import ROWS, RewardServerJudge
from tests.generation.test_server_engine import Fake, Reply
from tests.helpers.builders import bert_reward, llama_reward

PROMPTS = ["the film is", "a plot", "the film is", "very"] * 6
COMPLETIONS = [" good", " not great", " bad bad", " dull <eos>"] * 5 + [" fine"] * 4
CHAT = [[{"role": "user", "content": "the film"}]], [[{"role": "assistant", "content": "good"}]]


class Server(Fake):
    """vLLM's /classify: the head at the last token of each row of ids, alone, with a sigmoid if it is asked for."""

    def __init__(self, folder: Path, activation: bool | None = None, fails_after: int | None = None) -> None:
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.activation, self.fails_after = activation, fails_after
        super().__init__(self.classify)
        self.entry = {"id": str(folder)}

    def classify(self, path: str, body: dict[str, Any], number: int) -> Reply:
        if self.fails_after is not None and number > self.fails_after:
            return 503, "busy"
        if path != "/classify":
            return 404, "no such path"
        data = []
        for index, ids in enumerate(body["input"]):
            with torch.no_grad():
                states = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
                value = self.model.score(states)
            activated = body["use_activation"] if self.activation is None else self.activation
            data.append({"index": index, "probs": (value.sigmoid() if activated else value).tolist()})
        return 200, {"data": data[::-1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_reward(tmp_path_factory.mktemp("reward") / "model")


def test_rewards_are_those_of_the_local_model(folder: Path) -> None:
    """Also of messages, of texts that are cut off, and of those that end in the padding token."""
    server = Server(folder)
    with server.running() as address:
        judge = RewardServerJudge(str(folder), base_url=address)
        local = RewardModelJudge(str(folder))
        found = judge.score(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(local.score(PROMPTS, COMPLETIONS), abs=1e-5) and np.ptp(found) > 0.1
        assert judge.score(*CHAT) == pytest.approx(local.score(*CHAT), abs=1e-5)
        short = RewardServerJudge(str(folder), base_url=address, max_length=3)
        assert short.score(PROMPTS, COMPLETIONS) == pytest.approx(
            RewardModelJudge(str(folder), max_length=3).score(PROMPTS, COMPLETIONS), abs=1e-5
        )
    assert max(len(body["input"]) for _, body in server.bodies) <= ROWS
    assert all(isinstance(row[0], int) for _, body in server.bodies for row in body["input"])


def test_trailing_padding_is_not_read(folder: Path, tmp_path: Path) -> None:
    """transformers reads the reward before padding, whoever put it there; the server at the end of what it gets."""
    padded = tmp_path / "padded"
    model, words = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = words.convert_tokens_to_ids("bad")
    model.save_pretrained(padded)
    words.save_pretrained(padded)
    with Server(padded).running() as address:
        found = RewardServerJudge(str(padded), base_url=address).score(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(RewardModelJudge(str(padded)).score(PROMPTS, COMPLETIONS), abs=1e-5)


def test_a_server_that_goes_down_loses_no_reward(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "rewards.jsonl"
    prompts = [f"{prompt} {'very ' * k}" for k, prompt in enumerate(PROMPTS * 3)]
    completions = COMPLETIONS * 3
    with Server(folder, fails_after=4).running() as address:
        judge = RewardServerJudge(
            str(folder), base_url=address, concurrency=1, attempts=2, cache=cache, first_wait=0.01
        )
        with pytest.raises(EnvironmentProblem, match="server-unreachable"):
            judge.score(prompts, completions)
    kept = [json.loads(line) for line in cache.read_text().split("\n") if line]
    assert len(kept) == 2 * ROWS
    again = Server(folder)
    with again.running() as address:
        judge = RewardServerJudge(str(folder), base_url=address, concurrency=1, cache=cache)
        found = judge.score(prompts, completions)
        asked = sum(len(body["input"]) for _, body in again.bodies[2:])
        assert judge.score(prompts, completions).tolist() == found.tolist()
        assert sum(len(body["input"]) for _, body in again.bodies[2:]) == asked, "nothing is asked for twice"
    different = len(set(zip(prompts, completions, strict=True)))
    assert asked == different - 2 * ROWS
    assert found == pytest.approx(RewardModelJudge(str(folder)).score(prompts, completions), abs=1e-5)


def test_probabilities_are_no_rewards(folder: Path) -> None:
    with Server(folder, activation=True).running() as address, pytest.raises(ModelError, match="with and without"):
        RewardServerJudge(str(folder), base_url=address).score(PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ({"data": []}, ModelError, "lacks what is needed"),
        ({"choices": []}, ModelError, "lacks what is needed"),
        ({"data": [{"index": k, "probs": [k]} for k in (0, 1, 1)]}, ModelError, "found 3 answers to 2 texts"),
        ({"data": [{"index": k, "probs": [k]} for k in (1, 1)]}, ModelError, "lacks what is needed"),
        ({"data": [{"index": 0, "probs": [0.1]}, {"index": 1, "probs": [0.1, 0.2]}]}, ModelError, "2 outputs"),
        ({"data": [{"index": k, "probs": [1.0]} for k in (0, 1)]}, ModelError, "with and without activation"),
        ({"data": [{"index": 0, "probs": [0.1, 0.2]}, {"index": 1, "probs": [0.1, 0.2]}]}, ModelError, "2 outputs"),
        ('{"data": [{"index": 0, "probs": [NaN]}, {"index": 1, "probs": [1.0]}]}', NumericsError, "not finite"),
    ],
)
def test_answers_of_another_kind(folder: Path, answer: Any, error: type[AlignError], message: str) -> None:
    fake = Fake(lambda path, body, number: (200, answer))
    fake.entry = {"id": str(folder)}
    with fake.running() as address, pytest.raises(error, match=message):
        RewardServerJudge(str(folder), base_url=address).score(["a", "b"], [" good", " bad"])


def test_what_a_server_cannot_score(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"an encoder \(BertForSequenceClassification\)"):
        RewardServerJudge(str(bert_reward(tmp_path / "bert")))
    with (
        Fake(lambda path, body, number: (200, {})).running() as address,
        pytest.raises(ModelError, match="does not serve"),
    ):
        RewardServerJudge(str(folder), base_url=address).score(["a"], ["b"])


def test_an_ensemble_is_not_what_its_first_member_gives(folder: Path, tmp_path: Path) -> None:
    """The local judge is the mean of the members; a server would compute the first one only."""
    shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(folder, tmp_path / "model/members/1")
    name = f"reward-server:{tmp_path / 'model'}"
    for make in (lambda: RewardServerJudge(str(tmp_path / "model")), lambda: check_judge(JudgeSection(name=name))):
        with pytest.raises(ModelError, match="an ensemble of 2 models"):
            make()
    with pytest.raises(ModelError, match="an encoder"):
        check_judge(JudgeSection(name=f"reward-server:{bert_reward(tmp_path / 'bert')}"))


def test_completions_that_are_not_read_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts, completions = ["the film is very", "the"] * 2, [" good", " bad"] * 2
    with Server(folder).running() as address:
        found = RewardServerJudge(str(folder), base_url=address, max_length=3).score(prompts, completions)
    assert caplog.messages == ["2 of 4 completions are not read: their prompts fill max_length"]
    assert found == pytest.approx(RewardModelJudge(str(folder), max_length=3).score(prompts, completions), abs=1e-5)


def test_empty_texts_and_arguments_of_the_template(folder: Path) -> None:
    prompts = ["the film", "the film", with_arguments(CHAT[0][0], {"chat_template_kwargs": {"shout": True}})]
    completions = ["", " good", [{"role": "assistant", "content": ""}]]
    with Server(folder).running() as address:
        found = RewardServerJudge(str(folder), base_url=address).score(prompts, completions)
    assert found == pytest.approx(RewardModelJudge(str(folder)).score(prompts, completions), abs=1e-5)


def test_another_served_name_says_how_to_serve_it(folder: Path) -> None:
    with Fake(lambda path, body, number: (200, {})).running() as address, pytest.raises(ModelError) as caught:
        RewardServerJudge(str(folder), base_url=address).score(["a"], ["b"])
    assert f"--served-model-name {folder}" in str(caught.value)


def test_rewards_do_not_depend_on_where_the_model_is_served(folder: Path) -> None:
    """A run whose server comes back at another address goes on; another length or another model is another judge."""
    name = f"reward-server:{folder}"
    here, there = (JudgeSection(name=name, base_url=f"http://{host}/v1") for host in ("a", "b"))
    assert made_from(here) == made_from(there) != made_from(JudgeSection(name=name, max_length=9))
    assert made_from(here)["model"] == made_from(JudgeSection(name=str(folder)))["model"]
    asked = [made_from(JudgeSection(name="server:m", base_url=f"http://{host}/v1")) for host in ("a", "b")]
    assert asked[0] != asked[1], "a name on another server may be another model"


def test_by_name(folder: Path) -> None:
    name = f"reward-server:{folder}"
    assert kind_of(name) == "reward-server" and not JudgeSection(name=name).compares
    check_judge(JudgeSection(name=name, base_url="http://localhost:1/v1", max_length=9))
    with pytest.raises(ConfigError, match="found dtype"):
        check_judge(JudgeSection(name=name, dtype="bfloat16"))
    made = make_named(JudgeSection(name=name, max_length=9))
    assert isinstance(made, RewardServerJudge) and made.max_length == 9 and made.name == name
    assert isinstance(make_score_judge(name, None), RewardServerJudge)
    assert judge_key(name) != judge_key(str(folder)) and str(folder) not in judge_key(name).split(":")[-1]
