"""Tables of single responses with thumbs under the losses that read them."""

from typing import Any

from datasets import Dataset

from align.config.columns import THUMB
from align.data.thumbs import mismatched, refuse_thumbs, without_other
from align.distributed import world_size
from align.errors import ConfigError
from align.io.console import log
from align.losses.spec import BoundLoss

IDEAL = (1.0, 4 / 3)
"""desirable_weight x desirable / (undesirable_weight x undesirable) of KTO, arXiv 2402.01306, eq. 8."""


def check_kind(table: Dataset, loss: BoundLoss, name: str) -> None:
    """Raise if a table has single responses and the loss compares pairs.

    Raises:
        DataError: names the first of them.
    """
    if not loss.spec.unpaired:
        refuse_thumbs(table, f"{name}, for the loss {loss.spec.name}")


def rows_per_step(args: Any) -> int:
    """Rows of an optimizer step over all processes."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size())


def single_responses(table: Dataset, loss: BoundLoss, step: int) -> Dataset:
    """A tokenized table with the second response that the loss reads; logs counts that its weights do not balance.

    Args:
        table: of responses with thumbs.
        loss: one of single responses.
        step: rows of an optimizer step.

    Raises:
        ConfigError: KTO's KL would be the response's own log-ratio.
    """
    parts = {part.spec.name: part for part in loss.parts}
    if "kto" not in parts:
        return without_other(table)
    if min(step, len(table)) < 2:
        raise ConfigError(
            f"loss kto: found {min(step, len(table))} response per optimizer step, expected at least 2: the KL is "
            "estimated from the responses to other prompts",
            code="loss-parameter",
            hint="raise per_device_train_batch_size, or train.pairs_per_step",
        )
    thumbs = table[THUMB]
    up, down = thumbs.count(1.0), thumbs.count(0.0)
    weights = [parts["kto"].parameter(name, 1.0) for name in ("desirable_weight", "undesirable_weight")]
    ratio = weights[0] * up / (weights[1] * down) if weights[1] * down else None
    if ratio is not None and not IDEAL[0] - 1e-9 <= ratio <= IDEAL[1] + 1e-9:
        log.warning("kto: %d desirable and %d undesirable responses with the weights %g and %g have the ratio %.3g; "
                    "its paper advises 1 to 4/3", up, down, *weights, ratio)  # fmt: skip
    return mismatched(table, step)
