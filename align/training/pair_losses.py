"""What the loss of a pair needs beyond its log-probs: statistics over the step, and scores token by token."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from align.losses.pairwise import PairLogps
from align.losses.spec import BoundLoss
from align.losses.token_losses import PairTokens
from align.models.collator import REAL, ROW, only_real
from align.models.logps import SequenceLogps
from align.training.metrics import own_weight
from align.training.token_mask import TokenMask

ForwardPass = tuple[PairLogps, Mapping[str, Any]]
"""The log-probs of the pairs of one forward pass, and its batch."""


class PairLosses:
    """Computes the loss of each pair of a forward pass.

    Args:
        loss: the loss of the training.
        token_mask: a learned mask over the tokens that the loss sees, or None.
        run_reference: computes the scores of a batch under the reference.
        noted: name -> values to log, to which this object adds.
        vocabulary: entries of the vocabulary.
        gather: concatenates a tensor over processes along its first dimension (all_gather).
        rank: index of this process.
        seed: seed of draws, the same on every process.
    """

    def __init__(
        self,
        loss: BoundLoss,
        token_mask: TokenMask | None,
        run_reference: Callable[[dict[str, Any]], SequenceLogps],
        noted: Mapping[str, list[Tensor]],
        *,
        vocabulary: int,
        gather: Callable[[Tensor], Tensor],
        rank: int,
        seed: int,
    ) -> None:
        self.loss = loss
        self.token_mask = token_mask
        self.statistics = StepStatistics(loss, gather=gather, rank=rank, seed=seed)
        self._run_reference = run_reference
        self._noted = noted
        self._vocabulary = vocabulary
        self._seed = seed
        self.own_weight: Tensor | float = 1.0
        """Factor by which the loss itself multiplied each pair of the latest forward pass, [B] or 1 for all."""

    @property
    def logged(self) -> dict[str, float]:
        """Numbers of the latest step to log."""
        return self.statistics.logged

    def compare(self, passes: Sequence[ForwardPass], step: int) -> None:
        """Compute what the pairs of a step have to do with each other, before its first backward pass.

        Args:
            passes: all forward passes of the step in this process.
            step: finished optimizer steps.
        """
        self.statistics.gather(passes, step, update=True)

    def __call__(
        self, policy: SequenceLogps, logps: PairLogps, inputs: dict[str, Any], *, step: int, training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss [B] of each pair without its weight, and the terms [B] of a sum without theirs.

        Args:
            policy: scores of the batch under the policy.
            logps: log-probs of its pairs as the loss sees them.
            inputs: the batch.
            step: finished optimizer steps.
            training: whether this is a step of the training.
        """
        columns = inputs.get("margin"), inputs.get("trust")
        if self.token_mask is not None:
            return self._masked(self.token_mask, policy, inputs, training=training)
        if "label_share" in inputs:
            return self._voted(logps, *columns, share=inputs["label_share"])
        statistics = tokens = None
        self.own_weight = own_weight(self.loss, *columns)
        if self.loss.spec.coupled:
            statistics = self.statistics.of((logps, inputs), step, training=training)
            if self.loss.spec.name == "beta_dpo":
                self.own_weight = statistics["beta_dpo"][:, 1].to(logps.chosen)
        if self.loss.spec.tokens != "none":
            reference = self._run_reference(inputs) if self.loss.spec.tokens == "reference" else None
            tokens = pair_tokens(policy, reference, inputs, vocabulary=self._vocabulary, seed=self._seed, step=step)
        return self.loss.with_terms(logps, *columns, tokens=tokens, statistics=statistics)

    def _voted(
        self, logps: PairLogps, margin: Tensor | None, trust: Tensor | None, *, share: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the loss over both labels, ``share`` [B] for the label as it is; and so for the terms of a sum."""
        turned = None if margin is None else -margin
        weights = own_weight(self.loss, margin, trust), own_weight(self.loss, turned, trust)
        self.own_weight = share * weights[0] + (1 - share) * weights[1]
        one, terms = self.loss.with_terms(logps, margin, trust)
        other, others = self.loss.with_terms(logps.swapped, turned, trust)
        mixed = {name: share * value + (1 - share) * others[name] for name, value in terms.items()}
        return share * one + (1 - share) * other, mixed

    def _masked(
        self, mask: TokenMask, policy: SequenceLogps, inputs: dict[str, Any], *, training: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [B] of the tokens that the mask keeps, plus the mask's price while training; and its terms."""
        reference = self._run_reference(inputs).tokens.logps
        self.own_weight = own_weight(self.loss, inputs.get("margin"), inputs.get("trust"))
        masked, price, kept = mask(policy.tokens.logps, reference, inputs["input_ids"], inputs["completion_mask"])
        real = inputs.get(REAL)
        self._noted["token_mask/left"].append(only_real(kept, None if real is None else real.repeat(2)))
        per_pair, terms = self.loss.with_terms(masked, inputs.get("margin"), inputs.get("trust"))
        return per_pair + (price if training else 0.0), terms

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step needs, for a checkpoint."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        self.statistics.load_state_dict(state)


@contextmanager
def as_in_step(device: torch.device) -> Iterator[None]:
    """Compute without gradient and leave the random state as it is, so that dropout in the step is the same."""
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


class StepStatistics:
    """Statistics over all pairs of an optimizer step and of all processes, for the coupled losses of a training.

    The pairs are put in the order of their rows in the table, so nothing depends on how they are split into
    micro-batches and over processes; duplicates that only fill the last batch are left out.

    Args:
        loss: the loss of the training.
        gather: concatenates a tensor over processes along its first dimension (all_gather).
        rank: index of this process.
        seed: seed of draws, the same on every process.
    """

    def __init__(self, loss: BoundLoss, *, gather: Callable[[Tensor], Tensor], rank: int, seed: int) -> None:
        self.parts = {
            part.spec.name: part.spec.statistics(part.parameters, seed)
            for part in loss.parts
            if part.spec.statistics is not None
        }
        self.logged: dict[str, float] = {}
        """Numbers of the latest step to log."""
        self._gather = gather
        self._rank = rank
        self._step: int | None = None
        self._places: dict[int, int] = {}
        self._values: dict[str, Tensor] = {}

    def gather(self, passes: Sequence[ForwardPass], step: int, *, update: bool) -> None:
        """Compute the statistics of a step from all its forward passes in this process; every process calls this.

        Args:
            passes: every process has as many pairs in them.
            step: finished optimizer steps.
            update: keep what the next step needs; False outside of training.
        """
        widths, local = [], []
        for logps, inputs in passes:
            columns = [part.columns(logps).detach().double() for part in self.parts.values()]
            widths = [column.shape[1] for column in columns]
            real = inputs.get(REAL, torch.ones_like(columns[0][:, 0]))
            local.append(torch.stack([self._rows(inputs, len(real)).to(real.device), real], dim=1).to(columns[0]))
            local[-1] = torch.cat([local[-1], *columns], dim=1)
        table = self._gather(torch.cat(local).contiguous()).cpu()
        table = table[table[:, 1] > 0]
        table = table[torch.argsort(table[:, 0], stable=True)]
        self._places = {int(row): place for place, row in enumerate(table[:, 0].tolist())}
        self._values, self.logged, self._step = {}, {}, step if update else None
        parts = zip(self.parts.items(), table[:, 2:].split(widths, dim=1), strict=True)
        for (name, part), columns_of_part in parts:
            self._values[name], logged = part(columns_of_part, step, update=update)
            self.logged |= logged

    def of(self, passed: ForwardPass, step: int, *, training: bool) -> dict[str, Tensor]:
        """Name of a loss -> its statistics [B, K] for the pairs of a forward pass.

        They are those that ``gather`` computed for the step; if it has not, the step is this forward pass of every
        process. A duplicate whose pair is not in the step has zeros.
        """
        if not training or self._step != step:
            self.gather([passed], step, update=training)
        rows = self._rows(passed[1], len(passed[0].chosen)).tolist()
        places = torch.tensor([self._places.get(int(row), -1) for row in rows])
        found = (places >= 0).double()[:, None]
        return {name: values[places.clamp_min(0)] * found for name, values in self._values.items()}

    def _rows(self, inputs: Mapping[str, Any], pairs: int) -> Tensor:
        """Row of each pair in the table [B]; without that column, its place among the pairs of all processes."""
        rows: Tensor = inputs.get(ROW, torch.arange(pairs) + pairs * self._rank)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every statistic, for a checkpoint."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def pair_tokens(
    policy: SequenceLogps,
    reference: SequenceLogps | None,
    inputs: Mapping[str, Any],
    *,
    vocabulary: int,
    seed: int,
    step: int,
) -> PairTokens:
    """Return the scores of the completion tokens of a forward pass, as losses read them.

    Args:
        policy: scores under the policy.
        reference: scores under the reference; None if the loss does not read them.
        inputs: the batch.
        vocabulary: entries of the vocabulary, of which the largest entropy is the logarithm.
        seed: seed of draws.
        step: finished optimizer steps.
    """
    rows = inputs.get(ROW)
    return PairTokens(
        mask=inputs["completion_mask"][:, 1:].bool(),
        logps=policy.tokens.logps,
        log_sum_squares=policy.tokens.log_sum_squares,
        ref_logps=None if reference is None else reference.tokens.logps,
        ref_entropy=None if reference is None else reference.tokens.entropy / math.log(vocabulary),
        seed=seed,
        step=step,
        rows=None if rows is None else tuple(int(row) for row in rows.tolist()),
    )
