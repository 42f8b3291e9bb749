"""The special token with which a chat template ends an answer."""

from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models.chat_template import ANSWERED, ASKED, templated

TALK = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the special token that the chat template writes right after an answer, such as ``<|im_end|>`` in ChatML.

    A base model with such a template often has another end of sequence, in its tokenizer and in its generation config.
    Training on messages teaches this token as the end, so that sampling must stop at it.

    None: the tokenizer has no chat template or one that does not take a plain question and its answer, or an answer
    ends in plain text or in nothing.
    """
    if tokenizer.chat_template is None:
        return None
    try:
        whole = templated(TALK, tokenizer, generation_prompt=False, tokenize=False)
        cut = templated(TALK, tokenizer, generation_prompt=False, tokenize=False, cut_off=True)
    except AlignError:
        return None
    if not whole.startswith(cut):
        return None
    after = tokenizer(whole[len(cut) :].lstrip(), add_special_tokens=False)["input_ids"]
    return after[0] if after and after[0] in tokenizer.added_tokens_decoder else None
