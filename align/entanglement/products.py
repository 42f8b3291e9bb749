"""|gw|^2, |gl|^2 and <gw, gl> of every pair of a batch, exact, without one per-sequence gradient of the model.

gw and gl are the gradients of the summed log-probability of the chosen and of the rejected response over the trained
parameters (arXiv 2410.13828). One forward pass and one backward pass through the activations serve both responses of
all pairs: rows of a batch do not interact, so the gradient at a layer's output in one row belongs to that row alone.

Along a direction u in parameter space the same two passes give <gw, u> and <gl, u>: each sequence gets a scalar that
moves it, and it alone, along u, and the backward pass returns the derivative by that scalar.

Legend: B pairs, T padded tokens, D hidden size, V vocabulary, C scored tokens of one response.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from align.entanglement.directional import Direction, moving
from align.entanglement.head_products import HeadProducts
from align.entanglement.layer_rules import RULES, Call, Input, Rule, check_measurable, products_of_vectors
from align.errors import ModelError
from align.io.console import log
from align.models.layout import base_model
from align.models.logps import NOT_MODEL_INPUTS

TRIAL_ROWS, TRIAL_TOKENS = 2, 4
CODE = "entanglement-parameter"
MAX_TOKENS = 512
"""Padded tokens that one forward and backward pass of pair products holds, unless a single pair has more."""
BLOCK = 2**16
"""Entries of per-sequence gradients whose products are summed in their own precision before float64 takes over."""


@dataclass(frozen=True, slots=True)
class PairProducts:
    """Inner products of the gradients of each pair, each [B], float64 on the CPU."""

    chosen_sq: Tensor
    """|gw|^2."""
    rejected_sq: Tensor
    """|gl|^2."""
    inner: Tensor
    """<gw, gl>."""
    chosen_logps: Tensor
    """nats."""
    rejected_logps: Tensor
    """nats."""
    chosen_length: Tensor
    """Scored tokens."""
    rejected_length: Tensor
    """Scored tokens."""
    chosen_along: Tensor
    """<gw, u> of the direction that was given; NaN where none was."""
    rejected_along: Tensor
    """<gl, u>."""

    @property
    def cosine(self) -> Tensor:
        """<gw, gl> / (|gw| |gl|); 0 where a gradient vanishes."""
        norms = (self.chosen_sq * self.rejected_sq).sqrt()
        return torch.where(norms > 0, self.inner / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)

    @property
    def norm_ratio(self) -> Tensor:
        """|gl| / |gw|; inf where the chosen gradient vanishes."""
        return (self.rejected_sq / self.chosen_sq).sqrt()


class GradientProducts:
    """Measures the pairs of one model.

    Args:
        model: causal language model, with its adapter if it has one.
        parameters: regular expression that the names of the parameters to measure match; all trained ones where None.

    Raises:
        ModelError: no parameter is trained or matches, or one cannot be measured.
    """

    def __init__(self, model: nn.Module, parameters: str | None = None) -> None:
        self.model = model
        self.base = base_model(model)
        self.measured = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and (parameters is None or re.search(parameters, name))
        }
        if not self.measured:
            wanted = "" if parameters is None else f" whose name matches {parameters!r}"
            raise ModelError(f"the model has no trained parameter{wanted}", code=CODE)
        check_measurable(self.measured)
        self._head = HeadProducts(self.base, set(map(id, self.measured.values())))
        self._sites, self._rest = self._plan()
        self._by_rule = True
        self._leaves: list[Tensor] = []  # where the graph of activations starts, the weights being frozen
        self.covered = {
            "rule": sum(p.numel() for name, p in self.measured.items() if name not in self._rest),
            "autograd": sum(p.numel() for p in self._rest.values()),
        }
        """Measured numbers of parameters, by a layer's rule and by one backward pass per sequence."""
        if self._rest:
            shown = ", ".join(list(self._rest)[:3]) + (" ..." if len(self._rest) > 3 else "")
            log.warning(
                "no rule for %d parameters (%s): measured by one backward pass per sequence", len(self._rest), shown
            )

    def __call__(self, batch: dict[str, Tensor], direction: Direction | None = None) -> PairProducts:
        """Products of a right-padded batch in trl's layout.

        Pairs go through the model ``MAX_TOKENS`` at a time: more at once would be no faster and need more memory.

        Args:
            batch: the pairs.
            direction: measured parameter -> tensor of its shape, such as an optimizer's update: <gw, u> and <gl, u>
                are to first order what it does to the log-probs. Parameters that are left out do not move.
        """
        pairs, width = batch["input_ids"].shape[0] // 2, batch["input_ids"].shape[1]
        size = max(1, MAX_TOKENS // (2 * width))
        parts = (_some(batch, range(k, min(k + size, pairs))) for k in range(0, pairs, size))
        return _joined([self._of_pairs(part, direction) for part in parts])

    def _of_pairs(self, batch: dict[str, Tensor], direction: Direction | None) -> PairProducts:
        """Products of all pairs of a batch in one forward and one backward pass."""
        pairs = batch["input_ids"].shape[0] // 2
        totals = torch.zeros(3, pairs, dtype=torch.float64, device=batch["input_ids"].device)

        def visit(rule: Rule, call: Call) -> None:
            totals.add_(products_of_vectors(rule.vectors(call)) if rule.products is None else rule.products(call))

        groups = list(torch.arange(2 * pairs, device=totals.device).view(2, pairs).T)
        logps, along = self._measure(
            batch, groups, visit, lambda vectors: totals.add_(products_of_vectors(vectors)), direction
        )
        for k, gram in enumerate(self._head.take()):
            totals[:, k] += torch.stack([gram[0, 0], gram[1, 1], gram[0, 1]])
        return _pair_products(totals.cpu(), logps, along, batch)

    def gram(self, batch: dict[str, Tensor]) -> Tensor:
        """Inner products [2B, 2B] between all chosen and rejected gradients of a batch, float64 on the CPU."""
        return self.gram_and_pairs(batch)[0]

    def gram_and_pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, PairProducts]:
        """``gram`` and, from its diagonals, the products of each pair, by one forward and one backward pass.

        Forms the per-sequence gradients of one layer at a time: 2B times the largest layer of memory.
        """
        rows = batch["input_ids"].shape[0]
        total = torch.zeros(rows, rows, dtype=torch.float64, device=batch["input_ids"].device)

        def add(vectors: Tensor) -> None:
            for block in vectors.split(BLOCK, dim=1):
                total.add_((block @ block.T).double())

        groups = [torch.arange(rows, device=total.device)]
        logps, along = self._measure(batch, groups, lambda rule, call: add(rule.vectors(call)), add)
        gram = (total + self._head.take()[0]).cpu()
        squares = gram.diagonal().view(2, rows // 2)
        return gram, _pair_products(torch.cat([squares, gram.diagonal(rows // 2)[None]]), logps, along, batch)

    def _measure(
        self,
        batch: dict[str, Tensor],
        groups: list[Tensor],
        visit: Callable[[Rule, Call], None],
        visit_vectors: Callable[[Tensor], object],
        direction: Direction | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run forward and backward; ``visit`` sees each call of each layer with a rule.

        Returns log-probs and their derivatives along ``direction``, each [2B], float64.
        """
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        moved = direction or {}
        device = batch["input_ids"].device
        shift = torch.zeros(len(batch["input_ids"]), dtype=torch.float64, device=device, requires_grad=True)
        with self._ready(), moving(self._moves(moved), shift), self._hooks(visit) as seen:
            hidden = self.base.base_model(**inputs, use_cache=False).last_hidden_state
            seen.clear()
            logps, grad, along = self._head.forward(hidden, batch, groups, self._by_id(moved))
            if self._rest:
                along += self._by_autograd(hidden, grad, visit_vectors, moved)
            *_, at_shift = torch.autograd.grad(hidden, [*self._leaves, shift], grad, allow_unused=True)
        self._leaves = []
        if at_shift is not None:
            along += at_shift
        return logps, along if direction is not None else torch.full_like(along, torch.nan)

    def _moves(self, direction: Direction) -> dict[nn.Module, Direction]:
        """What moves in each module that a rule reaches, by parameter."""
        named = self._by_id(direction)
        own = (
            (module, {name: id(module.get_parameter(name)) for name in rules}) for module, rules in self._sites.items()
        )
        found = {module: {name: named[key] for name, key in keys.items() if key in named} for module, keys in own}
        if self._head.tied and id(self._head.embedding.weight) in named:
            found[self._head.embedding] = {"weight": named[id(self._head.embedding.weight)]}
        return {module: moved for module, moved in found.items() if moved}

    def _by_id(self, direction: Direction) -> dict[int, Tensor]:
        return {id(self.measured[name]): value for name, value in direction.items()}

    def _by_autograd(
        self,
        hidden: Tensor,
        grad: Tensor,
        visit_vectors: Callable[[Tensor], object],
        direction: Direction,
    ) -> Tensor:
        """Gradients of the parameters without a rule, one backward pass per sequence; their part along, [2B]."""
        rest = list(self._rest.values())
        rows = []
        self._by_rule = False
        for row in range(len(grad)):
            only = torch.zeros_like(grad)
            only[row] = grad[row]
            found = torch.autograd.grad(hidden, rest, only, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(rest, found, strict=True)])
        self._by_rule = True
        along = torch.zeros(len(grad), dtype=torch.float64, device=grad.device)
        for name, columns in zip(self._rest, zip(*rows, strict=True), strict=True):
            vectors = torch.stack([column.flatten() for column in columns])
            visit_vectors(vectors)
            if name in direction:
                along += vectors.double() @ direction[name].flatten().double()
        return along

    def _plan(self) -> tuple[dict[nn.Module, dict[str, Rule]], dict[str, nn.Parameter]]:
        """Modules with their rules, and the parameters that no rule reaches.

        A parameter counts as reached where the module that holds it is called in a forward pass exactly once, on every
        row, and no other module holds it too; the tied output head has a rule of its own.
        """
        names = {id(parameter): name for name, parameter in self.measured.items()}
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        inside_head = set(self.base.get_output_embeddings().modules())
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in names and module not in inside_head:
                    holders.setdefault(id(parameter), []).append((module, name))
        calls = self._trial({module for found in holders.values() for module, _ in found})
        sites: dict[nn.Module, dict[str, Rule]] = {}
        rest: dict[str, nn.Parameter] = {}
        for key, name in names.items():
            found = holders.get(key, [])
            rule = RULES.find(*found[0]) if len(found) == 1 and calls.get(found[0][0]) == [TRIAL_ROWS] else None
            if self._head.holds(self.measured[name]):
                if found and not (self._head.tied and [module for module, _ in found] == [self._head.embedding]):
                    raise ModelError(f"{name}: shared between the head and more than the embedding", code=CODE)
            elif rule is not None:
                sites.setdefault(found[0][0], {})[found[0][1]] = rule
            else:
                rest[name] = self.measured[name]
        return sites, rest

    def _trial(self, modules: set[nn.Module]) -> dict[nn.Module, list[int]]:
        """Rows of the output of each call of these modules in a forward pass over ``TRIAL_ROWS`` rows."""
        calls: dict[nn.Module, list[int]] = {module: [] for module in modules}
        hooks = [module.register_forward_hook(lambda m, _, out: calls[m].append(len(out))) for module in modules]
        device = next(self.model.parameters()).device
        ids = torch.zeros((TRIAL_ROWS, TRIAL_TOKENS), dtype=torch.long, device=device)
        with torch.no_grad(), self._ready():
            self.base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for hook in hooks:
            hook.remove()
        return calls

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model without dropout, caches, activation checkpointing and gradients of its weights."""
        training, checkpointing = self.model.training, getattr(self.base, "is_gradient_checkpointing", False)
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.eval()
        if checkpointing:
            self.base.gradient_checkpointing_disable()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in getattr(self, "_rest", {}).values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            if checkpointing:
                self.base.gradient_checkpointing_enable()
            self.model.train(training)

    @contextmanager
    def _hooks(self, visit: Callable[[Rule, Call], None]) -> Iterator[dict[int, tuple[Any, Input]]]:
        """Keep the input of each module with a rule, and visit it when the gradient at its output arrives.

        Yields what tells that two modules read the same tensor; to be cleared when the forward pass is over.
        """
        seen: dict[int, tuple[Any, Input]] = {}

        def arrived(module: nn.Module, entry: Input, grad: Tensor) -> None:
            if self._by_rule:
                with torch.no_grad():
                    for name, rule in self._sites[module].items():
                        visit(rule, Call(module, name, entry, grad))

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # else a rule is calling the module
                value = args[0] if args else next(iter(kwargs.values()))
                _, entry = seen.setdefault(id(value), (value, Input(value.detach())))
                if not output.requires_grad:
                    self._leaves.append(output.requires_grad_(True))
                output.register_hook(lambda grad: arrived(module, entry, grad))
            return output

        def start(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if output.is_leaf:
                output.requires_grad_(True)
            self._leaves.append(output)
            if self._head.tied:
                output.register_hook(self._head.receive)
            return output

        hooks = [self.base.get_input_embeddings().register_forward_hook(start)]
        hooks += [module.register_forward_hook(keep, with_kwargs=True) for module in self._sites]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


def _some(batch: dict[str, Tensor], pairs: range) -> dict[str, Tensor]:
    """These pairs of a batch in trl's layout, without the columns that are padding in all of them."""
    half = batch["input_ids"].shape[0] // 2
    rows = torch.tensor([*pairs, *(half + k for k in pairs)], device=batch["input_ids"].device)
    width = int(batch["attention_mask"][rows].sum(dim=1).max())
    return {name: value[rows, :width] for name, value in batch.items()}


def _joined(parts: list[PairProducts]) -> PairProducts:
    return PairProducts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(PairProducts)))


def _pair_products(totals: Tensor, logps: Tensor, along: Tensor, batch: dict[str, Tensor]) -> PairProducts:
    """From |gw|^2, |gl|^2, <gw, gl> [3, B], log-probs [2B] and derivatives [2B]."""
    length = batch["completion_mask"][:, 1:].sum(dim=1)
    columns = (logps.cpu(), length.cpu(), along.cpu())
    return PairProducts(*totals, *(part for column in columns for part in column.chunk(2)))
