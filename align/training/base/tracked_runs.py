"""One tracked run per training, with a name, a group and its configuration, finished at the end.

transformers' callbacks (``report_to``) log the steps. They know neither that one process trains several models nor what
the loss is, and they write TensorBoard's files next to the checkpoints. ``tracked`` opens a run of each tracker before
the training and closes it afterwards; ``log_figures`` reopens it for numbers that are measured later.
"""

import importlib
import netrc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback, get_reporting_integration_callbacks

from align.errors import ConfigError, EnvironmentProblem
from align.io.console import log
from align.io.files import read_json, write_json
from align.training.base.checkpoints import last_complete_checkpoint
from align.training.base.trackers import TRACKERS, TrackedRun, Tracker

FOLDER = "tracking"
"""Folder of a run with one folder per tracked run; TensorBoard's ``--logdir``."""
FILE = "tracking.json"
"""File of a tracked run: the tracker's name -> the run's id there, and the last step."""
MISSING = re.compile(r"(\w+)Callback requires .*to be installed")
PACKAGE = re.compile(r"pip install ([\w.<>=!-]*\w)")
REPORTED_AS = {"azureml": "azure_ml", "comet": "comet_ml"}
"""Name in transformers' message -> name in ``report_to``, where they differ."""
FINAL = "final"
"""Prefix of the figures that are measured after the training."""
LOSS_TYPE = "loss_type"
"""trl's field for its own losses; trackers show it next to the loss."""


def tracked_run(root: Path, run: str, part: str, config: Mapping[str, Any] | None = None) -> TrackedRun:
    """The tracked run of one training of the run called ``run``, which writes into ``root``."""
    name = f"{run}-{part}"
    base = Path(os.environ.get("TENSORBOARD_LOGGING_DIR") or root / FOLDER)
    return TrackedRun(name, run, base / name, {"run": run, "method": part, **(config or {})})


class ShowConfig(TrainerCallback):
    """Adds what a trainer knows and its arguments do not (loss, data, versions) to the config of its trackers.

    Args:
        trainer: its ``tracked_config`` is shown; its callbacks tell the trackers.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the config after the trackers' own callbacks have opened their runs."""
        if state.is_world_process_zero:
            for kind, callback in _active(self.trainer):
                kind().add_config(self.trainer.tracked_config, callback)


@contextmanager
def tracked(trainer: Any, run: TrackedRun | None) -> Iterator[None]:
    """Within the block, trackers of ``report_to`` log the training of ``trainer`` as a run of its own.

    A training that resumes from a checkpoint continues its tracked run; one that starts anew begins another.

    Args:
        trainer: a ``ReliableTrainer``.
        run: names of the tracked run; None: transformers' own behavior.
    """
    if run is None or not trainer.is_world_process_zero():
        yield
        return
    trainer.args.run_name = run.name
    trainer.extra_config = dict(run.config)
    if hasattr(trainer.args, LOSS_TYPE) and "loss" in trainer.tracked_config:
        trainer.args.loss_type = [trainer.tracked_config["loss"]]  # trl has read it; trackers show it
    open_runs = _open(trainer, run)
    failed = True
    try:
        yield
        failed = False
    finally:
        if open_runs:
            state = {"ids": {tracker.name: key for tracker, key in open_runs}, "step": trainer.state.global_step}
            write_json(run.folder / FILE, state)
        for tracker, _ in open_runs:
            with _reported(f"{tracker.name}: {run.name} was not finished"):
                tracker.close(failed=failed)


def _open(trainer: Any, run: TrackedRun) -> list[tuple[Tracker, str]]:
    """Open a run of every active tracker, the earlier one if the training resumes; return them with their ids."""
    last = last_complete_checkpoint(Path(trainer.args.output_dir))
    step = 0 if last is None else int(last.rsplit("-", 1)[1])
    known = {} if last is None else _ids(run.folder)
    opened = []
    for kind, callback in _active(trainer):
        run.folder.mkdir(parents=True, exist_ok=True)
        tracker = kind()
        try:
            opened.append((tracker, tracker.open(run, trainer.args, known.get(kind.name), step)))
        except Exception as error:  # each package has errors of its own: no key, no network, a full disk
            for other, _ in opened:
                with _reported(other.name):
                    other.close(failed=True)
            raise EnvironmentProblem(
                f"report_to: {kind.name} cannot open a run ({' '.join(str(error).split())})", code="tracker",
                hint="log in to it or take its offline mode (docs/tracking.md), or leave it out",
            ) from None  # fmt: skip
        write_json(run.folder / FILE, {"ids": {one.name: key for one, key in opened}, "step": step})
        tracker.hand_over(callback)
    return opened


def log_figures(run: TrackedRun, args: Callable[[], TrainingArguments], figures: Mapping[str, float]) -> None:
    """Log numbers that were measured after a training into its tracked runs; without a tracked run, do nothing.

    A tracker that fails is reported and leaves the others, and the results, as they are.

    Args:
        run: the tracked run.
        args: makes the arguments of the trainer that logged it.
        figures: name -> number.
    """
    if not figures or not (run.folder / FILE).is_file():
        return
    named = {f"{FINAL}/{name}": value for name, value in figures.items()}
    step = int(read_json(run.folder / FILE)["step"])
    for name, key in _ids(run.folder).items():
        tracker = TRACKERS[name]()
        with _reported(f"{name}: the figures of {run.name} were not logged"):
            tracker.open(run, args(), key, step)
            tracker.log(named, step)
            tracker.close(failed=False)


def check_trackers(args: TrainingArguments, where: str) -> None:
    """Refuse trackers that are not installed, and W&B without a key.

    Args:
        args: the trainer's arguments.
        where: name of the field, for the message: ``train.trainer.report_to``.

    Raises:
        ConfigError: the first tracker that cannot be used.
    """
    for callback in get_reporting_integration_callbacks(args.report_to):
        with missing_tracker(where):
            callback()
        if callback is WandbCallback and not _wandb_can_log_in():
            raise ConfigError(
                f"{where}: found wandb, and no key to log in with", code="tracker",
                hint="run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline to log to a folder",
            )  # fmt: skip


@contextmanager
def missing_tracker(where: str) -> Iterator[None]:
    """Turn transformers' error about a tracker that is not installed into one with a code.

    Raises:
        ConfigError: the package of a tracker is missing.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        found, package = MISSING.search(message), PACKAGE.search(message)
        if found is None:
            raise
        name = REPORTED_AS.get(found[1].lower(), found[1].lower())
        raise ConfigError(
            f"{where}: found {name}, which is not installed",
            code="tracker",
            hint=f"pip install {package[1] if package else name}, or leave it out",
        ) from None


def _wandb_can_log_in() -> bool:
    """Whether W&B is offline or finds a key without asking for one."""
    if os.environ.get("WANDB_MODE", "online").lower() != "online" or os.environ.get("WANDB_DISABLED"):
        return True
    wandb: Any = importlib.import_module("wandb")
    return wandb.run is not None or bool(os.environ.get("WANDB_API_KEY") or _in_netrc(wandb.Settings().base_url))


def _in_netrc(address: str) -> bool:
    """Whether ~/.netrc, where ``wandb login`` writes its key, has one for the host of ``address``."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(str(urlsplit(address).hostname)) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Report an error of a tracker: the training and its figures do not depend on it."""
    try:
        yield
    except Exception as error:  # each package has errors of its own
        log.warning("%s (%s)", what, " ".join(str(error).split()))


def _ids(folder: Path) -> dict[str, str]:
    """Ids of the tracked runs, by tracker; empty if there are none."""
    if not (folder / FILE).is_file():
        return {}
    found: dict[str, str] = read_json(folder / FILE)["ids"]
    return found


def _active(trainer: Trainer) -> list[tuple[type[Tracker], TrainerCallback]]:
    """The trackers that the trainer logs to, with transformers' callbacks."""
    found = []
    for kind in TRACKERS.values():
        callback = next((one for one in trainer.callback_handler.callbacks if type(one) is kind.callback), None)
        if callback is not None:
            found.append((kind, callback))
    return found
