"""Columns of a pair table that weight its pairs, computed before training as the configuration asks."""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.config import LossSection, WeightsSection
from align.config.columns import ID_COLUMNS, MASK_COLUMNS, RESPONSES
from align.data.pairs import with_columns
from align.data.statistics import missing_values
from align.data.votes import label_shares, refuse_without_majority
from align.errors import ConfigError, DataError
from align.io.console import log
from align.losses.margin_weights import madpo_weight, trust_of_each
from align.losses.pair_weights import mean_one, moderate, shrink_by_distance
from align.losses.pairwise import PairLogps
from align.losses.registry import BoundLoss, resolve
from align.models.collator import ROW
from align.models.tokenization import encode_table, report_same_tokens
from align.models.turns import Turns, counted

NO_TOKEN = "their prompts fill max_length, or words of others that come before those that count"
"""Why a pair is left out of a training."""


def prepare_pairs(pairs: Dataset, weights: WeightsSection | None, loss: BoundLoss) -> tuple[Dataset, BoundLoss]:
    """Return the table with every column that the loss and ``weights`` need, and the loss that remains to be trained.

    Raises:
        ConfigError: the loss needs a margin and the table has none.
        DataError: some pairs have no value in a column that is needed.
    """
    require_margin(pairs, loss)
    pairs = without_missing_margins(pairs)
    pairs = add_trust(pairs, weights, loss)
    if weights is not None and weights.votes:
        pairs = with_columns(adjust_margins(pairs, weights), {"label_share": label_shares(pairs, "weights.votes")})
    else:
        if not ignores_label(loss):
            refuse_without_majority(pairs, f"the loss {loss.spec.name} reads no votes", "`weights: {votes: true}`")
        pairs, loss = add_weight(adjust_margins(pairs, weights), loss)
    pairs = normalize_weights(pairs, weights)
    refuse_no_weight(pairs)
    return pairs, loss


def refuse_no_weight(pairs: Dataset) -> None:
    """Raise if every pair has the weight 0, or if some have none.

    Raises:
        DataError: nothing would be trained, or a pair has no weight.
    """
    if len(pairs) and "weight" in pairs.column_names and not numbers(pairs, "weight", "the loss").any():
        raise DataError(
            f"weight: found 0 for each of {len(pairs)} pairs, expected more for some of them: nothing would be trained",
            code="weights-column",
            hint="give pairs a weight above 0, or leave the column out",
        )


def told_apart(pairs: Dataset, ids: Sequence[str], max_length: int | None, truncation: str) -> list[int]:
    """Rows of a tokenized table whose two responses differ as the model reads them; logs how many do not.

    The loss of a pair of equal sequences does not depend on the policy.

    Args:
        pairs: table with ``ID_COLUMNS``; without the column ``ROW``, pairs are named by their place.
        ids: id of the pair of each ``ROW``.
        max_length: tokens of prompt and response together; None: no limit.
        truncation: keep_start or keep_end, trl's ``truncation_mode``.

    Raises:
        DataError: no pair is left.
    """
    kept, alike, cut = [], [], 0
    rows = pairs[ROW] if ROW in pairs.column_names else None
    for k, (prompt, *responses) in enumerate(zip(*(pairs[name] for name in ID_COLUMNS), strict=True)):
        read = [_as_read(prompt, response, max_length, truncation) for response in responses]
        if read[0] != read[1]:
            kept.append(k)
        else:
            alike.append(str(k) if rows is None else ids[rows[k]])
            cut += responses[0] != responses[1]
    where = f"within max_length {max_length}" if cut == len(alike) else "after the chat template and the tokenizer"
    if 0 < cut < len(alike):
        where += f" ({cut} of them only within max_length {max_length})"
    report_same_tokens(alike, len(pairs), where)
    return kept


def trained_pairs(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    turns: Turns = "assistant",
) -> Dataset:
    """Return the pairs that a training does not leave out; see ``PreferenceTrainer._prepare_dataset``.

    Args:
        pairs: pair table with ``id``.
        tokenizer: of the policy.
        max_length: tokens of prompt and response together; None: no limit.
        truncation: keep_start or keep_end, trl's ``truncation_mode``.
        turns: whose words count in responses of several messages.

    Raises:
        DataError: no pair is left.
    """
    encoded = encode_table(pairs, tokenizer, turns=turns)
    tokens = encoded.select_columns([name for name in (*ID_COLUMNS, *MASK_COLUMNS) if name in encoded.column_names])
    rows = [k for k, row in enumerate(tokens) if counted(row, max_length, truncation)]
    if len(rows) < len(pairs):
        log.warning("%d of %d pairs are left out: " + NO_TOKEN, len(pairs) - len(rows), len(pairs))
    if not rows:
        raise DataError(
            f"none of {len(pairs)} pairs has a token of a response within max_length",
            code="empty-completion",
            hint="raise train.trainer.max_length",
        )
    table = tokens.select(rows).add_column(ROW, rows)
    kept = told_apart(table, [str(name) for name in pairs["id"]], max_length, truncation)
    return pairs if len(kept) == len(pairs) else pairs.select([rows[k] for k in kept])


def _as_read(
    prompt: list[int], response: list[int], max_length: int | None, truncation: str
) -> tuple[list[int], list[int]]:
    """Prompt and response as ``PairCollator`` truncates them."""
    if max_length is None:
        return prompt, response
    if truncation == "keep_end":
        response = response[-max_length:]
        room = max_length - len(response)
        return prompt[max(len(prompt) - room, 0) :], response
    return prompt[:max_length], response[: max(max_length - len(prompt), 0)]


def check_weights(method: str, config: LossSection, loss: BoundLoss) -> None:
    """Raise if the configured weights do not fit the loss.

    Raises:
        ConfigError: a tilt of a loss that has no value for a single pair, a shrunken margin for a loss that reads no
            margin, a trust of each pair for a loss without trust, votes for a loss of several pairs or of tokens.
    """
    weights = config.weights
    if weights is None:
        return
    if weights.tilt is not None and (loss.spec.coupled or config.token_mask is not None):
        raise ConfigError(
            f"train.methods.{method}.weights.tilt: {loss.spec.name} has no loss for a single pair",
            code="weights-loss",
            hint="use it with another loss, and without a token mask",
        )
    if weights.votes and (not loss.spec.from_logps or config.token_mask is not None or config.remedy is not None):
        raise ConfigError(
            f"train.methods.{method}.weights.votes: {loss.spec.name} has no mean over the labels of a single pair",
            code="weights-loss",
            hint="use it with a loss of the log-probs of a pair, such as dpo or madpo, without token_mask and remedy",
        )
    if (weights.ood is not None or weights.spread) and not loss.spec.needs_margin:
        raise ConfigError(
            f"train.methods.{method}.weights: ood and spread shrink the margin, and {loss.spec.name} reads none",
            code="weights-loss",
            hint="use them with madpo, trust or another loss that reads margins",
        )
    if weights.trust_by_spread and "trust" not in loss.parameters:
        raise ConfigError(
            f"train.methods.{method}.weights.trust_by_spread: {loss.spec.name} has no trust",
            code="weights-loss",
            hint="use it with the loss trust",
        )


def add_trust(pairs: Dataset, weights: WeightsSection | None, loss: BoundLoss) -> Dataset:
    """Add the column ``trust`` of each pair if ``weights`` asks for it.

    Raises:
        DataError: some pairs have no ``margin_std``.
    """
    if weights is None or not weights.trust_by_spread:
        return pairs
    spread = numbers(pairs, "margin_std", "weights.trust_by_spread")
    trust = trust_of_each(spread, float(loss.parameters["trust"]))
    return with_columns(pairs, {"trust": trust.numpy()})


def adjust_margins(pairs: Dataset, weights: WeightsSection | None) -> Dataset:
    """Moderate ``margin`` by ``margin_std`` and shrink it by ``ood``, as ``weights`` asks.

    Raises:
        DataError: a column that is needed is missing.
    """
    if weights is None or (weights.ood is None and not weights.spread):
        return pairs
    margin = numbers(pairs, "margin", "weights")
    if weights.spread:
        margin = moderate(margin, numbers(pairs, "margin_std", "weights.spread"))
    if weights.ood is not None:
        distance = numbers(pairs, "ood", "weights.ood")
        margin = shrink_by_distance(margin, distance, limit=weights.ood.limit, softness=weights.ood.softness)
    return pairs.remove_columns("margin").add_column("margin", margin.tolist())


def normalize_weights(pairs: Dataset, weights: WeightsSection | None) -> Dataset:
    """Divide ``weight`` by its mean if there is such a column and ``weights`` asks for it."""
    if weights is None or not weights.normalise or "weight" not in pairs.column_names:
        return pairs
    return pairs.remove_columns("weight").add_column("weight", mean_one(numbers(pairs, "weight", "weights")).tolist())


def numbers(pairs: Dataset, column: str, asked: str) -> Tensor:
    """Return a numeric column [N], float64.

    Args:
        pairs: pair table of N rows.
        column: its name.
        asked: setting that needs the column, for the message.

    Raises:
        DataError: the column is missing, or some pairs have no value in it.
    """
    if column not in pairs.column_names or len(missing_values(pairs, column)):
        hints = {
            "margin_std": "train an ensemble: reward.ensemble: 5",
            "ood": "let a filter measure it: filter.ood",
            "margin": "run `align reward score` first",
        }
        raise DataError(
            f"{column}: found no value for some pairs, expected one for each, for `{asked}`",
            code="weights-column",
            hint=hints.get(column, "give every pair a weight"),
        )
    return torch.from_numpy(np.asarray(pairs[column], dtype=np.float64))


def require_margin(pairs: Dataset, loss: BoundLoss) -> None:
    """Raise if the loss needs a margin and a pair has none.

    Raises:
        ConfigError: there is no such column.
        DataError: some pairs have no value in it.
    """
    if not loss.spec.needs_margin:
        return
    if "margin" not in pairs.column_names:
        raise ConfigError(
            f"loss {loss.spec.name} needs a `margin` column and the pair table has none",
            code="loss-needs-margin",
            hint="run `align reward score` first, or map the column in `pairs.columns`",
        )
    missing = missing_values(pairs, "margin")
    if len(missing):
        first = int(missing[0])
        name = repr(pairs["id"][first]) if "id" in pairs.column_names else f"in row {first}"
        raise DataError(
            f"margin: {len(missing)} of {len(pairs)} pairs have none, the first {name}; "
            f"expected one for each, for the loss {loss.spec.name}",
            code="loss-needs-margin",
            hint="run `align reward score` first, or leave these pairs out",
        )


def without_missing_margins(pairs: Dataset) -> Dataset:
    """Drop the column ``margin`` if it has gaps, once ``require_margin`` has passed.

    Raises:
        DataError: the table has weights, but not for every pair.
    """
    if "weight" in pairs.column_names:
        numbers(pairs, "weight", "the loss")
    if "margin" not in pairs.column_names or not (missing := len(missing_values(pairs, "margin"))):
        return pairs
    log.warning("margin: %d of %d pairs have none, so nothing is logged by margin", missing, len(pairs))
    return pairs.remove_columns("margin")


def trained_loss(loss: BoundLoss, weights: WeightsSection | None = None) -> BoundLoss:
    """The loss that remains to be trained once ``add_weight`` has put a weight of the margin into the table.

    With votes it stays as it is: the two labels of a pair have different weights.
    """
    voted = weights is not None and weights.votes
    return resolve("dpo", {"beta": loss.beta}) if loss.spec.name == "madpo" and not voted else loss


def ignores_label(loss: BoundLoss) -> bool:
    """Whether the loss is the same if chosen and rejected are exchanged and the margin is turned: it reads no label."""
    if not loss.spec.from_logps or not loss.spec.needs_margin:
        return False
    values = [
        torch.tensor(row, dtype=torch.float64) for row in ([-9.0, -7.0], [-8.5, -9.5], [-9.5, -8.0], [-8.0, -9.0])
    ]
    logps, margin = PairLogps(*values, *(torch.tensor([5.0, 6.0]) for _ in RESPONSES)), torch.tensor([1.5, -0.5])
    return bool(torch.allclose(loss(logps, margin), loss(logps.swapped, -margin)))


def add_weight(pairs: Dataset, loss: BoundLoss) -> tuple[Dataset, BoundLoss]:
    """Turn MADPO into a table column, ``weight`` times w(margin), and plain DPO.

    A weight that depends on the margin alone is constant during a run, so it is computed once and can be inspected
    before training. Any other loss is returned unchanged.

    Raises:
        ConfigError: the loss needs a margin and the table has none.
    """
    require_margin(pairs, loss)
    if loss.spec.name != "madpo":
        return pairs, loss
    parameters = {name: loss.parameters[name] for name in ("c_max", "c_min", "lam", "tau")}
    weight = madpo_weight(torch.tensor(pairs["margin"], dtype=torch.float64), **parameters)
    if "weight" in pairs.column_names:
        weight = weight * torch.tensor(pairs["weight"], dtype=torch.float64)
        pairs = pairs.remove_columns("weight")
    return pairs.add_column("weight", weight.tolist()), trained_loss(loss)
