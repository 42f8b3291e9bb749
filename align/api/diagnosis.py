"""``diagnose_pairs``: what a table of pairs can teach, before a model is trained on it."""

from typing import Any

from align.data.in_memory import pairs_from_dataset
from align.diagnosis.diagnose import diagnose
from align.errors import ConfigError, python_words


def diagnose_pairs(
    pairs: Any,
    model: str | None = None,
    *,
    loss: str = "dpo",
    held_out: Any = None,
    max_length: int = 1024,
    probe: bool = False,
) -> dict[str, Any]:
    """Look for shortcuts, noise and overlap; with a model, also for its distance, entanglement and cost.

    `align data check --deep` finds the same and writes a page.

    Args:
        pairs: what ``pairs_from_dataset`` takes.
        model: folder or hub id of the model that would be trained; None: only what the texts tell.
        loss: name in ``align.LOSSES`` whose first step is predicted.
        held_out: pairs of an evaluation that training must not have seen, or None.
        max_length: tokens of prompt and response together.
        probe: also train three steps per setting, in processes of their own, for seconds and memory.

    Returns:
        ``findings``, most important first, each with ``level`` (2 act, 1 look, 0 fine), ``says``, ``do`` and ``ids``;
        ``first``, at most three things to do; and the numbers behind them: ``shortcuts``, ``noise``, ``texts``,
        ``overlap``, ``tokens``, ``off_policy``, ``entanglement``, ``cost``.

    Raises:
        ConfigError: ``model`` is no name, or the loss is not known.
        DataError: the pairs cannot be used.
        ModelError: the model cannot be loaded.
    """
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"model: found {type(model).__name__}, expected its folder or hub id", code="config-option")
    table = pairs_from_dataset(pairs)
    with python_words():
        return diagnose(
            table,
            model=model,
            loss=loss,
            held_out=None if held_out is None else list(pairs_from_dataset(held_out)),
            max_length=max_length,
            probe=probe,
        )
