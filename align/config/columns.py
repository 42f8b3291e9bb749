"""The columns of a pair table, in one place: what each holds, who writes it, which values it may have.

A pair table is a ``datasets.Dataset`` in trl's explicit-prompt preference format, plain or conversational, with further
columns from its source or from a stage. Validation, loading, streaming, scoring, filtering, objectives and the collator
take their column names from here. This module imports nothing heavy, because the command line reads it.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["id", "text", "json", "name", "number", "flag"]
"""id: a string that no other pair has; text: a string or a list of messages; json: a string that is JSON; name: a
string that several pairs may share; number: a finite float; flag: a bool."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a pair table."""

    name: str
    kind: Kind
    meaning: str
    written_by: str
    """The source of the pairs, or the stage that adds the column."""
    not_negative: bool = False
    """Whether a number must be at least 0."""
    loaded: bool = True
    """Whether loading keeps it: it may be mapped in ``pairs.columns``, and a source may bring it."""
    in_batch: bool = False
    """Whether the collator hands it to the trainer, one float32 per pair."""
    values: tuple[str, ...] = ()
    """The names that a column of names may have; any if empty."""


FINISH_REASONS = ("stop", "length")
"""How a sampled response ended: the model ended it, or the limit of tokens cut it off."""
CUT_OFF = FINISH_REASONS[1]


COLUMNS = (
    Column("id", "id", "identifies the pair across stages; a hash of the texts if the source has none", "source"),
    Column("prompt", "text", "what both responses answer", "source"),
    Column("chosen", "text", "the preferred response", "source"),
    Column("rejected", "text", "the other response", "source"),
    Column("tools", "json", "a list of tools that the chat template describes", "source"),
    Column("chat_template_kwargs", "json", "further arguments of the chat template: enable_thinking", "source"),
    Column(
        "chosen_finish_reason",
        "name",
        "stop, or length if a sampler cut the response off",
        "pairs build or source",
        values=FINISH_REASONS,
    ),
    Column("rejected_finish_reason", "name", "as chosen_finish_reason", "pairs build or source", values=FINISH_REASONS),
    Column("group", "name", "category of the pair, for metrics and objectives by group", "source"),
    Column("split_group", "name", "pairs of one name are not divided by splits", "source or near_copies"),
    Column("reward_chosen", "number", "reward of the chosen response", "reward model"),
    Column("reward_rejected", "number", "reward of the rejected response", "reward model"),
    Column("margin", "number", "reward_chosen - reward_rejected", "reward model or source", in_batch=True),
    Column("margin_std", "number", "standard deviation of an ensemble's margins", "reward model", not_negative=True),
    Column("margin_source", "name", "in-sample, cross-fitted, outside or unknown", "reward model"),
    Column("weight", "number", "factor of the pair's loss", "source or training", not_negative=True, in_batch=True),
    Column("checked", "flag", "a person vouches for the label", "pairs.checked", loaded=False),
    Column("ood", "number", "distance to the training pairs of the reward model", "filter", not_negative=True),
    Column("teacher_margin", "number", "margin by a teacher, for objectives that regress on it", "source"),
    Column("bag", "name", "bag of pairs of which only the share of votes is known", "source"),
    Column("vote_share", "number", "share of votes for the chosen, equal in a bag", "source", not_negative=True),
    Column("votes_chosen", "number", "raters who preferred the chosen", "pairs from or source", not_negative=True),
    Column("votes_rejected", "number", "raters who preferred the rejected", "pairs from or source", not_negative=True),
    Column("votes_tie", "number", "raters who preferred neither", "pairs from or source", not_negative=True),
    Column(
        "thumb",
        "number",
        "1: chosen is desirable, 0: undesirable, and rejected repeats it; nothing: a pair",
        "source, as completion and label",
        not_negative=True,
        in_batch=True,
    ),
    Column("trust", "number", "how far the margin of this pair is believed", "training", loaded=False, in_batch=True),
    Column("label_share", "number", "share of votes for the chosen", "training", loaded=False, in_batch=True),
    Column("quality", "number", "quality of the worse response, also as quality_<scorer>", "filter", loaded=False),
    Column("diversity", "number", "entropy of the nearest neighbors of the prompt", "filter", loaded=False),
    Column("importance", "number", "weighted sum of standardized margin, quality, diversity", "filter", loaded=False),
    Column("doubtful", "flag", "the margin contradicts the label strongly", "filter", loaded=False),
    Column("kept", "flag", "the filter keeps the pair", "filter", loaded=False),
    Column("reason", "name", "why the filter drops the pair", "filter", loaded=False),
)

TEXT = tuple(column.name for column in COLUMNS if column.kind == "text")
"""The three texts of a pair: prompt, chosen, rejected."""
RESPONSES = TEXT[1:]
LOADED = tuple(column.name for column in COLUMNS if column.loaded)
TEMPLATE_COLUMNS = tuple(column.name for column in COLUMNS if column.kind == "json")
"""Arguments of the chat template for a row, trl's names."""
TEMPLATE_KWARGS = TEMPLATE_COLUMNS[1]
OPTIONAL = tuple(column.name for column in COLUMNS if column.loaded and column.kind in ("json", "name", "number"))
"""Columns that a pair table may lack, in the order in which they follow ``id`` and ``TEXT``."""
NUMBERS = tuple(column.name for column in COLUMNS if column.loaded and column.kind == "number")
NAMES = tuple(column.name for column in COLUMNS if column.loaded and column.kind == "name")
VALUES = {column.name: column.values for column in COLUMNS if column.values}
"""The names that a column may have, where not every name is valid."""
FINISH_COLUMNS = {side: f"{side}_finish_reason" for side in RESPONSES}
"""Response -> the column that says how it ended, one of ``FINISH_REASONS``; a missing value counts as ``stop``."""
NOT_NEGATIVE = frozenset(column.name for column in COLUMNS if column.not_negative)
PAIR_COLUMNS = tuple(column.name for column in COLUMNS if column.in_batch)
"""Columns that the collator hands to the trainer, one float32 per pair."""

SPLIT_GROUP = "split_group"
"""Column whose names splits do not divide; near-copies on request."""
WEIGHT, CHECKED = "weight", "checked"
"""Factor of a pair's loss; whether the pair came with ``pairs.checked``."""
VOTES = ("votes_chosen", "votes_rejected", "votes_tie")
"""Numbers of raters who preferred the chosen response, the rejected one, neither."""
THUMB = "thumb"
"""Column that tells a single response with a thumb from a pair."""
SCORES = ("reward_chosen", "reward_rejected", "margin")
"""Columns that scoring writes."""
SPREAD = "margin_std"
"""Column that scoring adds if at least two models score."""
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of a tokenized pair table, trl's names: lists of int; the ids of a response follow those of its prompt."""
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
"""Columns of a tokenized pair table in which a response holds several messages: lists of 0 and 1, as long as the ids of
the response; 1 for the tokens that carry loss (align/models/turns.py)."""
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of a pair table with precomputed reference log-probs, trl's names: nats, summed over a response."""
