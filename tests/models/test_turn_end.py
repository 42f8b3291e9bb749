"""The token that ends an answer by the chat template ends a completion, whatever the configurations call the end."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from align import PreferenceConfig
from align.generation.encoding import stop_ids
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.models.tokenization import encode_pair
from align.models.turn_end import turn_ends
from align.training.pair_tables import tokenize_table
from tests.helpers.builders import TEMPLATE, causal, tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
OPENS_WITH_THE_LAST_END = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_end|>{% endif %}<|im_start|>{{ m.role }} {{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|><|im_start|>assistant {% endif %}"
)
QUESTION = [{"role": "user", "content": "good film"}]


def chat() -> PreTrainedTokenizerFast:
    """ChatML's tokens in a tokenizer whose end of sequence is another one, as in base models."""
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("m.content }}", "m.content | trim }}"), "<|im_end|>"),
        (TEMPLATE, None),  # a space, then nothing
        (TEMPLATE.replace("{% endfor %}", "<eos>{% endfor %}", 1), "<eos>"),
        (CHATML.replace("<|im_end|>\n", "\nfilm "), None),  # plain text
        (CHATML.replace("<|im_end|>", "film <|im_end|>"), "<|im_end|>"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|><eos>"), "<|im_end|>"),
        (NEEDS_SYSTEM + CHATML, "<|im_end|>"),
        (CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}"), "<|im_end|>"),
        (OPENS_WITH_THE_LAST_END, None),  # after the last answer it writes nothing
        ("", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_what_ends_an_answer(template: str | None, ends: str | None) -> None:
    made = chat()
    made.chat_template = template
    assert turn_ends(made) == (set() if ends is None else {made.convert_tokens_to_ids(ends)})


def test_white_space_is_no_end() -> None:
    """Tokenizers like Gemma's have added tokens of line breaks, which stand in any answer."""
    made = chat()
    made.add_tokens(["\n\n"])
    made.chat_template = CHATML.replace("<|im_end|>", "film\n\nplot<|im_end|>")
    assert turn_ends(made) == {made.convert_tokens_to_ids("<|im_end|>")}


def test_each_named_template_has_its_end() -> None:
    made = chat()
    made.chat_template = {"default": CHATML, "tool_use": CHATML.replace("<|im_end|>", "<eos>")}
    assert turn_ends(made) == {made.eos_token_id, made.convert_tokens_to_ids("<|im_end|>")}
    made.chat_template = {"tool_use": CHATML}
    assert turn_ends(made) == {made.convert_tokens_to_ids("<|im_end|>")}


def test_a_tokenizer_of_bytes_ends_in_its_own_token() -> None:
    """One that spells <|im_end|> in bytes stops at none of these."""
    made = ByT5Tokenizer()
    made.chat_template = CHATML
    assert turn_ends(made) == set() and stop_ids(made, None) == [made.eos_token_id]
    made.chat_template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    assert turn_ends(made) == {made.eos_token_id}


def test_a_training_that_teaches_no_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": QUESTION}
    row |= {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "good"), ("rejected", "bad"))}
    args = PreferenceConfig(output_dir="unused", max_length=64, report_to="none", bf16=False)
    told = "writes no special token after an answer"
    made = chat()
    for template, expected in ((CHATML, False), (CHATML.replace("<|im_end|>", " ###"), True)):
        made.chat_template = template
        tokenize_table(Dataset.from_list([row]), made, args, ["1"])
        assert (told in caplog.text) == expected


def test_it_is_what_training_teaches() -> None:
    made = chat()
    row = {"id": "1", "prompt": QUESTION}
    row |= {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "good"), ("rejected", "bad"))}
    ids = encode_pair(row, made)
    (end,) = turn_ends(made)
    assert end in ids.rejected and ids.chosen.index(end) == 1  # right after the word


def test_a_completion_ends_there(tmp_path: Path) -> None:
    """A model that writes the end after one word and would go on, under all configurations."""
    made = chat()
    model = AutoModelForCausalLM.from_pretrained(causal(tmp_path / "model"))
    model.resize_token_embeddings(len(made))
    word, end = made.convert_tokens_to_ids("good"), made.convert_tokens_to_ids("<|im_end|>")
    follows = {made.convert_tokens_to_ids("assistant"): word, word: end, end: word}

    def forward(module: torch.nn.Module, inputs: object, outputs: object) -> object:
        """Logits that say what follows the last token."""
        rows = module.seen[:, -outputs.logits.shape[1] :]  # type: ignore[attr-defined, index]
        wanted = torch.tensor([[follows.get(int(token), word) for token in row] for row in rows])
        outputs.logits = 50.0 * torch.nn.functional.one_hot(wanted, outputs.logits.shape[-1]).float()  # type: ignore[attr-defined]
        return outputs

    def keep(module: torch.nn.Module, inputs: object, kwargs: dict[str, torch.Tensor]) -> None:
        module.seen = kwargs["input_ids"]

    model.register_forward_pre_hook(keep, with_kwargs=True)
    model.register_forward_hook(forward)
    assert end not in (made.eos_token_id, model.generation_config.eos_token_id)
    engine = TransformersEngine(model, made, batch_size=2)
    assert engine.stops == stop_ids(made, model.generation_config) and end in engine.stops
    ((found,),) = engine.generate([QUESTION], Sampling(8, 0.0))
    assert (found.token_ids, found.finish_reason) == ([word, end], "stop")
