"""The files of a whole job for scripts/bench/job.py: pairs for the reward model, pairs of dialogue lengths, prompts.

All texts are the demo's review snippets. A prompt or response of dialogue length is a chain of snippets, cut to a
number of words that is drawn from a log-normal distribution.
"""

import json
import random
import statistics
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from scripts.assets.demo_data import Snippet, human_pairs, read_snippets

PROMPT_WORDS, RESPONSE_WORDS = (70, 0.8), (46, 0.7)
"""Median and spread of the logarithm: 96 and 64 tokens in the median, as in single- and multi-turn dialogue."""
FEWEST, MOST = 4, 360
FILES = ("reward_pairs.jsonl", "heldout.jsonl", "pairs.jsonl", "prompts.jsonl")


def write_files(
    folder: Path, assets: Path, *, reward_pairs: int, pairs: int, prompts: int, seed: int
) -> dict[str, Any]:
    """Write ``FILES`` into ``folder``; return the numbers of rows and the mean words of each part."""
    snippets = read_snippets(assets / "snippets")
    rng = random.Random(seed)
    rng.shuffle(snippets)
    half = len(snippets) // 2
    words = cycle(chain.from_iterable(snippet.text.split() for snippet in snippets[half:]))
    dialogue = [
        {"id": f"pair-{k}", "prompt": _text(words, rng, PROMPT_WORDS)}
        | {side: " " + _text(words, rng, RESPONSE_WORDS) for side in ("chosen", "rejected")}
        for k in range(pairs)
    ]
    asked = [{"id": f"prompt-{k}", "prompt": _text(words, rng, PROMPT_WORDS)} for k in range(prompts)]
    labelled = _labelled(snippets[:half], reward_pairs + reward_pairs // 2, rng)
    tables = (labelled[:reward_pairs], labelled[reward_pairs:], dialogue, asked)
    for name, rows in zip(FILES, tables, strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    means = {
        side: statistics.mean(len(row[side].split()) for row in dialogue) for side in ("prompt", "chosen", "rejected")
    }
    return {"rows": {name: len(rows) for name, rows in zip(FILES, tables, strict=True)}, "mean_words": means}


def _labelled(snippets: list[Snippet], count: int, rng: random.Random) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in ("id", "prompt", "chosen", "rejected")}
        for row in human_pairs(snippets, count, rng)
    ]


def _text(words: Any, rng: random.Random, size: tuple[int, float]) -> str:
    median, spread = size
    count = int(median * rng.lognormvariate(0.0, spread))
    return " ".join(islice(words, min(max(count, FEWEST), MOST)))
