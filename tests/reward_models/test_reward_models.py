"""Reward models: the same reward for any batch and padding; how texts are tokenized, truncated and scored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
)

from align.config import RewardSection
from align.errors import ConfigError, ModelError, NumericsError
from align.models.loading import load_policy
from align.models.tokenization import encode_reward_texts as tokenize
from align.models.tokenization import render
from reward_models.crossfit import FOLD, cross_fit
from reward_models.ensemble import EnsembleScorer, members, score_with
from reward_models.features import head_features
from reward_models.judges import VaderJudge, make_judge
from reward_models.loading import fitting_length
from reward_models.pairwise_judges import make_score_judge
from reward_models.score import RewardScorer
from reward_models.tokenization import cut_alike
from reward_models.train import train_reward_model
from tests.helpers.builders import beginning, bert_reward, causal, llama_reward, rows, tokenizer

TEXTS = ["the film is good", "a bad plot", "good", "the a is was very not great awful fine dull", "not bad"]
FAST = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "bf16": False, "use_cpu": True}


@pytest.mark.parametrize("build", [llama_reward, bert_reward])
def test_reward_does_not_depend_on_batch_or_padding(build: object, tmp_path: Path) -> None:
    model = build(tmp_path)  # type: ignore[operator]
    alone = [RewardScorer(model, batch_tokens=1, max_length=64).score_texts([text])[0] for text in TEXTS]
    assert np.ptp(alone) > 1e-2
    for side in ("left", "right"):
        batched = RewardScorer(model, batch_tokens=4096, max_length=64, padding_side=side).score_texts(TEXTS)  # type: ignore[arg-type]
        assert np.allclose(batched, alone, atol=1e-5)
    assert np.allclose(
        RewardScorer(model, batch_tokens=20, max_length=64).score_texts(TEXTS[::-1]), alone[::-1], atol=1e-5
    )


def test_scored_pairs(tmp_path: Path) -> None:
    scorer = RewardScorer(llama_reward(tmp_path / "m"), batch_tokens=256, max_length=64)
    pairs = Dataset.from_list(rows(6))
    scored = scorer.score_pairs(pairs)
    row = scored[2]
    assert row["reward_chosen"] == pytest.approx(scorer.score_texts([row["prompt"] + row["chosen"]])[0], abs=1e-5)
    assert row["margin"] == row["reward_chosen"] - row["reward_rejected"]


def test_a_reward_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    scorer = RewardScorer(llama_reward(tmp_path), batch_tokens=256, max_length=64)
    with torch.no_grad():
        scorer.model.score.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="found the reward nan for 'the film is good', expected a finite number"):
        scorer.score_texts(TEXTS)


def test_two_labels_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"reward-labels.*its classification head has 2 outputs"):
        RewardScorer(llama_reward(tmp_path, labels=2), batch_tokens=64, max_length=64)
    with pytest.raises(ModelError, match="found nothing, expected a model folder or a hub id"):
        RewardScorer(tmp_path / "nothing", batch_tokens=64, max_length=64)


def test_missing_weights_are_not_initialized_silently(tmp_path: Path) -> None:
    """A policy is not a reward model nor the reverse; a head is only initialized on request, to be trained."""
    policy, reward = causal(tmp_path / "policy"), llama_reward(tmp_path / "reward")
    with pytest.raises(ModelError, match=r"policy: has no weights score.weight, so it is not a reward model"):
        RewardScorer(policy, batch_tokens=64, max_length=64)
    assert RewardScorer(policy, batch_tokens=64, max_length=64, new_head=True).score_texts(["a film"]).shape == (1,)
    with pytest.raises(
        ModelError, match=r"reward: has no weights lm_head.weight, so it is not a causal language model"
    ):
        load_policy(str(reward))


def test_text_is_truncated_on_the_right_before_its_end_of_sequence() -> None:
    ids = tokenize(["good bad film plot", "good"], tokenizer(), 3)
    assert ids == [[3, 4, 1], [3, 1]]
    chat = [{"role": "user", "content": "good"}]
    text = render(chat, [{"role": "assistant", "content": "fine"}], tokenizer())
    assert text.split() == ["user", ":", "good", "assistant", ":", "fine"]
    with pytest.raises(ModelError, match="no chat template"):
        render(chat, chat, tokenizer(template=False))


TALK = [{"role": "user", "content": "is the film good"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("very good", "not very good", "bad")]


def test_messages_have_the_special_tokens_of_the_template_alone(tmp_path: Path) -> None:
    """One beginning-of-sequence token, in scores and features; plain text in the same call gets the tokenizer's."""
    folder = llama_reward(tmp_path / "rm", words=1)
    words = beginning(folder)
    scorer = RewardScorer(folder, batch_tokens=40, max_length=64)
    own = [words.apply_chat_template([*TALK, *answer], return_dict=False) for answer in ANSWERS]
    assert [row.count(words.bos_token_id) for row in own] == [1, 1, 1]
    texts = [render(TALK, answer, scorer.tokenizer) for answer in ANSWERS]
    plain = [words.bos_token_id, *words("a film", add_special_tokens=False)["input_ids"], words.eos_token_id]
    assert tokenize([*texts, "a film"], scorer.tokenizer, 64) == [*own, plain]
    with torch.no_grad():
        expected = [scorer.rewards([row])[0] for row in own]
    assert scorer.score_completions([TALK] * 3, ANSWERS) == pytest.approx(expected, abs=1e-5)
    row = {"prompt": TALK, "chosen": ANSWERS[0], "rejected": ANSWERS[2]}
    margin = scorer.score_pairs(Dataset.from_list([row]))["margin"][0]
    assert margin == pytest.approx(expected[0] - expected[2], abs=1e-5)
    weight = scorer.model.score.weight.detach().double().numpy()[0]
    assert head_features(scorer, texts) @ weight == pytest.approx(expected, abs=1e-4)


def test_no_token_is_added_after_the_end_of_a_template() -> None:
    """Also if text follows its end-of-sequence token, as in some templates: the reward is that of the last token."""
    words = tokenizer()
    words.chat_template += " <eos> review"
    for answer in ANSWERS:
        own = words.apply_chat_template([*TALK, *answer], return_dict=False)
        assert own[-2:] == [words.eos_token_id, *words("review")["input_ids"]]
        text = render(TALK, answer, words)
        assert tokenize([text], words, 64) == [own] and tokenize([text], words, len(own) - 1) == [own[:-1]]


def test_an_encoder_keeps_its_own_special_tokens_around_messages() -> None:
    words = tokenizer(eos=False)
    words.add_special_tokens({"cls_token": "<cls>"})
    words._tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A", special_tokens=[("<cls>", words.convert_tokens_to_ids("<cls>"))]
    )
    ids = tokenize([render(TALK, ANSWERS[0], words)], words, 64)[0]
    assert ids == [words.cls_token_id, *words.apply_chat_template([*TALK, *ANSWERS[0]], return_dict=False)]


def long_and_short() -> Dataset:
    """Eight pairs: three (p0, p1, p2) have a prompt of 20 words, the others have fewer than 6."""
    table = [row | ({"prompt": "the " * 20} if k < 3 else {}) for k, row in enumerate(rows(8))]
    return Dataset.from_list(table)


@pytest.mark.parametrize("build", [llama_reward, bert_reward])
def test_pairs_whose_prompts_fill_the_length_are_counted_in_scoring(
    build: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logged once for all shards and members; not logged if the responses fit."""
    folder, pairs = build(tmp_path / "rm"), long_and_short()
    bert_reward(folder / "members" / "1")
    margins = np.asarray(score_with(members(folder), pairs, tmp_path / "s", batch_tokens=64, max_length=16)["margin"])
    assert (margins[:3] == 0).all() and (margins[3:] != 0).all()
    said = "3 of 8 pairs have a margin of 0: their responses are the same tokens to the model"
    assert caplog.text.count(said) == 1
    EnsembleScorer(folder, batch_tokens=64, max_length=16).score_pairs(pairs)
    assert caplog.text.count(said) == 2
    wide = score_with(members(folder), pairs, tmp_path / "s", batch_tokens=64, max_length=32)
    assert (np.asarray(wide["margin"]) != 0).all() and caplog.text.count(said) == 2


def test_equal_responses_that_are_not_truncated_are_not_counted() -> None:
    """Unknown words, equal texts, an empty table; then texts that truncation makes equal."""
    words = tokenizer()
    assert cut_alike(["the xyz"], ["the zyx"], words, 16).tolist() == [False]
    assert cut_alike(["the " * 20], ["the " * 20], words, 16).tolist() == [False]
    assert cut_alike([], [], words, 16).tolist() == []
    assert cut_alike(["the " * 15 + "good"], ["the " * 15 + "bad"], words, 16).tolist() == [True]
    assert cut_alike(["the " * 14 + "good"], ["the " * 14 + "bad"], words, 16).tolist() == [False]


def test_completions_beyond_the_limit_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A judge logs how many completions it cannot see; a larger limit gives other scores."""
    folder = llama_reward(tmp_path / "rm")
    beginning(llama_reward(folder / "members" / "1", words=1))
    prompts: list[Any] = ["the " * 20, "the film is", "the " * 20]
    found = make_score_judge(str(folder), 16).score(prompts, [" good", " good", " bad"])
    assert found[0] == found[2] != found[1]
    assert caplog.text.count("2 of 3 completions are not read: their prompts fill max_length") == 1
    wide = make_score_judge(str(folder)).score(prompts, [" good", " good", " bad"])
    assert wide[0] != wide[2] and caplog.text.count("fill max_length") == 1
    talk = [{"role": "user", "content": "the " * 20}]
    make_score_judge(str(folder), 16).score([talk], [ANSWERS[0]])
    assert caplog.text.count("1 of 1 completions are not read: their prompts fill max_length") == 1
    with pytest.raises(ConfigError, match="--max-length: found 16 for the judge vader"):
        make_score_judge("vader", 16)


def test_a_text_longer_than_the_position_embeddings_is_truncated(tmp_path: Path) -> None:
    """It is scored by its beginning and can be trained on; ``max_length`` is the model's limit."""
    folder = bert_reward(tmp_path / "model")
    scorer = RewardScorer(folder, batch_tokens=4096, max_length=2048)
    assert scorer.max_length == 512
    long = "good film " * 300
    rewards = scorer.score_texts([long, long + "bad " * 9, "good film " * 256])
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6) == pytest.approx(rewards[2], abs=1e-6)
    pairs = Dataset.from_list(
        [row | {side: f"{row[side]} {long}" for side in ("chosen", "rejected")} for row in rows(8)]
    )
    trainer = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "bf16": False}
    config = RewardSection(model=str(folder), max_length=2048, trainer=trainer)
    train_reward_model(pairs, config, tmp_path / "trained", seed=0)
    assert (tmp_path / "trained" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (RobertaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                       max_position_embeddings=34, pad_token_id=1), 32),
        (GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=32, pad_token_id=0), 32),
        (OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8,
                   word_embed_proj_dim=8, max_position_embeddings=32), 32),
        (LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                     max_position_embeddings=32, pad_token_id=0), 99),
    ],
)  # fmt: skip
def test_the_largest_length_of_a_model(config: PretrainedConfig, most: int) -> None:
    """The longest input without an error; rotary positions have no limit."""
    model = AutoModelForSequenceClassification.from_config(config)
    assert fitting_length(model, 99) == most
    ids = torch.full((1, most), 5)
    assert model(input_ids=ids).logits.isfinite().all()
    if most < 99:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


def test_each_pair_is_scored_by_the_model_that_has_not_seen_it(tmp_path: Path) -> None:
    backbone = llama_reward(tmp_path / "backbone")
    config = RewardSection(model=str(backbone), max_length=64, folds=2, trainer=FAST | {"max_steps": 2})
    scored = cross_fit(Dataset.from_list(rows(8)), config, tmp_path / "cv", seed=0)
    scorers = [RewardScorer(tmp_path / "cv" / f"fold-{k}", batch_tokens=512, max_length=64) for k in range(2)]
    for row in scored:
        expected = scorers[row[FOLD]].score_texts([row["prompt"] + row["chosen"]])[0]
        assert row["reward_chosen"] == pytest.approx(expected, abs=1e-5)
    assert sorted(set(scored[FOLD])) == [0, 1]


def test_vader_prefers_praise() -> None:
    good, bad = VaderJudge().score(["The film is", "The film is"], [" wonderful", " terrible"])
    assert -3 <= bad < 0 < good <= 3
    with pytest.raises(ConfigError, match=r"judge 'vadr' is not known \(did you mean `vader`"):
        make_judge("vadr")
