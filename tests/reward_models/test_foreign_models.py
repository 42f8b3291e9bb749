"""Reward models that other people trained: scored as transformers scores them, or refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from align.errors import ConfigError, ModelError
from reward_models.features import head_features
from reward_models.loading import LoadOptions, check_class, load_reward_model
from reward_models.tokenization import reward_ids
from tests.helpers.builders import causal, tokenizer
from tests.helpers.foreign import DECODERS, ENCODERS, SIZE, TEXTS, by_transformers, edited, foreign, scorer_of

PADDING: dict[str, tuple[int | None, str | None]] = {
    "own": (0, "<pad>"),
    "eos of both": (1, "<eos>"),
    "nowhere": (None, None),
    "of the configuration alone": (0, None),
    "of the tokenizer alone": (None, "<pad>"),
    "eos of the tokenizer alone": (None, "<eos>"),
    "another of the configuration": (5, "<pad>"),
    "eos of the tokenizer, another of the configuration": (0, "<eos>"),
    "none that is embedded": (-1, "<pad>"),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("case", PADDING)
def test_a_reward_is_that_of_the_row_alone_whatever_pads(family: str, case: str, tmp_path: Path) -> None:
    """Padding on either side; a padding token in the text and at its end; features are those that the head reads."""
    stated, own = PADDING[case]
    if family == "gpt2" and stated == -1:
        stated = None
    words = tokenizer()
    words.pad_token = own
    folder = foreign(tmp_path / "rm", family, words=words, pad_token_id=stated)
    for side in ("right", "left"):
        scorer = scorer_of(folder, padding_side=side)
        texts = [*TEXTS, "good <pad> film", "<pad> film"]
        ids = [*reward_ids(texts, scorer.tokenizer, 64), [5, 3, 0], [4, 7]]
        expected = by_transformers(folder, ids)
        assert np.ptp(expected) > 1e-2
        assert np.allclose(scorer.rewards(ids), expected, atol=1e-4)
        assert np.allclose(scorer.score_texts(texts), expected[: len(texts)], atol=1e-4)
        weight = scorer.model.score.weight.detach().double().numpy()[0]
        assert np.allclose(head_features(scorer, texts) @ weight, expected[: len(texts)], atol=1e-4)
    assert scorer.model.config.pad_token_id == stated


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_every_family_scores_as_transformers_does(family: str, tmp_path: Path) -> None:
    words = tokenizer(eos=family not in ENCODERS)
    folder = foreign(tmp_path / "rm", family, words=words)
    scorer = scorer_of(folder)
    ids = reward_ids(TEXTS[:5], scorer.tokenizer, 64)
    expected = by_transformers(folder, ids)
    assert np.ptp(expected) > 1e-3
    assert np.allclose(scorer.rewards(ids), expected, atol=1e-4)


def test_rewards_that_depend_on_padding_are_scored_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """XLNet reads its last token, whatever it is."""
    scorer = scorer_of(foreign(tmp_path / "rm", "xlnet"))
    scorer.score_texts(TEXTS)
    assert caplog.text.count("its rewards depend on padding; texts are scored one at a time") == 1
    scorer_of(foreign(tmp_path / "plain")).score_texts(TEXTS)
    assert caplog.text.count("depend on padding") == 1


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_are_refused(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        family, vocab_size=SIZE, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, num_labels=1, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=4, decoder_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    tokenizer().save_pretrained(tmp_path / "rm")
    with pytest.raises(ModelError, match=r"is an encoder-decoder .*ForSequenceClassification"):
        scorer_of(tmp_path / "rm")
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        check_class(str(tmp_path / "rm"), trust_remote_code=False)


def test_texts_are_cut_on_the_right_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    right = foreign(tmp_path / "right")
    left = shutil.copytree(right, tmp_path / "left")
    settings = json.loads((left / "tokenizer_config.json").read_text()) | {"truncation_side": "left"}
    (left / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "left"}))
    assert AutoTokenizer.from_pretrained(left).truncation_side == "left"
    long = ["the film is good but " + "bad " * 20, "a plot"]
    scorers = [scorer_of(folder, max_length=6) for folder in (right, left)]
    first, second = (scorer.score_texts(long) for scorer in scorers)
    assert first.tolist() == second.tolist()
    assert reward_ids(long[:1], scorers[1].tokenizer, 6) == [[*tokenizer()("the film is good but")["input_ids"], 1]]
    assert scorers[1].tokenizer.truncation_side == "left"


def test_outputs_are_counted_by_the_weights(tmp_path: Path) -> None:
    """Of config.json, that says nothing, or something else, and in which a default has two labels."""
    whole = foreign(tmp_path / "rm")
    silent = edited(whole, tmp_path / "silent", lambda weights: None, id2label=None, label2id=None, num_labels=None)
    wrong = edited(whole, tmp_path / "wrong", lambda weights: None, id2label={"0": "a", "1": "b"})
    rewards = [scorer_of(folder).score_texts(TEXTS).tolist() for folder in (whole, silent, wrong)]
    assert rewards[0] == rewards[1] == rewards[2]
    five = foreign(tmp_path / "five", num_labels=5)
    lying = edited(five, tmp_path / "lying", lambda weights: None, id2label={"0": "a"}, label2id={"a": 0})
    for folder in (five, lying):
        with pytest.raises(ModelError, match=r"reward-labels.*its classification head has 5 outputs, expected one"):
            scorer_of(folder)


EXTRA = ["score.bias", "score_norm.weight", "gating.0.weight", "value_head.weight", "regression_layer.weight",
         "cls.weight", "decoder.weight", "pooler.dense.weight", "model.layers.0.self_attn.q_proj.bias"]  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
def test_weights_that_would_not_be_read_are_named(name: str, tmp_path: Path) -> None:
    whole = foreign(tmp_path / "rm")
    more = edited(whole, tmp_path / "more", lambda weights: weights.update({name: torch.ones(32)}))
    with pytest.raises(ModelError, match=rf"reward-unread.*has weights {name}, which LlamaForSequenceClassification"):
        scorer_of(more)


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("cls.predictions.bias", True),
        ("roberta.pooler.dense.bias", True),
        ("roberta.pooler.gate.weight", False),
        ("cls.weight", False),
        ("classifier.2.weight", False),
    ],
)
def test_of_an_encoder_pretraining_alone_is_left_out(name: str, taken: bool, tmp_path: Path) -> None:
    """RoBERTa's head reads no pooler; nothing is known of other names."""
    whole = foreign(tmp_path / "rm", "roberta", words=tokenizer(eos=False))
    more = edited(whole, tmp_path / "more", lambda weights: weights.update({name: torch.ones(32)}))
    if taken:
        assert scorer_of(more).score_texts(TEXTS).tolist() == scorer_of(whole).score_texts(TEXTS).tolist()
    else:
        with pytest.raises(ModelError, match=rf"reward-unread.*has weights {name}, which Roberta"):
            scorer_of(more)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "value_head.weight", "score_head.weight"])
def test_a_head_of_another_name_is_named(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is no backbone's, so as a backbone the model may be taken, and what is left out is said."""

    def moved(weights: dict[str, torch.Tensor]) -> None:
        weights[name] = weights.pop("score.weight")

    other = edited(foreign(tmp_path / "rm"), tmp_path / "other", moved)
    with pytest.raises(ModelError, match=rf"has no weights score.weight, .*; it has {name}, which would not be read"):
        scorer_of(other)
    load_reward_model(other, new_head=True)
    assert f"{name} are not read, a new head is trained" in caplog.text


def test_weights_that_no_reward_depends_on_are_taken(tmp_path: Path) -> None:
    """A language model's head, and buffers of older versions."""
    whole = foreign(tmp_path / "rm")
    more = {"lm_head.weight": torch.ones(SIZE, 32), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    other = edited(whole, tmp_path / "more", lambda weights: weights.update(more))
    assert scorer_of(other).score_texts(TEXTS).tolist() == scorer_of(whole).score_texts(TEXTS).tolist()


@pytest.mark.parametrize("new_head", [False, True])
def test_a_backbone_must_be_whole(new_head: bool, tmp_path: Path) -> None:
    """Neither a missing layer nor a bias that is left out goes unseen, with or without a head."""
    policy = causal(tmp_path / "policy") if new_head else foreign(tmp_path / "rm")

    def without(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(ModelError, match=r"has no weights model.layers.1.mlp.up_proj.weight"):
        load_reward_model(edited(policy, tmp_path / "less", without), new_head=new_head)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    with pytest.raises(ModelError, match=r"reward-unread.*q_proj.bias"):
        load_reward_model(edited(policy, tmp_path / "more", lambda w: w.update(bias)), new_head=new_head)


CODE = """
from transformers import LlamaForSequenceClassification

class OwnReward(LlamaForSequenceClassification):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out
"""


def test_code_of_its_own_runs_only_where_it_is_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = foreign(tmp_path / "rm")
    auto = {"AutoModelForSequenceClassification": "modeling_own.OwnReward"}
    own = edited(whole, tmp_path / "own", lambda weights: None, architectures=["OwnReward"], auto_map=auto)
    (own / "modeling_own.py").write_text(CODE)
    with pytest.raises(ModelError, match=r"(?s)its own code defines OwnReward .*--trust-remote-code"):
        scorer_of(own)
    trusted = scorer_of(own, options=LoadOptions(trust_remote_code=True))
    assert np.allclose(trusted.score_texts(TEXTS), 2 * scorer_of(whole).score_texts(TEXTS), atol=1e-5)
    backbone = edited(whole, tmp_path / "backbone", lambda weights: None, architectures=["OwnReward"],
                      auto_map={"AutoModel": "modeling_own.OwnReward"})  # fmt: skip
    for trust in (False, True):
        with pytest.raises(ModelError, match="its own code defines OwnReward"):
            scorer_of(backbone, options=LoadOptions(trust_remote_code=trust))
    unknown = edited(whole, tmp_path / "unknown", lambda weights: None, architectures=["TheirRewardModel"])
    assert scorer_of(unknown).score_texts(TEXTS).tolist() == scorer_of(whole).score_texts(TEXTS).tolist()
    assert "was saved by TheirRewardModel, which transformers does not have" in caplog.text
    tokens = edited(whole, tmp_path / "tokens", lambda weights: None, architectures=["LlamaForTokenClassification"])
    with pytest.raises(ModelError, match="gives a number per token"):
        scorer_of(tokens)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_weights_in_16_bits_and_a_head_in_32(family: str, dtype: str, tmp_path: Path) -> None:
    """The head's weights are those of the file, unrounded; ``auto`` is what the file has."""
    folder = foreign(tmp_path / "rm", family, words=tokenizer(eos=family == "llama"))
    exact = scorer_of(folder)
    scorer = scorer_of(folder, options=LoadOptions(dtype=dtype))
    own = {name: value for name, value in scorer.model.state_dict().items() if name.split(".")[0] in HEAD}
    assert own and all(value.dtype == torch.float32 for value in own.values())
    assert all(torch.equal(value, exact.model.state_dict()[name]) for name, value in own.items())
    assert scorer.model.base_model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert np.allclose(scorer.score_texts(TEXTS), exact.score_texts(TEXTS), atol=0.3, rtol=0.1)
    head = scorer.model.score if family == "llama" else scorer.model.classifier
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    scorer.score_texts(TEXTS)
    assert set(seen) == {torch.float32}


HEAD = ("score", "classifier")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype: found 'half', expected one of float32, bfloat16, float16, auto"):
        LoadOptions(dtype="half")


def test_other_numbers_of_outputs_of_own_code_are_refused(tmp_path: Path) -> None:
    code = CODE.replace("2 * out.logits", "out.logits.repeat(1, 3)")
    own = edited(foreign(tmp_path / "rm"), tmp_path / "own", lambda weights: None, architectures=["OwnReward"],
                 auto_map={"AutoModelForSequenceClassification": "modeling_three.OwnReward"})  # fmt: skip
    (own / "modeling_three.py").write_text(code)
    with pytest.raises(ModelError, match="its classification head has 3 outputs"):
        scorer_of(own, options=LoadOptions(trust_remote_code=True)).score_texts(TEXTS)
