"""The special tokens that a tokenizer puts around every text."""

from transformers import PreTrainedTokenizerBase

PROBE = "a"
"""Text that shows which tokens a tokenizer adds before and after any text."""


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the tokens that the tokenizer adds before and after every text."""
    whole = list(tokenizer(PROBE)["input_ids"])
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    starts = (k for k in range(len(whole) - len(bare) + 1) if whole[k : k + len(bare)] == bare)
    start = next(starts, None) if bare else None
    return (whole, []) if start is None else (whole[:start], whole[start + len(bare) :])


def of_encoder(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer frames each text in tokens that a classifier reads, ``[CLS]`` and ``[SEP]``.

    A decoder's tokenizer may also name a ``cls_token``, such as its end of a sequence (h2o-danube) or its beginning.
    That of an encoder is put around each text, is no end, and where it is the beginning as well (RoBERTa), a
    ``sep_token`` goes with it.
    """
    cls = tokenizer.cls_token_id
    if cls is None or cls == tokenizer.eos_token_id:
        return False
    added = [token for side in added_tokens(tokenizer) for token in side]
    return cls in added and (cls != tokenizer.bos_token_id or tokenizer.sep_token_id in added)
