"""The output head's part of the gradient products: scored positions only, and the embedding where it is tied to it.

The gradient of a row's log-prob at the logits of a scored position is onehot - softmax, so everything about the head
follows from its inputs h and those rows p. A head tied to the input embedding has one gradient, the sum of a head part
and an embedding part, and with it a cross term (p at the ids of the other tokens times h . e).

Legend: B pairs, T padded tokens, D hidden size, V vocabulary, g rows of a group, C scored tokens of a group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.models.lm_head import LogitForm

TOKENS = 256
"""Scored tokens that pass the head together: enough for fast products, little enough that their logits are small."""


@dataclass(slots=True)
class _Scored:
    """The scored tokens of one group of rows."""

    rows: Tensor
    """[g]."""
    which: Tensor
    """[C], place of each token's row within ``rows``."""
    place: Tensor
    """[C], position whose hidden state predicts the token."""
    states: Tensor
    """[C, D]."""
    targets: Tensor
    """[C], ids of the tokens."""
    member: Tensor
    """[C, g], 1 where a scored token is of a row, float64."""


@dataclass(slots=True)
class _Group:
    """What is left of the head's part of one group of rows until the embedding's part has come."""

    rows: Tensor
    """[g]."""
    gram: Tensor
    """[g, g], float64."""
    hidden: Tensor
    """[C, D]."""
    at_ids: Tensor
    """[C, g * T], p at the ids of the group's tokens."""
    member: Tensor
    """[C, g], 1 where a scored token is of a row, float64."""


class HeadProducts:
    """Log-probs, the gradient at the last hidden states, and the head's part of the products.

    Args:
        model: causal language model, without an adapter around it.
        measured: ``id`` of every measured parameter.
    """

    def __init__(self, model: PreTrainedModel, measured: set[int]) -> None:
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        self.head: nn.Module = head
        self.embedding: nn.Module = embedding
        self.form = LogitForm.of(model.config)
        self.plain = type(head) is nn.Linear
        self.own = [parameter for parameter in head.parameters() if id(parameter) in measured]
        self.tied = self.plain and id(head.weight) in measured and embedding.weight is head.weight
        self._groups: list[_Group] = []
        self._ids = self._grad = torch.empty(0)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is one of the head's."""
        return any(parameter is one for one in self.own)

    def receive(self, grad: Tensor) -> None:
        """The gradient at the output of a tied embedding, [2B, T, D]."""
        scale = getattr(self.embedding, "embed_scale", None)
        self._grad = grad.detach() if scale is None else grad.detach() * scale

    def forward(
        self, hidden: Tensor, batch: dict[str, Tensor], groups: list[Tensor], direction: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [2B], their gradient [2B, T, D] at the last hidden states, derivatives along the head's direction.

        Args:
            hidden: [2B, T, D].
            batch: right-padded, in trl's layout.
            groups: disjoint sets of rows whose products with each other are wanted; together all rows.
            direction: ``id`` of a parameter -> tensor of its shape; those of other modules are passed over.
        """
        self._ids = batch["input_ids"]
        logps = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        along = torch.zeros_like(logps)
        grad = torch.zeros_like(hidden)
        mask = batch["completion_mask"].bool()
        scored = [self._scored(rows, hidden.detach(), mask) for rows in groups]
        self._groups = []
        for some in _bundles(scored):
            parts = self._linear(some, direction) if self.plain else self._by_autograd(some, direction)
            for group, (token_logps, at_logits, back, gram, token_along) in zip(some, parts, strict=True):
                logps[group.rows] = group.member.T @ token_logps.double()
                along[group.rows] = group.member.T @ token_along.double()
                grad[group.rows[group.which], group.place] = back
                at_ids = at_logits[:, self._ids[group.rows].flatten()] if self.tied else at_logits[:, :0]
                self._groups.append(_Group(group.rows, gram, group.states, at_ids, group.member))
        return logps, grad, along

    def take(self) -> list[Tensor]:
        """Products [g, g] of each group, float64; after the backward pass."""
        return [group.gram + self._embedding_part(group) if self.tied else group.gram for group in self._groups]

    def _scored(self, rows: Tensor, hidden: Tensor, mask: Tensor) -> _Scored:
        which, place = mask[rows, 1:].nonzero(as_tuple=True)
        member = F.one_hot(which, len(rows)).double()
        return _Scored(rows, which, place, hidden[rows[which], place], self._ids[rows[which], place + 1], member)

    @torch.no_grad()
    def _linear(
        self, groups: list[_Scored], direction: Mapping[int, Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For each group log-probs [C], their gradients at W h + b [C, V] and h [C, D], products [g, g], along [C]."""
        weight = self.head.get_parameter("weight")
        states, targets = torch.cat([g.states for g in groups]), torch.cat([g.targets for g in groups])
        logits = self.form.apply(F.linear(states, weight, self.head.bias))  # type: ignore[arg-type]
        logps = F.log_softmax(logits, dim=-1)
        chosen = logps.gather(1, targets[:, None])
        at_logits = logps.exp_().neg_()
        at_logits.scatter_add_(1, targets[:, None], torch.ones_like(chosen))
        at_logits = self.form.backward_(at_logits, logits)
        back = at_logits.to(weight.dtype) @ weight
        along = self._linear_along(states, at_logits, direction)
        sizes = [len(group.which) for group in groups]
        parts = (values.split(sizes) for values in (chosen.squeeze(1), at_logits, back, along))
        for group, token_logps, own_at_logits, own_back, own_along in zip(groups, *parts, strict=True):
            yield token_logps, own_at_logits, own_back, self._linear_gram(group, own_at_logits), own_along

    def _linear_along(self, states: Tensor, at_logits: Tensor, direction: Mapping[int, Tensor]) -> Tensor:
        """Derivative of each token's log-prob along the direction's part for W and b, [C]."""
        weight, bias = (direction.get(id(parameter)) for parameter in (self.head.weight, self.head.bias))
        along = at_logits.new_zeros(len(states))
        if weight is not None:
            along += (at_logits * F.linear(states, weight)).sum(dim=1)
        return along if bias is None else along + at_logits @ bias.to(at_logits.dtype)

    def _linear_gram(self, group: _Scored, at_logits: Tensor) -> Tensor:
        states, rows = group.states, len(group.rows)
        measured_weight = self.holds(self.head.get_parameter("weight"))
        measured_bias = self.head.bias is not None and self.holds(self.head.get_parameter("bias"))
        if not measured_weight and not measured_bias:
            return torch.zeros(rows, rows, dtype=torch.float64, device=states.device)
        inputs = states @ states.T if measured_weight else torch.zeros_like(states[:, :1] @ states[:, :1].T)
        if measured_bias:
            inputs = inputs + 1
        upper = torch.zeros(rows, rows, dtype=torch.float64, device=states.device)
        first = 0
        for row, count in enumerate(
            group.member.sum(dim=0).int().tolist()
        ):  # the tokens are in the order of their rows
            own, rest = slice(first, first + count), slice(first, None)
            block = inputs[own, rest] * (at_logits[own] @ at_logits[rest].T)
            upper[row] = block.double().sum(dim=0) @ group.member[rest]
            first += count
        return upper + upper.triu(diagonal=1).T

    def _by_autograd(
        self, groups: list[_Scored], direction: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The same for any other head (an adapter on it), without the gradient at the logits."""
        for parameter in self.own:
            parameter.requires_grad_(True)
        found = [self._group_by_autograd(group, direction) for group in groups]
        for parameter in self.own:
            parameter.requires_grad_(False)
        return found

    def _group_by_autograd(
        self, group: _Scored, direction: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One backward pass through the head alone for each row; what is along is spread over the row's tokens."""
        states = group.states
        logps = torch.empty(len(states), dtype=states.dtype, device=states.device)
        along = torch.zeros(len(states), dtype=torch.float64, device=states.device)
        back = torch.empty_like(states)
        vectors = []
        for row in range(len(group.rows)):
            own = group.which == row
            with torch.enable_grad():
                entry = states[own].requires_grad_(True)
                scores = F.log_softmax(self.form.apply(self.head(entry)), dim=-1)
                found = scores.gather(1, group.targets[own, None]).squeeze(1)
                at_states, *at_own = torch.autograd.grad(found.sum(), [entry, *self.own], allow_unused=True)
            logps[own], back[own] = found.detach().to(logps.dtype), at_states
            for parameter, at_parameter in zip(self.own, at_own, strict=True):
                if at_parameter is not None and id(parameter) in direction:
                    along[own] += (at_parameter.double() * direction[id(parameter)].double()).sum() / own.sum()
            flat = [g.flatten().double() for g in at_own if g is not None]
            vectors.append(torch.cat(flat) if flat else states.new_zeros(1, dtype=torch.float64))
        stacked = torch.stack(vectors)
        return logps, states.new_zeros(len(states), 1), back, stacked @ stacked.T, along

    def _embedding_part(self, group: _Group) -> Tensor:
        """Embedding with embedding, and twice embedding with head, [g, g]."""
        ids, grad = self._ids[group.rows].flatten(), self._grad[group.rows].flatten(0, 1)
        row_of = torch.arange(len(group.rows), device=ids.device).repeat_interleave(self._ids.shape[1])
        member = F.one_hot(row_of, len(group.rows)).double()
        same = (ids[:, None] == ids[None]).to(grad.dtype)
        own = member.T @ (same * (grad @ grad.T)).double() @ member
        cross = group.member.T @ (group.at_ids * (group.hidden @ grad.T)).double() @ member
        return own + cross + cross.T


def _bundles(groups: list[_Scored]) -> list[list[_Scored]]:
    """The groups in order, as many together as have ``TOKENS`` scored tokens; at least one."""
    bundles: list[list[_Scored]] = []
    size = TOKENS
    for group in groups:
        if size + len(group.which) > TOKENS:
            bundles.append([])
            size = 0
        bundles[-1].append(group)
        size += len(group.which)
    return bundles
