"""RewardModel: a finished reward model, or an ensemble of them, that scores pairs and completions."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers.trainer_callback import TrainerState

from align.data.completions import ALLOWED
from align.data.in_memory import pairs_from_dataset
from align.data.messages import as_messages
from align.data.readers import Row
from align.data.training_pairs import margin_sources, report_in_sample, with_source
from align.data.validation import RowReader
from align.errors import ConfigError, DataError, ModelError, NumericsError, python_words
from align.io.console import log
from align.models.message_checks import check_pairs_of
from align.training.base.checkpoints import STATE, newest_complete_checkpoint
from reward_models.ensemble import SHARD, EnsembleScorer, members
from reward_models.loading import LoadOptions

MODEL_FILES = ("config.json", "adapter_config.json")


class RewardModel:
    """A reward model ready to score; ``from_pretrained`` loads one.

    Args:
        name: folder or hub id.
        scorer: its members.
        options: how they were loaded.
    """

    def __init__(self, name: str, scorer: EnsembleScorer, options: LoadOptions) -> None:
        self.name = name
        self.options = options
        self._scorer = scorer

    def __repr__(self) -> str:
        return f"RewardModel({self.name!r}, members={len(self._scorer.scorers)})"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        batch_tokens: int = 8192,
        max_length: int = 2048,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> "RewardModel":
        """Load a reward model in float32, an ensemble with all its members.

        Args:
            path: folder or hub id. Of a folder that holds only the checkpoints of a finished RewardTrainer, the last
                one is taken.
            batch_tokens: padded tokens per batch; no reward depends on it.
            max_length: tokens per text; longer ones are truncated on the right.
            trust_remote_code: code that comes with the model may run.
            device: where it computes, such as ``cpu`` or ``cuda:1``; None: on a GPU if there is one.

        Raises:
            ConfigError: a number is out of range, or the device or the path is none.
            ModelError: it cannot be loaded as a reward model, or its training has not finished.
        """
        for name, value in {"batch_tokens": batch_tokens, "max_length": max_length}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name}: found {value!r}, expected a whole number of at least 1", code="config-option"
                )
        if not isinstance(path, str | Path):
            raise ConfigError(f"path: found {type(path).__name__}, expected a folder or a hub id", code="config-option")
        check_device(device)
        with python_words():
            model, options = finished(str(path)), LoadOptions(trust_remote_code=trust_remote_code)
            scorer = EnsembleScorer(
                model, batch_tokens=batch_tokens, max_length=max_length, options=options, device=device
            )
        return cls(model, scorer, options)

    def score_pairs(self, pairs: Any) -> Dataset:
        """Add rewards and margins to pairs, as `align reward score` does.

        Args:
            pairs: what ``align.pairs_from_dataset`` takes.

        Returns:
            The pair table with ``reward_chosen``, ``reward_rejected``, ``margin`` (their difference),
            ``margin_source`` (``in-sample`` for pairs that the model was trained on, ``outside`` for others,
            ``unknown`` without a record), and for an ensemble ``margin_std``. Of an ensemble they are means over the
            members. A warning counts in-sample pairs.

        Raises:
            DataError: the pairs cannot be used, or the chat template refuses some.
            NumericsError: a reward is not finite.
        """
        table = pairs_from_dataset(pairs)
        models = [str(model) for model in members(self.name)]
        with python_words():
            check_pairs_of(table, models, trust_remote_code=self.options.trust_remote_code)
            scored = self._scorer.score_pairs(table, shard=SHARD)
        scored = with_source(scored, margin_sources(models, table))
        report_in_sample(scored, "score_pairs")
        return scored

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> np.ndarray:
        """Reward of each completion after its prompt, float64 [N]; of an ensemble the mean.

        Args:
            prompts: texts or lists of messages, [N].
            completions: in the form of their prompts: texts, or lists of messages by the assistant, [N].

        Raises:
            DataError: their numbers or forms differ, or one is neither text nor valid messages, of which a completion
                ends with the assistant's.
            NumericsError: a reward is not finite.
        """
        given = [_texts(name, values) for name, values in (("prompts", prompts), ("completions", completions))]
        if len(given[0]) != len(given[1]):
            raise DataError(
                f"completions: found {len(given[1])} for {len(given[0])} prompts, expected one for each",
                code="completion-count",
            )
        for number, (prompt, completion) in enumerate(zip(*given, strict=True)):
            if isinstance(prompt, str) != isinstance(completion, str):
                raise DataError(
                    f"completions[{number}]: found {'text' if isinstance(completion, str) else 'messages'}, expected "
                    "the form of its prompt",
                    code="pair-mixed",
                )
        _check_messages(*given)
        with python_words():
            rewards = self._scorer.score_completions(*given) if given[0] else np.empty(0)
        for place in np.flatnonzero(~np.isfinite(rewards))[:1]:
            raise NumericsError(f"completions[{place}]: found the reward {rewards[place]}", code="score-not-finite")
        return rewards


def finished(path: str) -> str:
    """The folder that holds the model: ``path``, or the last checkpoint below it if its training has finished.

    Raises:
        ModelError: there are only checkpoints of a training that has not.
    """
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).exists() for name in MODEL_FILES):
        return path
    last = newest_complete_checkpoint(folder)
    if last is None:
        return path
    state = TrainerState.load_from_json(str(last / STATE))
    if state.global_step < state.max_steps:
        raise ModelError(
            f"{path}: found the checkpoint of step {state.global_step} of {state.max_steps}, expected a finished model",
            code="model-load",
            hint=f"train on, or give the checkpoint itself: {last}",
        )
    log.info("%s: the model of its last checkpoint, %s", path, last)
    return str(last)


def check_device(device: Any) -> None:
    """Raise if a device has no such name, or is not here.

    Raises:
        ConfigError: says what it is.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"device: found {device!r:.60}, expected cpu or a GPU of this machine, such as cuda:0 ({reason:.120})",
            code="config-option",
        ) from None


def _texts(name: str, values: Any) -> list[Any]:
    """The values as texts or messages.

    Raises:
        DataError: not a sequence of such.
    """
    table = isinstance(values, pd.DataFrame | Dataset)  # iterates over names of columns, or over rows
    if table or isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__iter__"):
        raise DataError(
            f"{name}: found a {type(values).__name__}, expected a list of texts or of lists of messages",
            code="data-type",
            hint="take its column: table[...]" if table else "",
        )
    found = [as_messages(list(value) if isinstance(value, tuple | np.ndarray) else value) for value in values]
    for number, value in enumerate(found):
        if not isinstance(value, str | list):
            raise DataError(
                f"{name}[{number}]: found {value!r}, expected text or a list of messages", code="completion-row"
            )
    return found


def _check_messages(prompts: list[Any], completions: list[Any]) -> None:
    """Raise if a list of messages is not valid; texts may be anything.

    Raises:
        DataError: names the first message that has no role or content, an unknown role, or a wrong turn.
    """
    reader = RowReader("score", {"prompt"})
    for name, values in (("prompts", prompts), ("completions", completions)):
        for number, value in enumerate(values):
            if isinstance(value, str):
                continue
            cell = f"{name}[{number}]"
            problems = [
                one for one in reader.text(Row(number, {cell: value}), cell) if one.code not in ALLOWED or not value
            ]
            for problem in problems[:1]:
                message = problem.column.removeprefix(cell).strip("[]")
                raise DataError(
                    f"{cell}{message and f', message {message}'}: found {problem.found}, expected {problem.expected}",
                    code=problem.code,
                )
            if name == "completions" and value[-1]["role"] != "assistant":
                raise DataError(
                    f"{cell}: found a last message by {value[-1]['role']}, expected one by assistant", code="pair-role"
                )
