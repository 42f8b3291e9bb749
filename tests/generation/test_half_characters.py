"""A completion that ends inside a character of several tokens has no half of it in its text, whatever the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align.commands.build_pairs import BuildSettings, build_pairs
from align.generation.encoding import to_completion
from align.generation.server_engine import ServerEngine
from align.generation.types import REPLACEMENT, Sampling
from align.io.files import read_json
from reward_models.scorers import ScorerSpec
from tests.generation.test_server_engine import Fake, Reply


def bytes_tokenizer(fallback: bool) -> PreTrainedTokenizerFast:
    """One token per byte: those of GPT-2, or with ``fallback`` those of Llama 2, ``<0xF0>``."""
    if fallback:
        names = [f"<0x{k:02X}>" for k in range(256)]
        inner = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, [], byte_fallback=True))
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({name: k for k, name in enumerate(letters)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.add_special_tokens({"eos_token": "<eos>"})
    return made


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("text", ["ok 😀", "ok 好好", "ok 好", "ok é"])
def test_the_half_of_a_character_is_no_text(text: str, fallback: bool) -> None:
    """The tokens stay as they were sampled; a completion that ended by itself is left as it is."""
    words = bytes_tokenizer(fallback)
    ids, prompt = words(text)["input_ids"], words("go")["input_ids"]
    assert len(ids) == len(text.encode())
    for cut in range(4, len(ids)):
        whole = text.encode()[:cut].decode(errors="ignore")
        found = to_completion(words, prompt, ids[:cut], [words.eos_token_id], None)
        assert (found.text, found.token_ids, found.finish_reason) == (whole, ids[:cut], "length")
    assert to_completion(words, prompt, ids, [words.eos_token_id], None).text == text
    ended = to_completion(words, prompt, [*ids[:4], words.eos_token_id], [words.eos_token_id], None)
    assert ended.finish_reason == "stop" and REPLACEMENT in ended.text


@pytest.mark.parametrize(("reason", "text"), [("length", "ok "), ("stop", "ok " + REPLACEMENT)])
def test_a_server_that_sends_half_characters(reason: str, text: str) -> None:
    def half(path: str, body: dict[str, Any], number: int) -> Reply:
        return 200, {"choices": [{"text": "ok " + REPLACEMENT, "token_ids": [4, 5], "finish_reason": reason}]}

    with Fake(half).running() as address:
        ((found,),) = ServerEngine("policy", base_url=address).generate(["a"], Sampling(2))
    assert found.text == text and found.token_ids == [4, 5]


def test_bytes_that_are_no_character_are_told_where_pairs_are_built(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [" good", f" aw{REPLACEMENT}ful", " bad"]
    lines = [{"id": "a", "prompt": "it is", "sample": k, "completion": text} for k, text in enumerate(texts)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level("WARNING"):
        build_pairs(tmp_path / "c.jsonl", BuildSettings(ScorerSpec(judge="vader")), tmp_path / "built")
    assert "pairs: 1 completions hold U+FFFD" in caplog.text
    assert read_json(tmp_path / "built" / "metrics.json")["completions_broken"] == 1


@pytest.mark.parametrize("prompt", ["say it :", "say , it !"])
def test_spaces_before_signs_stay(prompt: str) -> None:
    """A tokenizer that would clean them up, and not only for BPE: the text of a pair must be what was sampled."""
    vocabulary = [(token, -3.0) for token in ["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz!.?,:'="]]
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=True)
    text = " bonjour ! x = a . b do n't"
    sampled = tokenizer(text)["input_ids"]
    assert tokenizer.decode(sampled) != text
    assert to_completion(tokenizer, tokenizer(prompt)["input_ids"], sampled, [], None).text == text
