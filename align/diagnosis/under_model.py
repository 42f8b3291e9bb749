"""What a model makes of pairs before training: how far they are from what it would write, and what a step would do."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from align.data.sampling import fair_sample
from align.data.splits import clusters_of
from align.entanglement.measure_pairs import measure_entanglement
from align.losses.registry import BoundLoss
from align.models.batching import token_batches
from align.models.layout import base_model
from align.models.logps import add_completion_head, pair_logps
from align.models.tokenization import collate, encode_table
from align.stats import mean_interval, share_interval

SAMPLE = 200
"""Pairs whose log-probs are computed."""
MEASURED = 32
"""Pairs whose gradients are measured."""
NEVER = 1e-4
"""Probability below which the model would practically not write a token."""
BATCH_TOKENS = 4096


def token_lengths(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Tokens of the pairs of a fair sample, and what truncation to ``max_length`` takes from them."""
    tokens = _sample(pairs, tokenizer, 10 * SAMPLE)
    prompt, chosen, rejected = (np.array([len(ids) for ids in tokens[f"{side}_ids"]]) for side in
                                ("prompt", "chosen", "rejected"))  # fmt: skip
    both = prompt + np.maximum(chosen, rejected)
    return {
        "median": float(np.median(both)),
        "p99": float(np.quantile(both, 0.99)),
        "longest": int(both.max()),
        "per_pair": float((2 * prompt + chosen + rejected).mean()),
        "max_length": max_length,
        "truncated": share_interval((both > max_length).astype(float)).to_dict(),
        "without_response": share_interval((prompt >= max_length).astype(float)).to_dict(),
    }


def off_policy(pairs: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
    """Log-prob per token (nats) of the responses under the model, and the share of tokens that it would not write.

    Args:
        pairs: pair table with ``id``; a fair sample of ``SAMPLE`` is read.
        model: causal language model in evaluation mode.
        tokenizer: the model's.
        max_length: tokens of prompt and response together; longer pairs are left out.

    Returns:
        ``chosen`` and ``rejected``, each with ``logp_per_token`` and ``never`` (share of tokens of probability below
        1e-4) as means over pairs with intervals; ``difference`` of the two log-probs; ``preferred``, the share of pairs
        whose chosen response the model already finds likelier per token; ``pairs``; ``groups``, ``chosen`` by group.
    """
    tokens = _sample(pairs, tokenizer, SAMPLE)
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in tokens]
    tokens = tokens.select([k for k, length in enumerate(lengths) if length <= max_length])
    if not len(tokens):
        return {"pairs": 0}
    add_completion_head(base_model(model))
    device = next(model.parameters()).device
    logp, never = np.zeros((2, len(tokens))), np.zeros((2, len(tokens)))
    widths = [2 * length for length in lengths if length <= max_length]
    with torch.inference_mode():
        for rows in token_batches(widths, BATCH_TOKENS):
            batch = collate([tokens[k] for k in rows], tokenizer.pad_token_id, max_length=max_length)
            batch = {name: value.to(device) for name, value in batch.items()}
            scores = pair_logps(model, batch, "concatenated", metrics=False).tokens.logps.float()
            scored = batch["completion_mask"][:, 1:].bool()
            count = scored.sum(dim=1)
            mean = (scores * scored).sum(dim=1) / count
            rare = ((scores < np.log(NEVER)) & scored).sum(dim=1) / count
            logp[:, rows] = mean.view(2, -1).cpu().numpy()
            never[:, rows] = rare.view(2, -1).cpu().numpy()
    clusters = clusters_of(tokens)
    found: dict[str, Any] = {"pairs": len(tokens)}
    for k, side in enumerate(("chosen", "rejected")):
        found[side] = {
            "logp_per_token": mean_interval(logp[k], clusters=clusters).to_dict(),
            "never": mean_interval(never[k], clusters=clusters).to_dict(),
        }
    found["difference"] = mean_interval(logp[0] - logp[1], clusters=clusters).to_dict()
    found["preferred"] = share_interval((logp[0] > logp[1]).astype(float), clusters=clusters).to_dict()
    found["groups"] = {}
    if "group" in tokens.column_names:
        names = np.array([str(name) for name in tokens["group"]])
        found["groups"] = {str(name): float(logp[0][names == name].mean()) for name in np.unique(names)}
    return found


def entanglement_risk(
    pairs: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerBase, loss: BoundLoss, max_length: int
) -> dict[str, Any]:
    """Share of ``MEASURED`` pairs whose chosen response the first step of the loss would lower, with its interval."""
    places, _ = fair_sample((str(name) for name in pairs["id"]), MEASURED)
    found = measure_entanglement(model, tokenizer, pairs.select(places), loss=loss, max_length=max_length)
    falls = np.array([change < 0 for change in found["step_chosen"]], dtype=float)
    cosine = np.array(found["cosine"], dtype=np.float64)
    return {
        "pairs": len(found),
        "loss": loss.spec.name,
        "chosen_falls": share_interval(falls).to_dict(),
        "cosine": mean_interval(cosine).to_dict(),
        "ids": [str(one["id"]) for one in found if one["step_chosen"] < 0][:5],
    }


def _sample(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, count: int) -> Dataset:
    places, _ = fair_sample((str(name) for name in pairs["id"]), count)
    return encode_table(pairs.select(places), tokenizer)
