"""Exact |gw|^2, |gl|^2 and <gw, gl> of every pair of a batch, without a per-sequence gradient of the model.

gw and gl are the gradients of the summed log-probability of the chosen and of the rejected response over the trained
parameters (arXiv 2410.13828). One forward pass and one backward pass through the activations serve both responses of
all pairs: rows of a batch do not interact, so the gradient at a layer's output in one row belongs to that row alone.

The same two passes give the directional derivatives <gw, u> and <gl, u> along a direction u in parameter space: each
sequence gets a scalar that moves it alone along u, and the backward pass returns the derivative by that scalar.

Legend: B pairs, T padded tokens, D hidden size, V vocabulary, C scored tokens of one response.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align.entanglement.directional import Direction, shifted_along
from align.entanglement.head_products import HeadProducts
from align.entanglement.layer_rules import RULES, Call, Input, Rule, check_measurable, products_of_grads
from align.entanglement.own_rules import OwnRules
from align.entanglement.pair_products import PairProducts, concatenate, pair_products, select_pairs
from align.entanglement.trial import CODE, compare_with_autograd
from align.errors import ModelError
from align.io.console import log
from align.models.layout import base_model, has_adapter, is_bypassed
from align.models.logps import NOT_MODEL_INPUTS

TRIAL_ROWS, TRIAL_TOKENS = 2, 4
IN_PEFT = "base_model.model."
"""What the names of a peft model's parameters begin with."""
MAX_TOKENS = 512
"""Padded tokens of one forward and backward pass of pair products, unless a single pair has more."""
BLOCK = 2**16
"""Entries of per-sequence gradients whose products are summed in the model's precision; the blocks are in float64."""


class GradientProducts:
    """Measures pairs under one model.

    Args:
        model: causal language model, with its adapter if it has one.
        parameters: regular expression for the names of the parameters to measure; None: all that are trained.

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
        bypassed = is_bypassed(model)
        if bypassed is not None:
            raise ModelError(
                f"gradient products are not measured: {bypassed}", code=CODE, hint="measure another kind of adapter"
            )
        check_measurable(self.measured)
        self.head = HeadProducts(self.base, set(map(id, self.measured.values())))
        self._rest: dict[str, nn.Parameter] = {}
        self.sites, self._rest = self._plan()
        self._by_rule = True
        self._leaves: list[Tensor] = []  # the graph of activations starts here, since the weights are frozen
        self.covered = {
            "rule": sum(p.numel() for name, p in self.measured.items() if name not in self._rest),
            "autograd": sum(p.numel() for p in self._rest.values()),
        }
        """How many parameters are measured by a layer's rule and how many by one backward pass per sequence."""
        if self._rest:
            shown = ", ".join(list(self._rest)[:3]) + (" ..." if len(self._rest) > 3 else "")
            log.warning(
                "no rule for %d parameters (%s): measured by one backward pass per sequence", len(self._rest), shown
            )
        self.by_autograd = sorted({name.removeprefix(IN_PEFT) for name in self._rest})
        """Names of the parameters that no layer's rule measures."""
        if has_adapter(model):
            compare_with_autograd(model, self._squares_and_inner, self.measured)

    def __call__(
        self, batch: dict[str, Tensor], direction: Direction | None = None, *, squares: bool = True
    ) -> PairProducts:
        """Measure a right-padded batch in trl's layout.

        Pairs go through the model ``MAX_TOKENS`` at a time: more at once would be no faster and need more memory.

        Args:
            batch: the pairs.
            direction: measured parameter -> tensor of its shape, such as an optimizer's update: <gw, u> and <gl, u>
                are the first-order changes of the log-probs by it. Parameters that are left out do not move.
            squares: compute |gw|^2, |gl|^2 and <gw, gl>; without, they are NaN and the pass is cheaper.
        """
        pairs, width = batch["input_ids"].shape[0] // 2, batch["input_ids"].shape[1]
        size = max(1, MAX_TOKENS // (2 * width))
        parts = (select_pairs(batch, range(k, min(k + size, pairs))) for k in range(0, pairs, size))
        return concatenate([self._measure_part(part, direction, squares) for part in parts])

    def _squares_and_inner(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        found = self(batch)
        return found.chosen_sq, found.rejected_sq, found.inner

    def _measure_part(self, batch: dict[str, Tensor], direction: Direction | None, squares: bool) -> PairProducts:
        """Products of all pairs of a batch in one forward and one backward pass."""
        pairs = batch["input_ids"].shape[0] // 2
        totals = torch.zeros(3, pairs, dtype=torch.float64, device=batch["input_ids"].device)
        groups = list(torch.arange(2 * pairs, device=totals.device).view(2, pairs).T)
        if not squares:
            logps, jvp = self._measure(batch, groups, lambda rule, call: None, lambda grads: None, direction)
            return pair_products(torch.full_like(totals, torch.nan).cpu(), logps, jvp, batch)

        def visit(rule: Rule, call: Call) -> None:
            totals.add_(rule.pair_products(call))

        logps, jvp = self._measure(batch, groups, visit, lambda grads: totals.add_(products_of_grads(grads)), direction)
        return pair_products((totals + self._of_head()).cpu(), logps, jvp, batch)

    def _of_head(self) -> Tensor:
        """The head's part of |gw|^2, |gl|^2 and <gw, gl>, [3, B], after a forward pass in groups of one pair each."""
        return torch.stack([torch.stack([gram[0, 0], gram[1, 1], gram[0, 1]]) for gram in self.head.take()], dim=1)

    def products_of_head(self, hidden: Tensor, batch: dict[str, Tensor], embedded: Tensor | None) -> Tensor:
        """The head's part of |gw|^2, |gl|^2 and <gw, gl> from given hidden states, [3, B], float64.

        Args:
            hidden: last hidden states [2B, T, D].
            batch: right-padded, in trl's layout.
            embedded: gradients of the log-probs at the embedding's output, [2B, T, D]; for a tied head.
        """
        pairs = torch.arange(len(hidden), device=hidden.device).view(2, -1).T
        with self._frozen():
            self.head.forward(hidden, batch, list(pairs), {}, backward=False)
        if embedded is not None:
            self.head.receive(embedded)
        return self._of_head()

    def gram_and_pairs(self, batch: dict[str, Tensor]) -> tuple[Tensor, PairProducts]:
        """The Gram matrix of the gradients and the products of each pair, by one forward and one backward pass.

        It forms the per-sequence gradients of one layer at a time: 2B times the memory of the largest layer.

        Returns:
            Inner products [2B, 2B] between all chosen and rejected gradients, chosen first, float64 on the CPU, and
            the products that stand on its diagonals.
        """
        rows = batch["input_ids"].shape[0]
        total = torch.zeros(rows, rows, dtype=torch.float64, device=batch["input_ids"].device)

        def add(sample_grads: Tensor) -> None:
            for block in sample_grads.split(BLOCK, dim=1):
                total.add_((block @ block.T).double())

        groups = [torch.arange(rows, device=total.device)]
        logps, jvp = self._measure(batch, groups, lambda rule, call: add(rule.sample_grads(call)), add)
        gram = (total + self.head.take()[0]).cpu()
        squares = gram.diagonal().view(2, rows // 2)
        return gram, pair_products(torch.cat([squares, gram.diagonal(rows // 2)[None]]), logps, jvp, batch)

    def _measure(
        self,
        batch: dict[str, Tensor],
        groups: list[Tensor],
        visit: Callable[[Rule, Call], None],
        visit_grads: Callable[[Tensor], object],
        direction: Direction | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one forward and one backward pass.

        Args:
            batch: right-padded, in trl's layout.
            groups: disjoint sets of rows whose products with each other are wanted; together all rows.
            visit: gets each call of each layer with a rule.
            visit_grads: gets the per-sequence gradients [2B, P] of each parameter without a rule.
            direction: see ``__call__``.

        Returns:
            Log-probs and their derivatives along ``direction``, each [2B], float64.
        """
        inputs = {name: value for name, value in batch.items() if name not in NOT_MODEL_INPUTS}
        along = direction or {}
        device = batch["input_ids"].device
        shift = torch.zeros(len(batch["input_ids"]), dtype=torch.float64, device=device, requires_grad=True)
        with self._frozen(), shifted_along(self._by_module(along), shift), self._hooks(visit) as seen:
            hidden = self.base.base_model(**inputs, use_cache=False).last_hidden_state
            seen.clear()
            logps, grad, jvp = self.head.forward(hidden, batch, groups, self._by_id(along))
            if self._rest:
                jvp += self._by_autograd(hidden, grad, visit_grads, along)
            *_, at_shift = torch.autograd.grad(hidden, [*self._leaves, shift], grad, allow_unused=True)
        self._leaves = []
        if at_shift is not None:
            jvp += at_shift
        return logps, jvp if direction is not None else torch.full_like(jvp, torch.nan)

    def _by_module(self, direction: Direction) -> dict[nn.Module, Direction]:
        """The direction of each module with a rule, by the parameter's name within it."""
        by_id = self._by_id(direction)
        ids = (
            (module, {name: id(module.get_parameter(name)) for name in rules}) for module, rules in self.sites.items()
        )
        moved = {module: {name: by_id[key] for name, key in keys.items() if key in by_id} for module, keys in ids}
        if self.head.tied and id(self.head.embedding.weight) in by_id:
            moved[self.head.embedding] = {"weight": by_id[id(self.head.embedding.weight)]}
        return {module: parameters for module, parameters in moved.items() if parameters}

    def _by_id(self, direction: Direction) -> dict[int, Tensor]:
        return {id(self.measured[name]): value for name, value in direction.items()}

    def _by_autograd(
        self,
        hidden: Tensor,
        grad: Tensor,
        visit_grads: Callable[[Tensor], object],
        direction: Direction,
    ) -> Tensor:
        """Visit the gradients of parameters without a rule, one backward pass per sequence; return their JVP [2B]."""
        rest = list(self._rest.values())
        rows = []
        self._by_rule = False
        for row in range(len(grad)):
            only = torch.zeros_like(grad)
            only[row] = grad[row]
            grads = torch.autograd.grad(hidden, rest, only, retain_graph=True, allow_unused=True)
            rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(rest, grads, strict=True)])
            for parameter, of_head in zip(self.head.shared, self.head.shared_grads.get(row, ()), strict=False):
                place = next((k for k, one in enumerate(rest) if one is parameter), None)
                if place is not None:
                    rows[-1][place] = rows[-1][place] + of_head
        self._by_rule = True
        jvp = torch.zeros(len(grad), dtype=torch.float64, device=grad.device)
        for name, columns in zip(self._rest, zip(*rows, strict=True), strict=True):
            sample_grads = torch.stack([column.flatten() for column in columns])
            visit_grads(sample_grads)
            if name in direction:
                jvp += sample_grads.double() @ direction[name].flatten().double()
        return jvp

    def _plan(self) -> tuple[dict[nn.Module, dict[str, Rule]], dict[str, nn.Parameter]]:
        """Modules with their rules, and the parameters without a rule.

        A rule applies if the module that holds the parameter is called exactly once in a forward pass, on every row,
        and no other module holds the parameter too; the tied output head has a rule of its own.
        """
        names = {id(parameter): name for name, parameter in self.measured.items()}
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        inside_head = set(self.base.get_output_embeddings().modules())
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in names and module not in inside_head:
                    holders.setdefault(id(parameter), []).append((module, name))
        calls = self._trial_calls({module for holding in holders.values() for module, _ in holding})
        sites: dict[nn.Module, dict[str, Rule]] = {}
        rest: dict[str, nn.Parameter] = {}
        for key, name in names.items():
            holding = holders.get(key, [])
            rule = RULES.find(*holding[0]) if len(holding) == 1 and calls.get(holding[0][0]) == [TRIAL_ROWS] else None
            if self.head.holds(self.measured[name]):
                if holding and not (self.head.tied and [module for module, _ in holding] == [self.head.embedding]):
                    raise ModelError(f"{name}: shared between the head and more than the embedding", code=CODE)
            elif rule is not None and not any(self.measured[name] is shared for shared in self.head.shared):
                sites.setdefault(holding[0][0], {})[holding[0][1]] = rule
            else:
                rest[name] = self.measured[name]
        return sites, rest

    def _trial_calls(self, modules: set[nn.Module]) -> dict[nn.Module, list[int]]:
        """Run a forward pass over ``TRIAL_ROWS`` rows; return the output rows of each call of each module."""
        calls: dict[nn.Module, list[int]] = {module: [] for module in modules}
        own = OwnRules()

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[module].append(len(output))
            own.see(module, args)

        hooks = [module.register_forward_hook(keep) for module in modules]
        device = next(self.model.parameters()).device
        ids = torch.zeros((TRIAL_ROWS, TRIAL_TOKENS), dtype=torch.long, device=device)
        with torch.no_grad(), self._frozen():
            self.base.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for hook in hooks:
            hook.remove()
        own.check()
        return calls

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Switch off dropout, activation checkpointing and the gradients of all weights with a rule; restore them."""
        training, checkpointing = self.model.training, getattr(self.base, "is_gradient_checkpointing", False)
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.eval()
        if checkpointing:
            self.base.gradient_checkpointing_disable()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in self._rest.values():
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

        Yields the inputs by ``id``, so that modules that read the same tensor share one; clear it after the forward
        pass.
        """
        seen: dict[int, tuple[Any, Input]] = {}

        def arrived(module: nn.Module, entry: Input, grad: Tensor) -> None:
            if self._by_rule:
                with torch.no_grad():
                    for name, rule in self.sites[module].items():
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
            if self.head.tied:
                output.register_hook(self.head.receive)
            return output

        hooks = [self.base.get_input_embeddings().register_forward_hook(start)]
        hooks += [module.register_forward_hook(keep, with_kwargs=True) for module in self.sites]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
