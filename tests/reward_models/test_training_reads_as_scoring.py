"""Where and how a reward is read in training is where and how it is read of the saved model, sentence pairs too."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from typer.testing import CliRunner

from align.cli.main import app
from align.commands.best_of_n import BestSettings
from align.config import RewardSection
from align.errors import ConfigError, ModelError
from reward_models.loading import LoadOptions
from reward_models.pairwise_judges import make_pairwise, make_score_judge
from reward_models.score import RewardScorer
from reward_models.scorers import ScorerSpec
from reward_models.tokenization import SentencePair, reward_ids
from reward_models.train import train_reward_model
from reward_models.trainer import RewardTrainer
from tests.helpers.builders import causal, rows, tokenizer
from tests.helpers.foreign import by_transformers, foreign, scorer_of

STILL = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0, "bf16": False, "use_cpu": True}


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], np.ndarray]]:
    """What the trainer gives the model in each step, and the rewards that it gets."""
    seen: list[tuple[dict[str, Any], np.ndarray]] = []
    plain = RewardTrainer.compute_loss

    def noted(self: RewardTrainer, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        loss, outputs = plain(self, model, inputs, return_outputs=True, **named)
        seen.append((dict(inputs), outputs.logits.detach().flatten().numpy()))
        return loss

    monkeypatch.setattr(RewardTrainer, "compute_loss", noted)
    return seen


@pytest.mark.parametrize("start", ["backbone", "finished"])
@pytest.mark.parametrize(("stated", "own"), [(None, None), (0, None), (None, "<eos>"), (5, "<pad>"), (1, "<eos>")])
def test_a_reward_is_read_in_training_where_it_is_scored(
    start: str, stated: int | None, own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl's convention, which the saved configuration keeps: transformers reads the saved model there too."""
    words = tokenizer()
    words.pad_token = own
    folder = foreign(tmp_path / "rm", words=words, pad_token_id=stated)
    if start == "backbone":
        causal(folder)
        words.save_pretrained(folder)
    seen = watched(monkeypatch)
    config = RewardSection(model=str(folder), max_length=64, trainer=STILL)
    train_reward_model(Dataset.from_list(rows(8)), config, tmp_path / "out", seed=0)
    inputs, rewards = seen[0]
    ids = [row[:n] for row, n in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(dim=1), strict=True)]
    assert np.ptp(rewards) > 1e-2
    assert np.allclose(by_transformers(tmp_path / "out", ids), rewards, atol=1e-4)
    assert np.allclose(scorer_of(tmp_path / "out").rewards(ids), rewards, atol=1e-4)


def paired_words() -> PreTrainedTokenizerFast:
    """As BERT has it: <cls> A <sep> B <sep>, with token type ids."""
    words = tokenizer(eos=False, template=False)
    words.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    special = [(name, words.convert_tokens_to_ids(name)) for name in ("<cls>", "<sep>")]
    words._tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=special
    )
    return words


def encoder(folder: Path, family: str = "bert") -> Path:
    words = paired_words()
    return foreign(folder, family, words=words, vocab_size=len(words))


def as_its_author(folder: Path, table: list[dict[str, Any]], side: str, max_length: int = 64) -> np.ndarray:
    """``tokenizer(question, answer)``, one by one."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").eval()
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    found = []
    for row in table:
        inputs = words(row["prompt"], row[side], return_tensors="pt", truncation=True, max_length=max_length)
        if "token_type_ids" in inputs and type(model).__name__.startswith(("Modern", "Distil")):
            del inputs["token_type_ids"]
        with torch.no_grad():
            found.append(model(**inputs).logits.item())
    return np.array(found)


PAIRED = LoadOptions(text_pair=True)


@pytest.mark.parametrize("family", ["bert", "electra", "deberta-v2", "roberta", "distilbert", "modernbert"])
def test_sentence_pairs_are_scored_as_their_author_does(family: str, tmp_path: Path) -> None:
    """With the separator and the token type ids; long ones are cut as the tokenizer cuts two texts."""
    folder, table = encoder(tmp_path / "rm", family), rows(8)
    scorer = scorer_of(folder, options=PAIRED)
    scored = scorer.score_pairs(Dataset.from_list(table))
    for side in ("chosen", "rejected"):
        expected = as_its_author(folder, table, side)
        assert np.ptp(expected) > 1e-3
        assert np.allclose(scored[f"reward_{side}"], expected, atol=1e-4)
    one = scorer_of(folder).score_pairs(Dataset.from_list(table))
    assert not np.allclose(one["reward_chosen"], scored["reward_chosen"], atol=1e-3)
    short = scorer_of(folder, options=PAIRED, max_length=8).score_pairs(Dataset.from_list(table))
    assert np.allclose(short["reward_chosen"], as_its_author(folder, table, "chosen", 8), atol=1e-4)


def test_other_token_types_than_those_of_two_texts_are_refused() -> None:
    """XLNet's tokenizer gives its last token a type of its own, which no split into two texts says."""
    words = tokenizer(eos=False)
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A:0 <eos>:2", pair="$A:0 $B:1 <eos>:2", special_tokens=[("<eos>", 1)]
    )
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    with pytest.raises(ModelError, match=r"reward-text-pair.*token types \[0, 1, 2\]"):
        reward_ids([SentencePair("the film", "is good")], words, 16)


def test_messages_as_a_sentence_pair_are_their_contents(tmp_path: Path) -> None:
    """Without a chat template: a question of the user, an answer of the assistant."""
    scorer = scorer_of(encoder(tmp_path / "rm"), options=PAIRED)
    talk, answer = [{"role": "user", "content": "is the film good"}], [{"role": "assistant", "content": "very good"}]
    rewards = [scorer.score_completions([a], [b])[0] for a, b in ((talk, answer), ("is the film good", "very good"))]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)


@pytest.mark.parametrize("settings", [{"trainer": STILL}, {"head": "naive-bayes"}], ids=["full", "naive-bayes"])
def test_a_model_trained_on_sentence_pairs_says_so_itself(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Trained with the segments of both texts, and scored so without an option."""
    folder, table = encoder(tmp_path / "rm"), rows(8)
    seen = watched(monkeypatch)
    for paired in (True, False):
        config = RewardSection(model=str(folder), max_length=64, text_pair=paired, **settings)
        train_reward_model(Dataset.from_list(table), config, tmp_path / str(paired), seed=0)
        assert json.loads((tmp_path / str(paired) / "config.json").read_text())["text_pair"] is paired
    assert "if it was trained on sentence pairs" not in caplog.text
    scored = scorer_of(tmp_path / "True").score_pairs(Dataset.from_list(table))
    assert np.allclose(scored["reward_chosen"], as_its_author(tmp_path / "True", table, "chosen"), atol=1e-4)
    scorer_of(tmp_path / "False").score_pairs(Dataset.from_list(table))
    assert "if it was trained on sentence pairs" not in caplog.text
    if seen:
        assert sorted(seen[0][1].tolist()) == pytest.approx(
            sorted([*scored["reward_chosen"], *scored["reward_rejected"]]), abs=1e-4
        )
        assert "token_type_ids" in seen[0][0] and "token_type_ids" not in seen[-1][0]


def test_an_encoder_that_does_not_say_how_it_reads_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = encoder(tmp_path / "rm")
    scorer_of(folder, options=PAIRED)
    scorer_of(foreign(tmp_path / "decoder"))
    assert "sentence pairs" not in caplog.text
    scorer_of(folder)
    assert (
        caplog.text.count("rm: an encoder, which is given prompt and response as one text; if it was trained on") == 1
    )


def test_a_decoder_reads_no_sentence_pairs(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "rm")
    with pytest.raises(ConfigError, match=r"reward-text-pair.*reads one text \(a LlamaForSequenceClassification\)"):
        scorer_of(folder, options=PAIRED)
    config = RewardSection(model=str(folder), text_pair=True, trainer=STILL)
    with pytest.raises(ConfigError, match="reward-text-pair"):
        train_reward_model(Dataset.from_list(rows(4)), config, tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_score_judge("vader", options=PAIRED),
        lambda: make_pairwise("llm:none", options=PAIRED),
        lambda: ScorerSpec(judge="vader", options=LoadOptions(dtype="auto")),
    ],
)
def test_options_of_reward_models_are_refused_for_judges(make: Any) -> None:
    with pytest.raises(ConfigError, match="found dtype, trust_remote_code or text_pair, which are of a reward model"):
        make()


def test_options_are_part_of_what_scores_depend_on(tmp_path: Path) -> None:
    folder = str(encoder(tmp_path / "rm"))
    plain, paired = (ScorerSpec(reward_model=folder, options=options) for options in (LoadOptions(), PAIRED))
    assert plain.key != paired.key
    assert not np.allclose(plain.load()(["the film is"], ["good"]), paired.load()(["the film is"], ["good"]), atol=1e-3)
    assert BestSettings(paired) != BestSettings(plain)


def test_the_verbs_hand_the_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verb that loads a reward model loads it as its options say."""
    seen: list[LoadOptions] = []
    begin = RewardScorer.__init__

    def noted(self: RewardScorer, *args: Any, **named: Any) -> None:
        seen.append(named["options"])
        begin(self, *args, **named)

    monkeypatch.setattr(RewardScorer, "__init__", noted)
    folder, policy = encoder(tmp_path / "rm"), causal(tmp_path / "policy")
    pairs, made, out = tmp_path / "pairs.jsonl", tmp_path / "completions.jsonl", tmp_path / "out"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    made.write_text("".join(
        json.dumps({"id": row["id"], "prompt": row["prompt"], "completion": text}) + "\n"
        for row in rows(4) for text in (" good film", " bad plot")
    ))  # fmt: skip
    np.save(tmp_path / "vectors.npy", np.eye(12, 16, dtype=np.float32))
    options = ["--text-pair", "--dtype", "bfloat16", "--trust-remote-code"]
    verbs = [
        ["reward", "score", pairs, "--model", folder, "--output", out / "0"],
        ["eval", "reward-model", pairs, "--model", folder, "--output", out / "1", "--trained-on", pairs],
        ["filter", "run", pairs, "--output", out / "2", "--ood-model", folder, "--ood-pairs", pairs,
         "--embeddings", tmp_path / "vectors.npy"],
        ["eval", "reward", policy, "--reference", policy, "--prompts", pairs, "--judge", folder, "--output", out / "3",
         "--max-new-tokens", "4", "--limit", "4"],
        ["pairs", "build", made, "--reward-model", folder, "--output", out / "4"],
        ["best-of-n", made, "--reward-model", folder, "--output", out / "5"],
    ]  # fmt: skip
    for verb in verbs:
        seen.clear()
        found = CliRunner().invoke(app, [*map(str, verb), *options])
        assert found.exit_code == 0, (verb, found.output, found.exception)
        assert set(seen) == {LoadOptions("bfloat16", True, True)}, (verb, seen)
