"""Held-out pairs that are trained on as well."""

from typing import Any

import numpy as np
from datasets import Dataset

from align.data.text import plain, text_key
from align.data.training_pairs import pair_digests, record_of


def trained_on(held_out: Dataset, trained: Dataset) -> np.ndarray:
    """Whether each held-out pair is among those that are trained on, bool [N].

    It is if one of its responses is trained on after the same prompt, chosen or rejected, whatever their case, white
    space and Unicode form; or if a pair of its id has its prompt. Equal ids of different prompts are two numberings.
    """
    by_text = np.isin(pair_digests(held_out), record_of(trained)).any(axis=1)
    named = dict(zip(trained["id"], map(_key, trained["prompt"]), strict=True))
    pairs = zip(held_out["id"], map(_key, held_out["prompt"]), strict=True)
    by_id = [named.get(name) == prompt for name, prompt in pairs]
    return np.logical_or(by_text, np.array(by_id, dtype=bool))


def shares_prompt(held_out: Dataset, trained: Dataset) -> np.ndarray:
    """Whether the prompt of each held-out pair is one of those that are trained on, bool [N]."""
    known = set(map(_key, trained["prompt"]))
    return np.array([_key(prompt) in known for prompt in held_out["prompt"]], dtype=bool)


def _key(prompt: Any) -> bytes:
    """Equal for copies of a prompt, whatever their case, white space, Unicode form, or whether they are messages."""
    return text_key(plain(prompt))
