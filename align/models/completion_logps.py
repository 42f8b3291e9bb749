"""Log-probs of sampled completions, used to estimate KL(policy || reference).

For completions y sampled from the policy, the mean of log policy(y) - log reference(y) is an unbiased estimate of the
KL divergence per completion, in nats. At a sampling temperature T other than 1, the policy's log-probs are those of
softmax(logits / T), the distribution that was sampled from; the reference stays at temperature 1.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from align.io.console import progress
from align.models.batching import token_batches
from align.models.exact_kl import ReferenceStates, frozen_head
from align.models.layout import base_model
from align.models.lm_head import LogitForm
from align.models.logps import Scored, add_completion_head
from align.models.tokenization import pad


def completion_logps(
    model: torch.nn.Module,
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    batch_tokens: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> np.ndarray:
    """Log-prob (nats) of each completion given its prompt, summed over its tokens, float64 [N].

    Args:
        model: causal language model, with its adapter if it has one.
        prompt_ids: N prompts of at least one token.
        completion_ids: N completions; an empty one has log-prob 0.
        batch_tokens: padded tokens per forward pass.
        pad_token_id: token for right padding.
        temperature: sampling temperature; at 0 (greedy) every completion has probability 1.
    """
    if temperature == 0:
        return np.zeros(len(prompt_ids))
    add_completion_head(base_model(model))
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    device = next(model.parameters()).device
    sums = np.zeros(len(rows))
    batches = token_batches([len(row) for row in rows], batch_tokens)
    with torch.inference_mode():
        for batch in progress(batches, what="log-probs", total=len(batches), unit="batches"):
            ids, mask = (part.to(device) for part in pad([rows[k] for k in batch], pad_token_id))
            width = ids.shape[1]
            spans = [(row * width + len(prompt_ids[k]), len(completion_ids[k])) for row, k in enumerate(batch)]
            ends = torch.cat([torch.arange(first, first + length) for first, length in spans]).to(device)
            scored = Scored(ends - 1, ids.flatten()[ends], width, temperature, metrics=False)
            logps = model(input_ids=ids, attention_mask=mask, use_cache=False, scored=scored).logps.double().cpu()
            sums[batch] = [part.sum().item() for part in logps.split([length for _, length in spans])]
    return sums


def completion_kl(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager[nn.Module]],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    *,
    batch_tokens: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> np.ndarray:
    """Exact KL(policy || reference) of the next token, summed over each completion's tokens, nats, float64 [N].

    Over completions that were sampled from the policy its mean estimates the KL divergence per completion; see
    ``align.models.exact_kl``. The reference runs over all completions first and its states [tokens, D] stay in memory,
    so both may be one model whose adapter is switched, and a reference that is loaded for it is loaded once.

    Args:
        policy: causal language model, with its adapter if it has one.
        reference: makes a block within which the reference runs.
        prompt_ids: N prompts of at least one token.
        completion_ids: N completions; an empty one has KL 0.
        batch_tokens: padded tokens per forward pass.
        pad_token_id: token for right padding.
        temperature: sampling temperature of the policy, above 0; the reference stays at 1.
    """
    add_completion_head(base_model(policy))
    rows = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    device = next(policy.parameters()).device
    sums = np.zeros(len(rows))
    batches = token_batches([len(row) for row in rows], batch_tokens)
    found: list[ReferenceStates] = []
    passes = []
    for batch in batches:
        ids, mask = (part.to(device) for part in pad([rows[k] for k in batch], pad_token_id))
        width = ids.shape[1]
        spans = [(row * width + len(prompt_ids[k]), len(completion_ids[k])) for row, k in enumerate(batch)]
        ends = torch.cat([torch.arange(first, first + length) for first, length in spans]).to(device)
        passes.append((ids, mask, ends, width, [length for _, length in spans]))
    with torch.no_grad(), reference() as model:
        base = base_model(model)
        add_completion_head(base)
        head = base.get_output_embeddings()
        if type(head) is not nn.Linear:  # an adapter is part of it, and will be switched
            head = frozen_head(head, base.config.get_text_config().hidden_size)
        for ids, mask, ends, width, _ in passes:
            scored = Scored(ends - 1, ids.flatten()[ends], width, metrics=False, keep_states=True)
            states = model(input_ids=ids, attention_mask=mask, use_cache=False, scored=scored).states
            found.append(ReferenceStates(states, head, LogitForm.of(base.config)))
    with torch.no_grad():
        for batch, (ids, mask, ends, width, lengths), states in zip(batches, passes, found, strict=True):
            scored = Scored(ends - 1, ids.flatten()[ends], width, temperature, metrics=False, reference=states)
            kl = policy(input_ids=ids, attention_mask=mask, use_cache=False, scored=scored).kl.double().cpu()
            sums[batch] = [part.sum().item() for part in kl.split(lengths)]
    return sums
