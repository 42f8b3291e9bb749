"""The folder in which the examples of docs/python.md run: tiny models under the names of real ones, pairs, prompts."""

import json
from pathlib import Path

from tests.helpers.builders import bert_reward, causal, llama_reward, rows

PROMPTS = 12


def write_page_folder(folder: Path) -> None:
    """Write models, ``pairs.jsonl`` (with margins) and ``prompts.jsonl`` into ``folder``."""
    causal(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    causal(folder / "out", seed=1)
    bert_reward(folder / "distilbert-base-uncased")
    bert_reward(folder / "sentence-transformers" / "all-MiniLM-L6-v2")
    llama_reward(folder / "rm")
    pairs = rows(52)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    prompts = [{"prompt": row["prompt"]} for row in pairs[:PROMPTS]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
