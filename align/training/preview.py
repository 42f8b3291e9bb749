"""Print the first pair as the trainer sees it: prompt, responses, tokens that carry loss, margin and weight."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.io.console import err, log


def show_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print one tokenized pair to stderr; tokens that carry loss are colored.

    Args:
        row: a row of the trainer's dataset with ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        tokenizer: decodes the ids, special tokens included.
    """
    if not log.isEnabledFor(20):
        return
    err.print(Text("first pair as the model sees it (colored tokens carry loss):", style="bold"))
    for side, style in (("chosen", "green"), ("rejected", "red")):
        text = Text(f"  {side:<9}")
        text.append(tokenizer.decode(row["prompt_ids"]), style="dim")
        text.append(tokenizer.decode(row[f"{side}_ids"]), style=style)
        text.append(f"  [{len(row['prompt_ids'])} + {len(row[f'{side}_ids'])} tokens]", style="dim")
        err.print(text)
    numbers = [f"{name} {row[name]:.3f}" for name in ("margin", "weight") if name in row]
    if numbers:
        err.print(f"  {', '.join(numbers)}")
