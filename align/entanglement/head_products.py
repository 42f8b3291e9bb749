"""The LM head's part of the gradient products, from scored positions alone, with a tied embedding's part.

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

from align.entanglement.layer_rules import table_grad
from align.models.lm_head import LogitForm

TOKENS = 256
"""Scored tokens that pass the head together: enough for fast products, few enough that their logits are small."""


@dataclass(slots=True)
class _Scored:
    """The scored tokens of one group of rows."""

    rows: Tensor
    """[g]."""
    which: Tensor
    """[C], index of each token's row within ``rows``."""
    place: Tensor
    """[C], position of the hidden state that predicts the token."""
    states: Tensor
    """[C, D]."""
    targets: Tensor
    """[C], ids of the tokens."""
    member: Tensor
    """[C, g], float64, one-hot: the row of each scored token."""


@dataclass(slots=True)
class _Group:
    """LM-head gradient of one group of rows, kept until the tied embedding's gradient arrives."""

    rows: Tensor
    """[g]."""
    gram: Tensor
    """[g, g], float64."""
    hidden: Tensor
    """[C, D]."""
    at_ids: Tensor
    """[C, g * T], p at the ids of the group's tokens."""
    member: Tensor
    """[C, g], float64, one-hot: the row of each scored token."""


class HeadProducts:
    """Computes log-probs, the gradient at the last hidden states, and the head's part of the products.

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
        self.parameters = [parameter for parameter in head.parameters() if id(parameter) in measured]
        self.tied = self.plain and id(head.weight) in measured and embedding.weight is head.weight
        of_embedding = set() if self.plain else {id(parameter) for parameter in embedding.parameters()}
        self.shared = [parameter for parameter in self.parameters if id(parameter) in of_embedding]
        """Parameters of an adapter that head and embedding share: their gradients are the sum of both parts."""
        self.parameters = [parameter for parameter in self.parameters if id(parameter) not in of_embedding]
        self.shared_grads: dict[int, list[Tensor]] = {}
        """Row of the batch -> the head's part of the gradients of ``shared``, of the last forward pass."""
        self._groups: list[_Group] = []
        self._ids = self._grad = torch.empty(0)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is a measured one of the head."""
        return any(parameter is own for own in self.parameters)

    def receive(self, grad: Tensor) -> None:
        """Keep the gradient at the output of a tied embedding, [2B, T, D]."""
        self._grad = table_grad(self.embedding, self._ids, grad.detach())

    @property
    def measures(self) -> bool:
        """Whether a parameter of the head is measured."""
        return bool(self.parameters) or self.tied

    def forward(
        self,
        hidden: Tensor,
        batch: dict[str, Tensor],
        groups: list[Tensor],
        direction: Mapping[int, Tensor],
        *,
        backward: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the head forward and backward.

        Args:
            hidden: last hidden states [2B, T, D].
            batch: right-padded, in trl's layout.
            groups: disjoint sets of rows whose products with each other are wanted; together all rows.
            direction: ``id`` of a parameter -> tensor of its shape; parameters of other modules are ignored.
            backward: compute the gradient at the hidden states; without, it is 0 for a linear head.

        Returns:
            Log-probs [2B], their gradient at the last hidden states [2B, T, D], and their directional derivatives [2B]
            along the head's part of the direction.
        """
        self._ids = batch["input_ids"]
        logps = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        jvp = torch.zeros_like(logps)
        grad = torch.zeros_like(hidden)
        mask = batch["completion_mask"].bool()
        scored = [self._scored(rows, hidden.detach(), mask) for rows in groups]
        self._groups = []
        self.shared_grads = {}
        for bundle in _bundles(scored):
            parts = self._linear(bundle, direction, backward) if self.plain else self._by_autograd(bundle, direction)
            for group, (token_logps, at_logits, at_hidden, gram, token_jvp) in zip(bundle, parts, strict=True):
                logps[group.rows] = group.member.T @ token_logps.double()
                jvp[group.rows] = group.member.T @ token_jvp.double()
                grad[group.rows[group.which], group.place] = at_hidden
                at_ids = at_logits[:, self._ids[group.rows].flatten()] if self.tied else at_logits[:, :0]
                self._groups.append(_Group(group.rows, gram, group.states, at_ids, group.member))
        return logps, grad, jvp

    def take(self) -> list[Tensor]:
        """Products [g, g] of each group, float64; call it after the backward pass."""
        return [group.gram + self._embedding_part(group) if self.tied else group.gram for group in self._groups]

    def _scored(self, rows: Tensor, hidden: Tensor, mask: Tensor) -> _Scored:
        which, place = mask[rows, 1:].nonzero(as_tuple=True)
        member = F.one_hot(which, len(rows)).double()
        return _Scored(rows, which, place, hidden[rows[which], place], self._ids[rows[which], place + 1], member)

    @torch.no_grad()
    def _linear(
        self, groups: list[_Scored], direction: Mapping[int, Tensor], backward: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """For each group log-probs [C], their gradients at W h + b [C, V] and h [C, D], products [g, g], JVP [C]."""
        weight = self.head.get_parameter("weight")
        states, targets = torch.cat([g.states for g in groups]), torch.cat([g.targets for g in groups])
        logits = self.form.apply(F.linear(states, weight, self.head.bias))  # type: ignore[arg-type]
        logps = F.log_softmax(logits, dim=-1)
        target_logps = logps.gather(1, targets[:, None])
        at_logits = logps.exp_().neg_()
        at_logits.scatter_add_(1, targets[:, None], torch.ones_like(target_logps))
        at_logits = self.form.backward_(at_logits, logits)
        at_hidden = at_logits.to(weight.dtype) @ weight if backward else torch.zeros_like(states)
        jvp = self._linear_jvp(states, at_logits, direction)
        sizes = [len(group.which) for group in groups]
        parts = (values.split(sizes) for values in (target_logps.squeeze(1), at_logits, at_hidden, jvp))
        for group, token_logps, group_at_logits, group_at_hidden, group_jvp in zip(groups, *parts, strict=True):
            yield token_logps, group_at_logits, group_at_hidden, self._linear_gram(group, group_at_logits), group_jvp

    def _linear_jvp(self, states: Tensor, at_logits: Tensor, direction: Mapping[int, Tensor]) -> Tensor:
        """Derivative of each token's log-prob along the direction's part for W and b, [C]."""
        weight, bias = (direction.get(id(parameter)) for parameter in (self.head.weight, self.head.bias))
        jvp = at_logits.new_zeros(len(states))
        if weight is not None:
            jvp += (at_logits * F.linear(states, weight)).sum(dim=1)
        return jvp if bias is None else jvp + at_logits @ bias.to(at_logits.dtype)

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
        for row, count in enumerate(group.member.sum(dim=0).int().tolist()):  # tokens are in the order of their rows
            own, rest = slice(first, first + count), slice(first, None)
            block = inputs[own, rest] * (at_logits[own] @ at_logits[rest].T)
            upper[row] = block.double().sum(dim=0) @ group.member[rest]
            first += count
        return upper + upper.triu(diagonal=1).T

    def _by_autograd(
        self, groups: list[_Scored], direction: Mapping[int, Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Do what ``_linear`` does for any other head (an adapter on it), without the gradient at the logits."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        results = [self._group_by_autograd(group, direction) for group in groups]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        return results

    def _group_by_autograd(
        self, group: _Scored, direction: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One backward pass through the head alone for each row; a row's JVP is spread evenly over its tokens."""
        states = group.states
        logps = torch.empty(len(states), dtype=states.dtype, device=states.device)
        jvp = torch.zeros(len(states), dtype=torch.float64, device=states.device)
        at_hidden = torch.empty_like(states)
        sample_grads = []
        for row in range(len(group.rows)):
            own = group.which == row
            with torch.enable_grad():
                entry = states[own].requires_grad_(True)
                scores = F.log_softmax(self.form.apply(self.head(entry)), dim=-1)
                row_logps = scores.gather(1, group.targets[own, None]).squeeze(1)
                wanted = [entry, *self.shared, *self.parameters]
                at_states, *grads = torch.autograd.grad(row_logps.sum(), wanted, allow_unused=True)
            self.shared_grads[int(group.rows[row])] = [
                torch.zeros_like(parameter) if grad is None else grad
                for parameter, grad in zip(self.shared, grads, strict=False)
            ]
            grads = grads[len(self.shared) :]
            logps[own], at_hidden[own] = row_logps.detach().to(logps.dtype), at_states
            for parameter, grad in zip(self.parameters, grads, strict=True):
                if grad is not None and id(parameter) in direction:
                    jvp[own] += (grad.double() * direction[id(parameter)].double()).sum() / own.sum()
            flat = [grad.flatten().double() for grad in grads if grad is not None]
            sample_grads.append(torch.cat(flat) if flat else states.new_zeros(1, dtype=torch.float64))
        stacked = torch.stack(sample_grads)
        return logps, states.new_zeros(len(states), 1), at_hidden, stacked @ stacked.T, jvp

    def _embedding_part(self, group: _Group) -> Tensor:
        """Products of embedding with embedding, and twice those of embedding with head, [g, g]."""
        ids, grad = self._ids[group.rows].flatten(), self._grad[group.rows].flatten(0, 1)
        row_of = torch.arange(len(group.rows), device=ids.device).repeat_interleave(self._ids.shape[1])
        member = F.one_hot(row_of, len(group.rows)).double()
        same = (ids[:, None] == ids[None]).to(grad.dtype)
        own = member.T @ (same * (grad @ grad.T)).double() @ member
        cross = group.member.T @ (group.at_ids * (group.hidden @ grad.T)).double() @ member
        return own + cross + cross.T


def _bundles(groups: list[_Scored]) -> list[list[_Scored]]:
    """Put consecutive groups together up to ``TOKENS`` scored tokens; each bundle has at least one group."""
    bundles: list[list[_Scored]] = []
    size = TOKENS
    for group in groups:
        if size + len(group.which) > TOKENS:
            bundles.append([])
            size = 0
        bundles[-1].append(group)
        size += len(group.which)
    return bundles
