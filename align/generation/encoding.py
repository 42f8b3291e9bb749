"""From sampled token ids to a completion, for every engine that has a tokenizer."""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.generation.types import Completion


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> list[int]:
    """Ids of the tokens that end a completion: the tokenizer's end of sequence and the generation config's."""
    configured = getattr(generation_config, "eos_token_id", None)
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    return sorted(token for token in ids if token is not None)


def to_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    sampled: Sequence[int],
    stops: Collection[int],
    logprobs: Sequence[float] | None,
) -> Completion:
    """The completion of ``prompt`` (token ids): ``sampled`` up to and including the first of ``stops``."""
    end = next((k + 1 for k, token in enumerate(sampled) if token in stops), None)
    tokens = list(sampled[:end])
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens, skip_special_tokens=True)
    kept = None if logprobs is None else list(logprobs[: len(tokens)])
    return Completion(text, tokens, "length" if end is None else "stop", kept)
