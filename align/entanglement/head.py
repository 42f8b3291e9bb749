"""The output head's part of the gradient products: scored positions only, and the embedding where it is tied to it.

The gradient of a row's log-prob at the logits of a scored position is onehot - softmax, so everything about the head
follows from its inputs h and those rows p. A head tied to the input embedding has one gradient, the sum of a head part
and an embedding part, and with it a cross term (p at the ids of the other tokens times h . e).

Legend: B pairs, T padded tokens, D hidden size, V vocabulary, g rows of a group, C scored tokens of a group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.training.head import LogitForm


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

    def forward(self, hidden: Tensor, batch: dict[str, Tensor], groups: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probs [2B] and their gradient [2B, T, D] at the last hidden states.

        Args:
            hidden: [2B, T, D].
            batch: right-padded, in trl's layout.
            groups: disjoint sets of rows whose products with each other are wanted; together all rows.
        """
        self._ids = batch["input_ids"]
        logps = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
        grad = torch.zeros_like(hidden)
        self._groups = [
            self._of_group(rows, hidden.detach(), batch["completion_mask"].bool(), logps, grad) for rows in groups
        ]
        return logps, grad

    def take(self) -> list[Tensor]:
        """Products [g, g] of each group, float64; after the backward pass."""
        return [group.gram + self._embedding_part(group) if self.tied else group.gram for group in self._groups]

    def _of_group(self, rows: Tensor, hidden: Tensor, mask: Tensor, logps: Tensor, grad: Tensor) -> _Group:
        """One group's products; writes into ``logps`` and ``grad``."""
        scored = mask[rows, 1:]
        which, place = scored.nonzero(as_tuple=True)
        states = hidden[rows[which], place]
        targets = self._ids[rows[which], place + 1]
        member = F.one_hot(which, len(rows)).double()
        if self.plain:
            token_logps, at_logits, back = self._linear(states, targets)
            gram = self._linear_gram(states, at_logits, member)
        else:
            token_logps, back, gram = self._by_autograd(states, targets, which, len(rows))
            at_logits = states.new_zeros(len(states), 1)
        logps[rows] = member.T @ token_logps.double()
        grad[rows[which], place] = back
        at_ids = at_logits[:, self._ids[rows].flatten()] if self.tied else at_logits[:, :0]
        return _Group(rows, gram, states, at_ids, member)

    @torch.no_grad()
    def _linear(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs [C], their gradients at W h + b [C, V] and at h [C, D]."""
        weight = self.head.get_parameter("weight")
        logits = self.form.apply(F.linear(states, weight, self.head.bias))  # type: ignore[arg-type]
        logps = F.log_softmax(logits, dim=-1)
        chosen = logps.gather(1, targets[:, None])
        at_logits = logps.exp_().neg_()
        at_logits.scatter_add_(1, targets[:, None], torch.ones_like(chosen))
        at_logits = self.form.backward_(at_logits, logits)
        return chosen.squeeze(1), at_logits, at_logits.to(weight.dtype) @ weight

    def _linear_gram(self, states: Tensor, at_logits: Tensor, member: Tensor) -> Tensor:
        measured_weight = self.holds(self.head.get_parameter("weight"))
        measured_bias = self.head.bias is not None and self.holds(self.head.get_parameter("bias"))
        if not measured_weight and not measured_bias:
            return torch.zeros(member.shape[1], member.shape[1], dtype=torch.float64, device=states.device)
        inputs = states @ states.T if measured_weight else torch.zeros_like(states[:, :1] @ states[:, :1].T)
        if measured_bias:
            inputs = inputs + 1
        return member.T @ (inputs * (at_logits @ at_logits.T)).double() @ member

    def _by_autograd(self, states: Tensor, targets: Tensor, which: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Any other head (an adapter on it): one backward pass through the head alone for each row."""
        logps = torch.empty(len(states), dtype=states.dtype, device=states.device)
        back = torch.empty_like(states)
        vectors = []
        for parameter in self.own:
            parameter.requires_grad_(True)
        for row in range(rows):
            own = which == row
            with torch.enable_grad():
                entry = states[own].requires_grad_(True)
                scores = F.log_softmax(self.form.apply(self.head(entry)), dim=-1)
                found = scores.gather(1, targets[own, None]).squeeze(1)
                at_states, *at_own = torch.autograd.grad(found.sum(), [entry, *self.own], allow_unused=True)
            logps[own], back[own] = found.detach().to(logps.dtype), at_states
            flat = [g.flatten().double() for g in at_own if g is not None]
            vectors.append(torch.cat(flat) if flat else states.new_zeros(1, dtype=torch.float64))
        for parameter in self.own:
            parameter.requires_grad_(False)
        stacked = torch.stack(vectors)
        return logps, back, stacked @ stacked.T

    def _embedding_part(self, group: _Group) -> Tensor:
        """Embedding with embedding, and twice embedding with head, [g, g]."""
        ids, grad = self._ids[group.rows].flatten(), self._grad[group.rows].flatten(0, 1)
        row_of = torch.arange(len(group.rows), device=ids.device).repeat_interleave(self._ids.shape[1])
        member = F.one_hot(row_of, len(group.rows)).double()
        same = (ids[:, None] == ids[None]).to(grad.dtype)
        own = member.T @ (same * (grad @ grad.T)).double() @ member
        cross = group.member.T @ (group.at_ids * (group.hidden @ grad.T)).double() @ member
        return own + cross + cross.T
