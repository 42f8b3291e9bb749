"""`align eval reward-model` on RewardBench 2: the reward of every response, and the scores of the subsets."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from align.config import PairsSection
from align.data.readers import read_rows, stream_source
from align.errors import DataError
from align.evaluation.rewardbench2 import Question, is_best_of, read_question, scores
from align.io.console import log, out
from align.io.files import write_json
from align.io.hashing import digest
from reward_models.scorers import Score, score_in_chunks

REPORT = "reward_model.json"
CACHE = "response-scores"
KEY_DIGITS = 16


def best_of_rows(source: PairsSection) -> bool:
    """Whether the first readable row of a source is one of RewardBench 2."""
    return is_best_of(next((row.values for row in stream_source(source)[0] if not row.unreadable), {}))


def evaluate_best_of(
    source: PairsSection, model: str, key: str, load: Callable[[], Score], output: Path, *, chat: bool
) -> None:
    """Score every response once, write ``reward_model.json`` into ``output``, and print the scores as JSON.

    Args:
        source: rows of RewardBench 2.
        model: what scores, for the report.
        key: of the scores of this model; finished ones are kept below ``output``.
        load: loads what gives the rewards.
        output: folder to write into.
        chat: prompts and responses are given as messages.

    Raises:
        DataError: a row cannot be used.
    """
    questions = read_questions(source)
    rows = [(question.prompt, response) for question in questions for response in question.responses]
    as_read = [_messages(*row) if chat else row for row in rows]
    log.info("RewardBench 2: scoring %d responses to %d prompts of %s with %s", len(rows), len(questions), source.path,
             model)  # fmt: skip
    cache = output / CACHE / digest([key, as_read])[:KEY_DIGITS]
    flat = score_in_chunks(load, [row[0] for row in as_read], [row[1] for row in as_read], cache)
    ends = np.cumsum([len(question.responses) for question in questions])[:-1]
    found = scores(questions, np.split(flat, ends))
    write_json(
        output / REPORT,
        {
            "rewardbench2": found,
            "rewards": [one.tolist() for one in np.split(flat, ends)],
            "run": {
                "command": shlex.join(["align", *sys.argv[1:]]),
                "pairs": source.path,
                "model": model,
                "chat": chat,
            },
        },
    )
    out.print_json(json.dumps(found))
    log.info("numbers: %s", output / REPORT)


def read_questions(source: PairsSection) -> list[Question]:
    """The rows of RewardBench 2.

    Raises:
        DataError: a row cannot be used, or an id of the subset Ties is there twice.
    """
    found: list[Question] = []
    seen: set[str] = set()
    for row in read_rows(source)[: source.limit]:
        where = f"{row.file or source.path}:row {row.number}"
        if row.unreadable:
            raise DataError(f"{where}: {row.unreadable}", code="rewardbench")
        question = read_question(row.values, where)
        if question.ties and question.id in seen:
            raise DataError(f"{where}:id: found {question.id!r} again, expected each id once", code="rewardbench")
        seen |= {question.id} if question.ties else set()
        found.append(question)
    return found


def _messages(prompt: str, response: str) -> tuple[Any, Any]:
    return [{"role": "user", "content": prompt}], [{"role": "assistant", "content": response}]
