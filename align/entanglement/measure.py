"""The job of `align entangle`: a shard of tokenized pairs -> a row of measurements for each (measure_pairs.py)."""

from dataclasses import dataclass

from torch import nn

from align.distributed import local_device
from align.entanglement.measure_pairs import PairMeasurement
from align.entanglement.products import GradientProducts
from align.losses.registry import BoundLoss
from align.models.adapter_folders import adapter_start
from align.models.loading import load_policy, load_tokenizer, place
from align.sharding.jobs import Work

SHARD = 32
"""Pairs of a shard: the most that a stopped measurement loses, and what a process or a worker gets at a time."""


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """One row per pair: gradient products, the loss's weights, first-order changes, the verdict, screening scores."""

    model: str
    """Policy; its trained parameters are measured."""
    reference: str | None
    """Reference model; None: what an adapter was trained from (``adapter_start``), or the policy itself without one;
    the same as ``model``: the policy itself, with its adapter."""
    loss: BoundLoss
    """A loss of the log-probs of one pair (``from_logps``)."""
    parameters: str | None
    """See ``GradientProducts``."""
    batch_tokens: int
    """Padded tokens of a batch."""
    max_length: int
    """Tokens of prompt and response together."""

    def start(self) -> Work:
        """Load the models; the work takes tokenized pairs, with ``margin`` where the loss needs one."""
        return measuring(load_measured(self.model), self)


def measuring(policy: nn.Module, job: MeasureJob) -> Work:
    """The work of ``job`` with a policy that is loaded already."""
    products = GradientProducts(policy, job.parameters)
    itself = job.reference == job.model
    reference = None if itself else load_reference(job.model, job.reference)
    padding = load_tokenizer(job.model).pad_token_id
    return PairMeasurement(products, job.loss, padding, reference, job.batch_tokens, job.max_length, itself)


def load_measured(model: str) -> nn.Module:
    """A policy in float32 on this process's device, an adapter's parameters trainable."""
    policy: nn.Module = place(load_policy(model, trainable=True, dtype="float32"), local_device())
    return policy.eval()


def load_reference(model: str, given: str | None = None) -> nn.Module | None:
    """The reference of the policy in ``model``: the given one, or what its adapter was trained from.

    None: the policy with its adapter off, or the policy itself.
    """
    start = given or adapter_start(model)
    return None if start is None else place(load_policy(start, dtype="float32"), local_device()).eval()
