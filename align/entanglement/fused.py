"""Gradient products of a training step's own batch, from its own forward and backward pass.

The gradient of a step's loss at a layer's output is c_r e_r in row r, where e_r is the gradient of the row's log-prob
and c_r = dL/dlog p_r. Rows do not interact in the concatenated layout, and c_r is known when the backward pass begins.
The products of two rows' gradients are bilinear in them, so those of the step's gradients divided by c_r c_s are what
``GradientProducts`` gets from a backward pass of its own. What remains to be paid are the products and, where the head
is trained, one more pass through the head.

Legend: B pairs, T padded tokens, M scored tokens.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align.entanglement.layer_rules import Call, Input
from align.entanglement.pair_products import PairProducts, concatenate, pair_products, select_pairs
from align.entanglement.products import GradientProducts
from align.models.logps import ScoredOutput

SMALLEST = 1e-12
"""Smallest |dL/dlog p| of a row; below, products of its gradients may leave the range of float32."""
GRADIENT_INPUTS = ("input_ids", "attention_mask", "completion_mask")


class StepProducts:
    """Measures the batch of a training step while it is trained on.

    ``begin`` before the step's first forward pass, ``end`` after its last backward pass, before the optimizer's step.

    Args:
        products: measures the same model by passes of its own; rows whose loss has no gradient are left to it.
        batch: returns the (micro-)batch whose forward pass begins, in trl's layout.
    """

    def __init__(self, products: GradientProducts, batch: Callable[[], dict[str, Tensor]]) -> None:
        self.products = products
        self.batch = batch
        self._handles: list[RemovableHandle] = []
        self._parts: list[tuple[dict[str, Tensor], PairProducts]] = []
        self._row: _Rows | None = None
        self._waiting: _Rows | None = None
        self.seconds = 0.0
        """Spent on measuring since ``begin``."""
        self._forward: Callable[..., Any] | None = None

    def begin(self) -> None:
        """Watch the model's forward and backward passes."""
        base, head = self.products.base, self.products.head
        self.seconds = 0.0
        self._forward = base.forward
        base.forward = functools.partial(self._watched, base.forward)  # peft calls it without the module's hooks
        self._handles = [base.base_model.register_forward_hook(self._hidden)]
        if head.tied:
            self._handles.append(head.embedding.register_forward_hook(self._embedded))
        self._handles += [
            module.register_forward_hook(self._called, with_kwargs=True) for module in self.products.sites
        ]

    def end(self) -> list[tuple[dict[str, Tensor], PairProducts]]:
        """Stop watching; each (micro-)batch of the step with its products, directional derivatives NaN."""
        self._finish()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._forward is not None:
            self.products.base.forward, self._forward = self._forward, None
        found, self._parts = self._parts, []
        return found

    def _watched(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass; one with gradient is of the next (micro-)batch."""
        if not torch.is_grad_enabled() or kwargs.get("scored") is None:
            return forward(*args, **kwargs)
        self._finish()
        self._row = _Rows(self.batch())
        try:
            output = forward(*args, **kwargs)
        finally:
            row, self._row = self._row, None
        row.watch(output)
        self._waiting = row
        return output

    def _hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._row is not None and torch.is_grad_enabled():
            self._row.hidden = output.last_hidden_state.detach()

    def _embedded(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        row = self._row
        if row is not None and torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(row.keep_embedded)

    def _called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        row = self._row
        if row is None or not torch.is_grad_enabled() or not output.requires_grad:
            return
        value = args[0] if args else next(iter(kwargs.values()))
        _, entry = row.seen.setdefault(id(value), (value, Input(value.detach())))

        def arrived(grad: Tensor) -> None:
            start = time.monotonic()
            with torch.no_grad():
                for name, rule in self.products.sites[module].items():
                    row.totals += rule.pair_products(Call(module, name, entry, grad))
            self.seconds += time.monotonic() - start

        output.register_hook(arrived)

    @torch.no_grad()
    def _finish(self) -> None:
        """Complete the products of the forward pass whose backward pass is over."""
        row, self._waiting = self._waiting, None
        if row is None or row.scale is None:
            return
        start = time.monotonic()
        batch = {name: row.batch[name] for name in GRADIENT_INPUTS}
        totals = row.divided_totals()
        if self.products.head.measures:
            assert row.hidden is not None
            totals = totals + self.products.products_of_head(row.hidden, batch, row.embedded)
        found = pair_products(totals.cpu(), row.logps.cpu(), torch.full_like(row.logps, torch.nan).cpu(), batch)
        if lost := row.without_gradient():
            with torch.enable_grad():
                found = _replaced(found, lost, self.products(select_pairs(batch, lost)))
        self._parts.append((row.batch, found))
        self.seconds += time.monotonic() - start


class _Rows:
    """What is seen of one forward and backward pass."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        mask = batch["completion_mask"][:, 1:].bool()
        count = len(mask)
        self.batch = batch
        self.rows = mask.flatten().nonzero().squeeze(1) // mask.shape[1]
        """[M], row of each scored token."""
        self.seen: dict[int, tuple[Any, Input]] = {}
        self.hidden: Tensor | None = None
        self.embedded: Tensor | None = None
        self.scale: Tensor | None = None
        """[2B], dL/dlog p of each row; None before the backward pass."""
        self.logps = torch.zeros(count, dtype=torch.float64, device=mask.device)
        self.totals = torch.zeros(3, count // 2, dtype=torch.float64, device=mask.device)
        """[3, B], products of the loss's gradients."""

    def watch(self, output: ScoredOutput) -> None:
        """Keep the log-probs of the scored tokens and, when it arrives, the loss's gradient at them."""
        assert output.logps is not None
        self.seen.clear()
        self.logps.index_add_(0, self.rows, output.logps.detach().double())
        output.logps.register_hook(self._scaled)

    def _scaled(self, grad: Tensor) -> None:
        """Mean of the gradient over a row's tokens; a loss of the rows' log-probs has the same at each of them."""
        count = torch.zeros_like(self.logps).index_add_(0, self.rows, torch.ones_like(grad, dtype=torch.float64))
        total = torch.zeros_like(self.logps).index_add_(0, self.rows, grad.double())
        self.scale = total / count.clamp_min(1)

    def divided_totals(self) -> Tensor:
        """|gw|^2, |gl|^2 and <gw, gl> of the log-probs' gradients, [3, B]; 0 where the loss has no gradient."""
        chosen, rejected = self._inverse().view(2, -1)
        return self.totals * torch.stack([chosen**2, rejected**2, chosen * rejected])

    def keep_embedded(self, grad: Tensor) -> None:
        """Keep the gradient of the rows' log-probs at the embedding's output, [2B, T, D]."""
        self.embedded = grad * self._inverse().to(grad.dtype)[:, None, None]

    def _inverse(self) -> Tensor:
        """1 / c_r of each row, [2B], float64; 0 where the loss has no gradient."""
        assert self.scale is not None
        return torch.where(self._known(), 1 / self.scale, 0.0)

    def _known(self) -> Tensor:
        assert self.scale is not None
        return self.scale.abs() > SMALLEST

    def without_gradient(self) -> list[int]:
        """Pairs of which the loss has no gradient in one response or both."""
        return [int(pair) for pair in (~self._known()).view(2, -1).any(dim=0).nonzero()]


def _replaced(found: PairProducts, pairs: list[int], measured: PairProducts) -> PairProducts:
    places = torch.tensor(pairs)
    names = ("chosen_sq", "rejected_sq", "inner")
    return replace(
        found, **{name: getattr(found, name).index_copy(0, places, getattr(measured, name)) for name in names}
    )


def joined(parts: list[tuple[dict[str, Tensor], PairProducts]]) -> PairProducts:
    """The products of all (micro-)batches of a step."""
    return concatenate([products for _, products in parts])


def why_not(model: nn.Module, products: GradientProducts) -> str | None:
    """Why a step's passes do not give the products of a pass without dropout in full precision; None if they do."""
    return next(_reasons(model, products), None)


def _reasons(model: nn.Module, products: GradientProducts) -> Iterator[str]:
    base = products.base
    if products.by_autograd:
        yield f"no layer's rule measures {products.by_autograd[0]}"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        yield "dropout is on"
    config = base.config.get_text_config()
    if any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop")):
        yield "attention dropout is on"
    if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in products.measured.values()):
        yield "the weights are in 16 bits"
