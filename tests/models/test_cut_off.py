"""Responses that the limit of tokens cut off: no end of theirs is trained or measured, from sampling to training."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from align.commands.build_pairs import BuildSettings, build_pairs
from align.config import PairsSection
from align.config.columns import ID_COLUMNS
from align.data.pairs import load_pairs
from align.data.streaming import stream_pairs
from align.errors import DataError
from align.io.files import read_json
from align.models.tokenization import encode_pair, tokenize_pairs
from align.training.columns import trained_pairs
from align.training.pair_tables import as_table
from reward_models.scorers import ScorerSpec
from reward_models.tokenization import pair_tokens
from tests.helpers.builders import TEMPLATE, tokenizer
from tests.models.test_conformance import trained

PLAIN = {"id": "p1", "prompt": "the film is", "chosen": " very good", "rejected": " very dull"}
CHAT = {
    "id": "c1",
    "prompt": [{"role": "user", "content": "the film"}],
    "chosen": [{"role": "assistant", "content": "very good"}],
    "rejected": [{"role": "assistant", "content": "very dull"}],
}
ENDING = TEMPLATE.replace("{% endfor %}", "<eos> review{% endfor %}", 1)
"""Writes the end-of-sequence token and one more word after each message."""
CUT = {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}


def words() -> PreTrainedTokenizerBase:
    made = tokenizer()
    made.chat_template = ENDING
    return made


@pytest.mark.parametrize("pair", [PLAIN, CHAT], ids=["text", "messages"])
def test_a_cut_off_response_has_no_end(pair: dict[str, Any]) -> None:
    """Its ids are those of its text alone; the other response and the prompt are as they were."""
    made = words()
    whole, cut = encode_pair(pair, made), encode_pair(pair | CUT, made)
    very, dull = made.convert_tokens_to_ids(["very", "dull"])
    assert made.eos_token_id in whole.rejected and whole.rejected[:2] == [very, dull]
    assert cut.rejected == [very, dull]
    assert (cut.prompt, cut.chosen) == (whole.prompt, whole.chosen)
    both = encode_pair(pair | dict.fromkeys(CUT, "length"), made)
    assert made.eos_token_id not in both.chosen + both.rejected


@pytest.mark.parametrize("pair", [PLAIN, CHAT], ids=["text", "messages"])
def test_training_measuring_and_trust_read_the_same_ids(pair: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """The reward model alone reads the end, because that is where it gives its reward."""
    made, pairs = words(), Dataset.from_list([pair | CUT])
    with caplog.at_level("INFO"):
        (ids,) = trained(pairs, made)
    assert "1 of 2 responses were cut off by a limit of tokens" in caplog.text
    table = tokenize_pairs(pairs, made)
    assert ids == tuple(table[name][0] for name in ID_COLUMNS) == tuple(encode_pair(pair | CUT, made)[:3])
    assert len(trained_pairs(pairs, made, 64, "keep_start")) == 1
    assert pair_tokens(pairs, made, 64)[:2] == pair_tokens(Dataset.from_list([pair]), made, 64)[:2]


def test_a_template_that_trims_keeps_what_was_sampled() -> None:
    made = tokenizer()
    made.chat_template = ENDING.replace("m.content", "m.content | trim")
    assert encode_pair(CHAT | CUT, made).rejected == made.convert_tokens_to_ids(["very", "dull"])


def test_a_template_that_drops_a_cut_off_message_is_refused_by_row() -> None:
    made = tokenizer()
    made.chat_template = ENDING.replace("{{ m.content }}", "{{ m.content[:9] }}")
    with pytest.raises(DataError, match=r"pair c1: the chat template.*does not write the end"):
        encode_pair(CHAT | CUT, made)


def test_finish_reasons_go_from_the_sampler_into_the_pair_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A table that is loaded or streamed keeps them; half of the completions are cut off, which is said."""
    texts = ((" good", "stop"), (" awful", "length"), (" great film", "length"), (" bad", "stop"))
    lines = [
        {"id": "a", "prompt": "the film is", "sample": k, "completion": text, "finish_reason": reason}
        for k, (text, reason) in enumerate(texts)
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings(ScorerSpec(judge="vader"), mode="all")
    with caplog.at_level("WARNING"):
        build_pairs(file, settings, tmp_path / "built")
    assert "50% of the completions were cut off" in caplog.text
    assert read_json(tmp_path / "built" / "metrics.json")["completions_cut_off_share"] == 0.5
    source, reason_of = PairsSection(path=str(tmp_path / "built" / "pairs.parquet")), dict(texts)
    for pairs in (load_pairs(source), stream_pairs(source, tmp_path / "pairs.arrow")):
        assert len(pairs) == 6
        for pair in pairs:
            for side in ("chosen", "rejected"):
                assert pair[f"{side}_finish_reason"] == reason_of[pair[side]]


def test_a_finish_reason_that_means_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(PLAIN) + "\n" + json.dumps(PLAIN | {"id": "p2", "rejected_finish_reason": "eos"}) + "\n")
    with pytest.raises(DataError, match="row 2:rejected_finish_reason: found 'eos', expected stop or length"):
        load_pairs(PairsSection(path=str(file)))
    with pytest.raises(DataError, match="pair p1: chosen_finish_reason: found 'eos', expected stop or length"):
        encode_pair(PLAIN | {"chosen_finish_reason": "eos"}, words())
    with pytest.raises(DataError, match="train_dataset: rejected_finish_reason of row 1: found 'eos'"):
        as_table([PLAIN, PLAIN | {"rejected_finish_reason": "eos"}], "train_dataset")
    file.write_text(
        json.dumps({"id": "a", "prompt": "the", "sample": 0, "completion": " film", "finish_reason": "eos"}) + "\n"
    )
    with pytest.raises(DataError, match="row 1: finish_reason: found 'eos', expected stop or length"):
        build_pairs(file, BuildSettings(ScorerSpec(judge="vader")), tmp_path / "built")
