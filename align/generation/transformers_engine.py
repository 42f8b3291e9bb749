"""Sampling with transformers, for machines without vLLM."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from align.generation.encoding import stop_ids, stopped_rows, to_completion
from align.generation.sampler import DrawnToken
from align.generation.types import Completion, Engine, Sampling, prompt_keys, sample_seed
from align.io.console import log
from align.models.layout import base_model
from align.models.loading import place
from align.models.positions import check_positions, context_window
from align.models.tokenization import encode_prompt, pad

TRIAL_LENGTHS = (3, 20)
TRIAL_STEPS = 3
"""Tokens that a trial completes: the first follows the prompt, the others what the cache holds of it."""
TRIAL_TOKENS = 10
"""Most probable tokens whose log-probs a trial compares."""
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of a log-prob (nats) between a batch and a row alone due to rounding."""
HALF_PADDING_TOLERANCE = 0.5
"""The same for 16-bit models: a few units in the last place of a logit of 20."""


class TransformersEngine(Engine):
    """Sample in batches of prompts sorted by length and padded on the left.

    On one machine the same model, prompt and seed give the same completion, whatever the batch size and the other
    prompts: every sample has its own random numbers, and a draw that rounding could change is made on logits computed
    without the batch (align/generation/sampler.py; in half precision this is likely but not certain). Only the
    end-of-sequence tokens of the model's generation config are used. A completion ends where the model's window does
    (``context_window``); a prompt that fills it is left out, with its key in the log.

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
        self._ignores_padding: bool | None = None
        """Whether padding on the left changes nothing; None before a batch needs it."""
        self._shares_prompts: bool | None = None
        """Whether several samples of a prompt continue one pass over it; None before a batch could."""

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; see ``encode_prompt``."""
        return encode_prompt(prompt, self.tokenizer)

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its completions) as batches finish; see ``Engine``."""
        keys = prompt_keys(prompts) if keys is None else keys
        ids = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        rooms = self._rooms(ids, sampling.max_new_tokens)
        for k in (k for k, room in enumerate(rooms) if room < 1):
            log.warning("prompt %s is left out: found %d tokens, expected less than the %s of the model's window",
                        keys[k], len(ids[k]), context_window(base_model(self.model)))  # fmt: skip
            yield k, []
        longest_first = sorted((k for k, room in enumerate(rooms) if room > 0), key=lambda k: -len(ids[k]))
        size = self._batch_size([ids[k] for k in longest_first])
        jobs = [(k, sample) for k in longest_first for sample in range(sampling.n)]
        found: dict[int, list[Completion]] = {}
        for batch in _batches(jobs, rooms, size):
            seeds = [sample_seed(sampling.seed, keys[k], sample) for k, sample in batch]
            fitting = replace(sampling, max_new_tokens=rooms[batch[0][0]])
            completions = self._sample([ids[k] for k, _ in batch], seeds, fitting)
            for (k, _), completion in zip(batch, completions, strict=True):
                found.setdefault(k, []).append(completion)
                if len(found[k]) == sampling.n:
                    yield k, found.pop(k)

    def _rooms(self, ids: list[list[int]], wanted: int) -> list[int]:
        """Tokens that may be sampled after each prompt: ``wanted``, or what the model's window leaves."""
        window = context_window(base_model(self.model))
        rooms = [wanted if window is None else min(wanted, window - len(row)) for row in ids]
        longest = max((len(row) + room for row, room in zip(ids, rooms, strict=True) if room > 0), default=0)
        check_positions(base_model(self.model), longest, "the longest prompt with its new tokens", "shorten the prompt")
        return rooms

    def _batch_size(self, rows: list[list[int]]) -> int:
        """Rows per forward pass: 1 if these rows must be padded and the model does not ignore padding."""
        if self.batch_size == 1 or len({len(row) for row in rows}) < 2:
            return self.batch_size
        if self._ignores_padding is None:
            difference = self.padding_difference()
            self._ignores_padding = difference <= PADDING_TOLERANCE.get(self.model.dtype, HALF_PADDING_TOLERANCE)
            if not self._ignores_padding:
                log.warning("%s: in a trial its log-probs in a padded batch differ by %.2g nats from those of a row "
                            "alone, so prompts are completed one at a time", type(base_model(self.model)).__name__,
                            difference)  # fmt: skip
        return self.batch_size if self._ignores_padding else 1

    def padding_difference(self) -> float:
        """Largest difference (nats) of a token's log-prob between a batch padded on the left and its rows alone."""
        rows, logprobs = self._trial()
        return _apart(logprobs(rows), torch.cat([logprobs([row]) for row in rows]))

    def sharing_difference(self) -> float:
        """Largest difference (nats) of a token's log-prob after a pass over a prompt that two rows share from that
        after a pass of each row; infinite for a model whose cache cannot be copied.
        """
        rows, logprobs = self._trial()
        twice = [rows[1], rows[1]] if self.batch_size < len(rows) + 1 else [rows[0], rows[1], rows[0]]
        try:
            return _apart(logprobs(twice, shared=True), logprobs(twice))
        except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return torch.inf

    def _trial(self) -> tuple[list[list[int]], Callable[..., torch.Tensor]]:
        """Two rows of random tokens, and what gives the log-probs [B, steps, V] of rows that are completed by the same
        random tokens.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = min(base_model(self.model).get_input_embeddings().weight.shape[0], len(self.tokenizer))
        room = (context_window(base_model(self.model)) or max(TRIAL_LENGTHS) + TRIAL_STEPS) - TRIAL_STEPS
        lengths = [max(1, min(length, room)) for length in TRIAL_LENGTHS]
        rows = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
        forced = torch.randint(vocabulary, (TRIAL_STEPS,), generator=generator).to(self.model.device)

        def logprobs(batch: list[list[int]], *, shared: bool = False) -> torch.Tensor:
            choice = _Forced(forced)
            self._generate(batch, choice, TRIAL_STEPS, stops=[], shared=shared)
            return torch.stack(choice.logprobs, dim=1)

        return rows, logprobs

    def _sample(self, rows: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        width = max(len(row) for row in rows)
        starts = [width - len(row) for row in rows]
        choice = DrawnToken(sampling, seeds, starts, self.stops, self._alone, self.model.device)
        criteria = [_StopTexts(self.tokenizer, rows, sampling.stop)] if sampling.stop else []
        shared = self._may_share(rows)
        output = self._generate(rows, choice, sampling.max_new_tokens, self.stops, criteria, shared=shared)
        logprobs = torch.stack(choice.logprobs, dim=1).tolist() if sampling.logprobs else [None] * len(rows)
        return [
            to_completion(self.tokenizer, row, out[width:].tolist(), self.stops, logps, sampling.stop)
            for row, out, logps in zip(rows, output, logprobs, strict=True)
        ]

    def _generate(
        self, rows: list[list[int]], choice: LogitsProcessor, new: int, stops: list[int],
        criteria: Sequence[StoppingCriteria] = (), *, shared: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Token ids of the rows, padded on the left, and of up to ``new`` tokens that ``choice`` draws.

        ``shared``: equal rows continue one pass over their tokens but the last.
        """
        token = self.tokenizer.pad_token_id
        ids, mask = (part.to(self.model.device) for part in pad(rows, token, left=True))
        with torch.inference_mode(), _empty_generation_config(self.model):
            output: torch.Tensor = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([choice]),
                stopping_criteria=StoppingCriteriaList(criteria),
                generation_config=GenerationConfig(
                    max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=token
                ),
                **({"past_key_values": self._read_once(ids, mask)} if shared else {}),
            )
        return output

    def _read_once(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """The cache of all tokens but the last of each row, after one pass over the different rows."""
        _, places = torch.unique(torch.cat([ids, mask], dim=1), dim=0, return_inverse=True)
        count = int(places.max()) + 1
        firsts = torch.full((count,), len(ids), device=ids.device)
        firsts.scatter_reduce_(0, places, torch.arange(len(ids), device=ids.device), "amin")
        output = self.model.generate(
            input_ids=ids[firsts, :-1],
            attention_mask=mask[firsts, :-1],
            generation_config=GenerationConfig(
                max_new_tokens=1, do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
            ),
        )  # fmt: skip
        cache = output.past_key_values
        cache.batch_select_indices(places)
        return cache

    def _may_share(self, rows: list[list[int]]) -> bool:
        """Whether the rows repeat, and a trial has shown that this model can continue one pass over a prompt."""
        if len({tuple(row) for row in rows}) == len(rows) or max(map(len, rows)) < 2:
            return False
        if self._shares_prompts is None:
            difference = self.sharing_difference()
            self._shares_prompts = difference <= PADDING_TOLERANCE.get(self.model.dtype, HALF_PADDING_TOLERANCE)
            if not self._shares_prompts:
                log.info("%s: each sample of a prompt reads the prompt again; in a trial its log-probs after a shared "
                         "pass differ by %.2g nats", type(base_model(self.model)).__name__, difference)  # fmt: skip
        return self._shares_prompts

    def _alone(self, row: torch.Tensor) -> torch.Tensor:
        """Logits [V] after one row of token ids, computed without the other rows."""
        ids = row[None]
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of the log-probs of the ``TRIAL_TOKENS`` that are expected to be the most probable; NaN is
    infinite.
    """
    top = expected.topk(min(TRIAL_TOKENS, expected.shape[-1])).indices
    return float(torch.nan_to_num((found - expected).abs().gather(-1, top), nan=torch.inf).max())


def _batches(jobs: list[tuple[int, int]], rooms: list[int], size: int) -> Iterator[list[tuple[int, int]]]:
    """Up to ``size`` jobs (prompt, sample) at a time, whose prompts have the same room; keeps their order."""
    for _, same in groupby(jobs, key=lambda job: rooms[job[0]]):
        while batch := list(islice(same, size)):
            yield batch


class _StopTexts(StoppingCriteria):
    """Ends a row whose completion holds one of the texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], texts: Sequence[str]) -> None:
        self.tokenizer, self.rows, self.texts = tokenizer, rows, texts
        self.width = max(len(row) for row in rows)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        found = stopped_rows(self.tokenizer, self.rows, input_ids[:, self.width :].tolist(), self.texts)
        return torch.tensor(found, device=input_ids.device)


class _Forced(LogitsProcessor):
    """Draws given tokens and keeps the log-probs of all, [B, V] for each step."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        """[steps]"""
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.tokens[len(self.logprobs)]
        self.logprobs.append(torch.log_softmax(scores.float(), dim=-1))
        return torch.full_like(scores, -torch.inf).index_fill(1, token, 0.0)


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
