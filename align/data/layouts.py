"""Which columns of a table are prompt, chosen and rejected, by the names that public preference data use."""

from collections.abc import Collection
from dataclasses import dataclass

from align.config.columns import TEXT

NAMES = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "post", "history", "context", "problem"),
    "chosen": (
        "chosen", "chosen_response", "response_chosen", "preferred", "preferred_response", "accepted", "winner", "win",
        "better", "better_response", "positive", "pos", "y_w",
    ),
    "rejected": (
        "rejected", "rejected_response", "response_rejected", "dispreferred", "non_preferred", "unpreferred", "loser",
        "lose", "worse", "worse_response", "negative", "neg", "y_l", "dispreferred_response",
    ),
}  # fmt: skip
"""Column of a pair table -> names for it, most common first."""
SYSTEM = ("system", "system_prompt")
OTHER = {
    "a list of scored completions per prompt (as in UltraFeedback)": ({"completions"}, {"responses", "scores"}),
    "battles of two conversations with a winner (as in Chatbot Arena)": ({"conversation_a", "conversation_b"},),
    "two responses and the number of the better one (as in SafeRLHF)": (
        {"response_0", "response_1"}, {"response_a", "response_b"}, {"response1", "response2"},
        {"output_1", "output_2"}, {"human_ref_A", "human_ref_B"}, {"summaries", "choice"},
    ),
    "single completions with thumbs (as for KTO)": ({"completion", "label"},),
    "responses with attributes (as in HelpSteer)": ({"response", "helpfulness"},),
}  # fmt: skip
"""What a table holds in place of pairs -> sets of columns by which it is known."""


@dataclass(frozen=True, slots=True)
class Guess:
    """How the columns of a table map to those of a pair table."""

    columns: dict[str, str]
    """Name in the pair table -> name in the source, without those that have the same name already."""
    notes: tuple[str, ...] = ()
    """What the user should know of the mapping, one sentence each."""
    problem: str = ""
    """Why the table is none of pairs; empty if it is."""


def guess_columns(names: Collection[str]) -> Guess:
    """Map the columns of a table to prompt, chosen and rejected.

    Args:
        names: of all columns of the source.
    """
    lower = {name.lower(): name for name in names}
    found = {column: next((lower[one] for one in NAMES[column] if one in lower), None) for column in TEXT}
    if found["chosen"] is None or found["rejected"] is None:
        kind = next((what for what, sets in OTHER.items() if any(one <= set(names) for one in sets)), "")
        return Guess({}, problem=kind or "no two columns that look like a preferred and another response")
    notes = []
    system = next((lower[one] for one in SYSTEM if one in lower), None)
    if system is not None:
        notes.append(f"The column {system!r} is not used: a system prompt has to be a message of the prompt.")
    if {"instruction", "input"} <= set(lower):
        notes.append(f"The column {lower['input']!r} is not used: it belongs into the prompt where it is not empty.")
    if found["prompt"] is None:
        notes.append("There is no column of prompts: each prompt is what both responses begin with.")
    columns = {column: name for column, name in found.items() if name is not None and name != column}
    return Guess(columns, tuple(notes))
