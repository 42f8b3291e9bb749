"""Experiment trackers behind one interface: TensorBoard, W&B, MLflow, trackio."""

import importlib
import json
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from align.config.leaves import leaves

EVENTS = "events.out.tfevents.*"
PREFIX = "align."
"""Of parameters in MLflow, where no name can be given a second value."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The names under which trackers show one training."""

    name: str
    """``<run>-<method>``, or ``<run>-reward`` and ``<run>-reward-fold-0`` for a reward model."""
    group: str
    """Name of the run that the training is a part of."""
    folder: Path
    """Folder of TensorBoard's files and of the trackers' ids. It outlives the checkpoints."""
    config: Mapping[str, Any]
    """What the trackers show in addition to the trainer's own configuration."""

    def part(self, part: str) -> "TrackedRun":
        """The tracked run of one of several trainings: a fold, a member of an ensemble."""
        name = f"{self.name}-{part}"
        method = f"{self.config['method']}-{part}"
        return replace(self, name=name, folder=self.folder.with_name(name), config={**self.config, "method": method})


class Tracker(ABC):
    """One experiment tracker; ``args`` are the trainer's arguments."""

    name: str
    callback: type[TrainerCallback]

    @abstractmethod
    def open(self, run: TrackedRun, args: TrainingArguments, known: str | None, step: int) -> str:
        """Open the tracked run, or the one with the id ``known`` again at ``step``; return its id."""

    def hand_over(self, callback: Any) -> None:  # noqa: B027  most callbacks find the open run themselves
        """Let transformers' callback log into the open run."""

    @abstractmethod
    def add_config(self, config: Mapping[str, Any], callback: Any = None) -> None:
        """Show ``config``, nested JSON values, with the open run."""

    @abstractmethod
    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log numbers into the open run."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Finish the open run."""


class TensorBoard(Tracker):
    """Event files in the tracked run's folder."""

    name, callback = "tensorboard", TensorBoardCallback

    def open(self, run: TrackedRun, args: TrainingArguments, known: str | None, step: int) -> str:
        """Begin an event file; steps after ``step`` of an interrupted training are hidden, they are made again."""
        if known is None:
            for file in run.folder.glob(EVENTS):
                file.unlink()
        self.folder = str(run.folder)
        self.writer = _summary_writer()(log_dir=self.folder, purge_step=None if known is None else step + 1)
        return run.name

    def hand_over(self, callback: Any) -> None:
        """Give the writer to the callback."""
        callback.tb_writer, callback.logging_dir = self.writer, self.folder

    def add_config(self, config: Mapping[str, Any], callback: Any = None) -> None:
        """Add a text that TensorBoard renders as Markdown."""
        writer = getattr(callback, "tb_writer", None) or getattr(self, "writer", None)
        if writer is not None:
            writer.add_text("config", f"```json\n{json.dumps(config, indent=1, default=str)}\n```")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add a scalar per figure."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        """Close the event file."""
        self.writer.close()


class Wandb(Tracker):
    """A run of W&B; one that the user has opened is used and left open."""

    name, callback = "wandb", WandbCallback
    opened = False

    def open(self, run: TrackedRun, args: TrainingArguments, known: str | None, step: int) -> str:
        """Begin or resume a run in the project ``WANDB_PROJECT`` or ``args.project``."""
        wandb: Any = importlib.import_module("wandb")
        if wandb.run is None:
            self.opened = True
            wandb.init(
                project=os.environ.get("WANDB_PROJECT") or getattr(args, "project", None) or "huggingface",
                name=run.name,
                group=run.group,
                id=known or uuid.uuid4().hex[:12],
                resume="allow",
            )
        return str(wandb.run.id)

    def add_config(self, config: Mapping[str, Any], callback: Any = None) -> None:
        """Update the run's config."""
        wandb: Any = importlib.import_module("wandb")
        if wandb.run is not None:
            wandb.config.update(dict(config), allow_val_change=True)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write the figures into the summary, which a table of runs shows."""
        wandb: Any = importlib.import_module("wandb")
        wandb.run.summary.update(dict(figures))

    def close(self, *, failed: bool) -> None:
        """Finish the run, unless the user opened it."""
        if self.opened:
            importlib.import_module("wandb").finish(exit_code=int(failed))


class Mlflow(Tracker):
    """A run of MLflow, with the group as its tag."""

    name, callback = "mlflow", MLflowCallback

    def open(self, run: TrackedRun, args: TrainingArguments, known: str | None, step: int) -> str:
        """Begin or resume a run at ``MLFLOW_TRACKING_URI`` in ``MLFLOW_EXPERIMENT_NAME``."""
        mlflow: Any = importlib.import_module("mlflow")
        self.opened = mlflow.active_run() is None
        if self.opened:
            if os.environ.get("MLFLOW_EXPERIMENT_NAME"):
                mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
            mlflow.start_run(run_id=known, run_name=None if known else run.name, tags={"group": run.group})
        return str(mlflow.active_run().info.run_id)

    def add_config(self, config: Mapping[str, Any], callback: Any = None) -> None:
        """Log one parameter per leaf, ``align.loss_parameters.beta``; the trainer's own have no prefix."""
        mlflow: Any = importlib.import_module("mlflow")
        if mlflow.active_run() is not None:
            mlflow.log_params({f"{PREFIX}{name}": value for name, value in leaves(config)})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log a metric per figure."""
        importlib.import_module("mlflow").log_metrics(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:
        """End the run, unless the user opened it."""
        if self.opened:
            importlib.import_module("mlflow").end_run("FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """A run of trackio, in the project ``args.project``."""

    name, callback = "trackio", TrackioCallback

    def open(self, run: TrackedRun, args: TrainingArguments, known: str | None, step: int) -> str:
        """Begin or resume a run, as the callback does but in its group."""
        trackio: Any = importlib.import_module("trackio")
        trackio.init(
            project=args.project,
            name=run.name,
            group=run.group,
            space_id=args.trackio_space_id,
            private=args.hub_private_repo is not False,
            resume="must" if known else "never",
        )
        self.open_run = True
        return run.name

    def hand_over(self, callback: Any) -> None:
        """Keep the callback from opening a run of its own."""
        callback._initialized = True

    def add_config(self, config: Mapping[str, Any], callback: Any = None) -> None:
        """Update the run's config."""
        importlib.import_module("trackio").config.update(dict(config))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Log the figures at the last step."""
        importlib.import_module("trackio").log({**figures, "train/global_step": step})

    def close(self, *, failed: bool) -> None:
        """Finish the run; after a training that has ended, the callback has done so."""
        trackio: Any = importlib.import_module("trackio")
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, Wandb, Mlflow, Trackio)}
"""Trackers that get a run per training; others of ``report_to`` log as transformers does."""


def _summary_writer() -> Any:
    """The writer that transformers would use."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        return importlib.import_module("tensorboardX").SummaryWriter
