"""KL(policy || reference) of sampled completions: exact for each next token, from the passes that give the log-probs.

The policy here is what the completions were drawn from: softmax(logits / temperature), cut by min-p, top-k and top-p
and renormalized, up to the limit of tokens; the reference is the model itself, at temperature 1 and without a cut.
Write y for a completion with the tokens y_1 .. y_T. Two estimates of the KL divergence per completion, in nats:

    exact       sum over t of KL(policy(. | prompt, y_<t) || reference(. | prompt, y_<t))
    one-sample  log policy(y) - log reference(y)

Both have the divergence as their mean over completions drawn from the policy. The exact one is the conditional mean of
the other, token by token: it has no noise from the tokens drawn, and is never negative (arXiv 2504.10637).

Legend: M scored positions, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from align.io.console import progress
from align.models.batching import token_batches
from align.models.layout import base_model
from align.models.lm_head import LogitForm, chunk_rows
from align.models.logps import Scored, add_completion_head
from align.models.tokenization import pad
from align.models.truncation import Truncation, sampled_logps


class SampleScores(NamedTuple):
    """Scores of N completions, float64 [N] each, in nats."""

    logp_policy: np.ndarray
    """log policy(y) of the policy as it was sampled; 0 for greedy decoding."""
    logp_reference: np.ndarray
    """log reference(y)."""
    kl: np.ndarray
    """The exact estimate; at least 0."""

    @property
    def log_ratios(self) -> np.ndarray:
        """The one-sample estimate."""
        return self.logp_policy - self.logp_reference


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states."""

    head: nn.Module
    form: LogitForm

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a causal language model, with its adapter if it has one."""
        base = base_model(model)
        return cls(base.get_output_embeddings(), LogitForm.of(base.config))

    def logits(self, states: Tensor) -> Tensor:
        """Logits [M, V], float32 or wider, of hidden states [M, D]."""
        return self.form.apply(self.head(states))


@torch.inference_mode()
def score_samples(
    policy: nn.Module,
    reference: nn.Module,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    batch_tokens: int,
    pad_token_id: int,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
) -> SampleScores:
    """Log-probs of completions under policy and reference, and the exact KL along them, from one pass of each model.

    Given responses that the policy did not write may be scored as well; their ``kl`` then says how far the policy has
    moved along them, and estimates no divergence of whole completions.

    Args:
        policy: causal language model, with its adapter if it has one.
        reference: the same; if it is the ``policy`` itself, it is not run again.
        prompt_ids: N prompts of at least one token.
        completion_ids: N completions; the scores of an empty one are 0.
        batch_tokens: padded tokens per forward pass.
        pad_token_id: token for right padding.
        temperature: that the completions were sampled at; 0 is greedy, where the policy is a point mass.
        truncation: the cuts that they were sampled under; None: none.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    models = [policy] if reference is policy else [policy, reference]
    for model in models:
        add_completion_head(base_model(model))
    cuts = Truncation() if truncation is None else truncation
    device = next(policy.parameters()).device
    sums = np.zeros((3, len(rows)))
    batches = token_batches([len(row) for row in rows], batch_tokens)
    for batch in progress(batches, what="KL", total=len(batches), unit="batches"):
        ids, mask = (part.to(device) for part in pad([rows[k] for k in batch], pad_token_id))
        spans = [(row * ids.shape[1] + len(prompt_ids[k]), len(completion_ids[k])) for row, k in enumerate(batch)]
        ends = torch.cat([torch.arange(first, first + length) for first, length in spans]).to(device)
        states = [_states(model, ids, mask, ends - 1) for model in models]
        heads = [Head.of(model) for model in models]
        found = _token_scores(states, heads, ids.flatten()[ends], temperature, cuts)
        parts = found.double().cpu().split([length for _, length in spans], dim=1)
        sums[:, batch] = torch.stack([part.sum(dim=1) for part in parts], dim=1).numpy()
    return SampleScores(*sums)


def _token_scores(
    states: list[Tensor], heads: list[Head], targets: Tensor, temperature: float, truncation: Truncation
) -> Tensor:
    """log policy, log reference and KL at each position, [3, M], for the states of the policy and of the reference."""
    size = chunk_rows(max(parameter.shape[0] for parameter in heads[0].head.parameters()), targets.device)
    found = [targets.new_zeros((3, 0), dtype=torch.float32)]
    for start in range(0, len(targets), size):
        chunk = slice(start, start + size)
        logits = [head.logits(part[chunk]) for head, part in zip(heads, states, strict=True)]
        width = min(part.shape[1] for part in logits)  # one vocabulary may be padded to a round number of rows
        raw, of_reference = logits[0][:, :width], logits[-1][:, :width].log_softmax(dim=-1)
        found.append(_scores(raw, of_reference, targets[chunk], temperature, truncation))
    return torch.cat(found, dim=1)


def _scores(logits: Tensor, reference: Tensor, targets: Tensor, temperature: float, truncation: Truncation) -> Tensor:
    """See ``_token_scores``: logits [M, V] of the policy, log-probs [M, V] of the reference."""
    drawn = targets[:, None]
    one = reference.gather(1, drawn)[:, 0]
    if temperature == 0:
        return torch.stack([torch.zeros_like(one), one, -one])
    logps = sampled_logps(logits / temperature, truncation, targets)
    terms = torch.where(logps > -torch.inf, logps.exp() * (logps - reference), 0.0)
    return torch.stack([logps.gather(1, drawn)[:, 0], one, terms.sum(dim=-1).clamp_min(0)])


def _states(model: nn.Module, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """Last hidden states [M, D] at ``places``, int64 [M], of the flattened ``ids``; no logits are computed."""
    none = places[:0]
    with _last_hidden(model) as kept:
        model(input_ids=ids, attention_mask=mask, use_cache=False, scored=Scored(none, none, ids.shape[1]))
    hidden: Tensor = kept[0][:, -ids.shape[1] :]  # an adapter may put virtual tokens first
    return hidden.flatten(0, 1).index_select(0, places)


@contextmanager
def _last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Keep the last hidden states of every pass of the model within the block."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        kept.append(output.last_hidden_state)

    handle = base_model(model).base_model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
