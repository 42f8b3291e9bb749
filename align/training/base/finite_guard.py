"""A callback that stops a training at the first gradient or weight that is NaN or infinite."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.distributed import process_rank
from align.errors import SHOWN, NumericsError
from align.io.files import write_json

FILE = "non_finite"


class FiniteSteps(TrainerCallback):
    """Checks the gradient norm before (``check_norm``) and the weights after each optimizer step.

    A failure is written to ``output_dir/non_finite.json`` (step, what, the pairs at fault, all pairs of the step; by
    process r > 0 to ``non_finite-r.json``) and raised; a gradient that is not finite never reaches the weights.

    Args:
        scaled: a loss scaler (fp16) is in use: gradients overflow now and then by design, the scaler skips such a
            step, and the norm is not checked.
    """

    def __init__(self, *, scaled: bool) -> None:
        self.scaled = scaled
        self.folder = Path()
        self.step = 0
        self.pairs: list[str] = []
        """Ids of the pairs of the current step so far."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the folder to write into from the arguments."""
        self.folder = Path(args.output_dir)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clear the pairs of the previous step."""
        self.step = state.global_step + 1
        self.pairs = []

    def check_norm(self, model: nn.Module, norm: Any) -> None:
        """Check the norm of the full gradient, over all processes, before clipping.

        Clipping turns a norm that overflows into a gradient of zeros, so the clipped gradient would look finite.

        Raises:
            NumericsError: it is not finite.
        """
        if not self.scaled and norm is not None and not math.isfinite(float(norm)):
            self.stop("gradient", self.pairs_at_fault(model), f"has the norm {float(norm)}")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the weights that the step has changed."""
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not all_finite(list(trained.values())):
            name = next(name for name, value in trained.items() if not all_finite([value]))
            self.stop("weight", [], f"{name} is not finite")

    def pairs_at_fault(self, model: nn.Module) -> list[str]:
        """Return the ids of the pairs whose own gradient is not finite; empty if that is not known."""
        return []

    def stop(self, what: str, at_fault: list[str], found: str) -> None:
        """Write the failure to disk and end the training.

        Args:
            what: ``loss``, ``gradient`` or ``weight``.
            at_fault: ids of the pairs at fault.
            found: rest of the sentence "the <what> of pairs <at_fault> <found>".

        Raises:
            NumericsError: always.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rank = process_rank()
        file = self.folder / (f"{FILE}.json" if rank == 0 else f"{FILE}-{rank}.json")
        write_json(file, {"step": self.step, "what": what, "at_fault": at_fault, "pairs": self.pairs})
        more = f" and {len(at_fault) - SHOWN} more" if len(at_fault) > SHOWN else ""
        kind = "pair" if len(at_fault) == 1 else "pairs"
        of_pairs = f" of {kind} {', '.join(at_fault[:SHOWN])}{more}" if at_fault else ""
        raise NumericsError(
            f"step {self.step}: the {what}{of_pairs} {found}; the {len(self.pairs)} pairs of this step are in {file}",
            code="non-finite",
            hint="look at those pairs; then try a smaller learning_rate, or float32 or bf16 instead of fp16",
        )


def gradient_norm(model: nn.Module) -> float:
    """Compute the norm of all gradients that exist, in their own precision, as clipping does."""
    return float(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def all_finite(tensors: list[Tensor]) -> bool:
    """Return whether every element of every tensor (of a DTensor: of its local shard) is finite; one device sync.

    NaN and infinities survive a sum, so one sum per tensor is enough unless it overflows; only then each element is
    looked at.
    """
    if not tensors:
        return True
    local = [value.to_local() if hasattr(value, "to_local") else value for value in tensors]
    device = local[0].device
    sums = torch.stack([value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).to(device) for value in local])
    if bool(torch.isfinite(sums).all()):
        return True
    return bool(torch.stack([torch.isfinite(value).all().to(device) for value in local]).all())
