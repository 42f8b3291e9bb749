"""Generation with transformers: for machines without vLLM."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.console import progress
from align.errors import ModelError
from align.generation.base import Completion, Sampling


class TransformersEngine:
    """Batched sampling, prompts sorted by length and padded left.

    The same model, prompts, batch size and seed give the same completions; another batch size gives others.

    Args:
        model: causal language model, or one with an adapter.
        tokenizer: its tokenizer, with a padding token.
        batch_size: rows per forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt: text as it is, messages through the chat template with the generation prompt.

        Raises:
            ModelError: messages, and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.tokenizer.name_or_path}: no chat template, and a prompt is a list of messages",
                code="no-chat-template",
                hint="use a model with a chat template, or plain-text prompts",
            )
        encoded = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def generate(self, prompts: Sequence[Any], sampling: Sampling) -> list[list[Completion]]:
        """``sampling.n`` completions of each prompt, in the order of the prompts."""
        ids = [self.encode(prompt) for prompt in prompts]
        jobs = [(len(ids[k]), k) for k in range(len(ids)) for _ in range(sampling.n)]
        jobs.sort(reverse=True)
        batches = [jobs[start : start + self.batch_size] for start in range(0, len(jobs), self.batch_size)]
        found: list[list[Completion]] = [[] for _ in prompts]
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(sampling.seed)
            for batch in progress(batches, what="generating", total=len(batches), unit="batches"):
                indices = [k for _, k in batch]
                for k, completion in zip(indices, self._sample([ids[k] for k in indices], sampling), strict=True):
                    found[k].append(completion)
        return found

    def _sample(self, rows: list[list[int]], sampling: Sampling) -> list[Completion]:
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        greedy = sampling.temperature == 0
        chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_new_tokens,
                do_sample=not greedy,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=pad,
                **chosen,
            )
        return [self._completion(row, out[width:].tolist()) for row, out in zip(rows, output, strict=True)]

    def _completion(self, prompt: list[int], sampled: list[int]) -> Completion:
        eos = self.tokenizer.eos_token_id
        stopped = eos in sampled
        tokens = sampled[: sampled.index(eos) + 1] if stopped else sampled
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        whole = self.tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
        text = (
            whole[len(before) :]
            if whole.startswith(before)
            else self.tokenizer.decode(tokens, skip_special_tokens=True)
        )
        return Completion(text, tokens, "stop" if stopped else "length")
