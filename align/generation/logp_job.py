"""The job that scores completions which were sampled before: log-probs and KL under policy and reference."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from align.errors import ModelError
from align.generation.sampling_job import KL_BATCH_TOKENS
from align.generation.types import Sampling
from align.sharding.jobs import Work


@dataclass(frozen=True, slots=True)
class LogpJob:
    """Log-probs and KL of the completions (``token_ids``) of a shard: the policy as it was sampled, the reference.

    Result: ``logp_policy``, ``logp_reference`` and ``kl``; see ``align.models.sample_kl.SampleScores``.
    """

    policy: str
    reference: str
    sampling: Sampling
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``from_pretrained`` for both; float32 by default."""

    def start(self) -> Work:
        """Load both models.

        Raises:
            ModelError: a model cannot be loaded, or the two do not share a vocabulary.
        """
        import torch

        from align.models.loading import load_policy, load_tokenizer, place
        from align.models.sample_kl import score_samples
        from align.models.tokenization import encode_prompt

        trusted = bool(self.options.get("trust_remote_code", False))
        tokenizer = load_tokenizer(self.policy, trust_remote_code=trusted)
        if tokenizer.get_vocab() != load_tokenizer(self.reference, trust_remote_code=trusted).get_vocab():
            raise ModelError(
                f"{self.policy} and {self.reference}: found two vocabularies, expected one",
                code="eval-tokenizer",
                hint="give the reference that the policy was trained from",
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"dtype": "float32"} | dict(self.options)
        policy = place(load_policy(self.policy, **options), device).eval()
        reference = policy
        if self.reference != self.policy:
            reference = place(load_policy(self.reference, **options), device).eval()

        def work(rows: Dataset) -> Dataset:
            ids = [encode_prompt(json.loads(prompt), tokenizer) for prompt in rows["prompt"]]
            found = score_samples(
                policy, reference, ids, rows["token_ids"][:], batch_tokens=KL_BATCH_TOKENS,
                pad_token_id=tokenizer.pad_token_id, temperature=self.sampling.temperature,
                truncation=self.sampling.truncation,
            )  # fmt: skip
            return Dataset.from_dict(found._asdict())

        return work
