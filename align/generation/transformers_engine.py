"""Sampling with transformers, for machines without vLLM."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from align.generation.encoding import stop_ids, to_completion
from align.generation.sampler import DrawnToken
from align.generation.types import Completion, Engine, Sampling, prompt_keys, sample_seed
from align.models.layout import base_model
from align.models.loading import place
from align.models.positions import check_positions
from align.models.tokenization import encode_prompt


class TransformersEngine(Engine):
    """Sample in batches of prompts sorted by length and padded on the left.

    On one machine the same model, prompt and seed give the same completion, whatever the batch size and the other
    prompts: every sample has its own random numbers, and a draw that rounding could change is made on logits computed
    without the batch (align/generation/sampler.py; in half precision this is likely but not certain). Only the
    end-of-sequence tokens of the model's generation config are used.

    Args:
        model: causal language model, or one with an adapter.
        tokenizer: its tokenizer, with a padding token.
        batch_size: rows per forward pass.
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = place(model, device).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.stops = stop_ids(tokenizer, model.generation_config)

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; see ``encode_prompt``."""
        return encode_prompt(prompt, self.tokenizer)

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its completions) as batches finish; see ``Engine``."""
        keys = prompt_keys(prompts) if keys is None else keys
        ids = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        self._check_positions(ids, keys, sampling.max_new_tokens)
        longest_first = sorted(range(len(ids)), key=lambda k: -len(ids[k]))
        jobs = [(k, sample) for k in longest_first for sample in range(sampling.n)]
        found: dict[int, list[Completion]] = {}
        for start in range(0, len(jobs), self.batch_size):
            batch = jobs[start : start + self.batch_size]
            seeds = [sample_seed(sampling.seed, keys[k], sample) for k, sample in batch]
            completions = self._sample([ids[k] for k, _ in batch], seeds, sampling)
            for (k, _), completion in zip(batch, completions, strict=True):
                found.setdefault(k, []).append(completion)
                if len(found[k]) == sampling.n:
                    yield k, found.pop(k)

    def _check_positions(self, ids: list[list[int]], keys: Sequence[str], new: int) -> None:
        """Refuse prompts that leave no position for the new tokens, before anything is sampled."""
        longest = max(range(len(ids)), key=lambda k: len(ids[k]), default=None)
        if longest is not None:
            check_positions(
                base_model(self.model), len(ids[longest]) + new, f"prompt {keys[longest][:80]!r} with {new} new tokens",
                "shorten the prompt, or lower max_new_tokens",
            )  # fmt: skip

    def _sample(self, rows: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        starts = [width - len(row) for row in rows]
        input_ids = torch.tensor([[pad] * start + row for start, row in zip(starts, rows, strict=True)], device=device)
        mask = torch.tensor([[0] * start + [1] * (width - start) for start in starts], device=device)
        choice = DrawnToken(sampling, seeds, starts, self.stops, self._alone, device)
        with torch.inference_mode(), _empty_generation_config(self.model):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([choice]),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.stops or None,
                    pad_token_id=pad,
                ),
            )
        logprobs = torch.stack(choice.logprobs, dim=1).tolist() if sampling.logprobs else [None] * len(rows)
        return [
            to_completion(self.tokenizer, row, out[width:].tolist(), self.stops, logps)
            for row, out, logps in zip(rows, output, logprobs, strict=True)
        ]

    def _alone(self, row: torch.Tensor) -> torch.Tensor:
        """Logits [V] after one row of token ids, computed without the other rows."""
        ids = row[None]
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


@contextmanager
def _empty_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Give the model, and the base model of an adapter, an empty generation config; restore theirs at the end.

    ``generate`` fills missing fields of the config that it is given from the model's own.
    """
    holders = [model, base_model(model)]
    configs = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, config in zip(holders, configs, strict=True):
            holder.generation_config = config
