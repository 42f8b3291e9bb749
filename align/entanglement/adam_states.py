"""The Adam state that a checkpoint holds, and the learning rates that its training logged."""

from pathlib import Path
from pickle import UnpicklingError  # nosec B403 - what torch.load raises with weights_only
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from align.entanglement.influence import AdamState
from align.errors import ModelError
from align.io.files import read_json

OPTIMIZER, HISTORY = "optimizer.pt", "history.json"


def read_adam_state(folder: Path, model: nn.Module, measured: dict[str, nn.Parameter]) -> AdamState | str:
    """The Adam state that a checkpoint keeps for the parameters of ``model``, or why there is none.

    Raises:
        ModelError: the state is that of other parameters.
    """
    file = folder / OPTIMIZER
    if not file.is_file():
        return f"{folder} holds no {OPTIMIZER}"
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        groups, moments = state["param_groups"], state["state"]
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        return f"{file} cannot be read ({type(error).__name__})"
    order = optimizer_order(model, len(groups))
    numbers = [number for group in groups for number in group["params"]]
    if len(order) != len(numbers):
        raise _other(file, f"found the state of {len(numbers)} parameters, expected {len(order)}")
    if not any("exp_avg_sq" in found for found in moments.values()):
        return f"{file} is not the state of an Adam optimizer"
    entries = {name: moments[number] for name, number in zip(order, numbers, strict=True) if number in moments}
    first, second = (_moments(entries, measured, file, key) for key in ("exp_avg", "exp_avg_sq"))
    step = max(float(found.get("step", 0)) for found in moments.values())
    betas = groups[0].get("betas", (0.9, 0.999))
    return AdamState(first, second, step, (float(betas[0]), float(betas[1])), float(groups[0].get("eps", 1e-8)))


def _moments(entries: dict[str, Any], measured: dict[str, nn.Parameter], file: Path, key: str) -> dict[str, Tensor]:
    """One moment of each parameter; zeros for one that never had a gradient."""
    made = {}
    for name, parameter in measured.items():
        found = entries.get(name, {}).get(key)
        if found is not None and found.shape != parameter.shape:
            wanted = f"expected {tuple(parameter.shape)} for {name}"
            raise _other(file, f"found moments of the shape {tuple(found.shape)}, {wanted}")
        made[name] = torch.zeros_like(parameter) if found is None else found.to(parameter)
    return made


def optimizer_order(model: nn.Module, groups: int = 2) -> list[str]:
    """Names of the trained parameters in the order of the optimizer of transformers' ``Trainer``.

    Args:
        model: as it was trained.
        groups: number of its parameter groups; of two, the first has the parameters with weight decay.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if groups == 1:
        return trained
    decays = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # reads nothing of a trainer
    return [name for name in trained if name in decays] + [name for name in trained if name not in decays]


def _other(file: Path, found: str) -> ModelError:
    return ModelError(
        f"{file}: {found}: the optimizer of another model",
        code="influence-checkpoint",
        hint="name the model that this training trained",
    )


def learning_rate(training: Path, since: int, step: int) -> float | None:
    """The mean learning rate that a training logged in the steps after ``since`` up to ``step``.

    Where it logged none there, the one logged nearest to ``step``; None without any.

    Args:
        training: folder of a finished ``train-<method>`` stage.
        since: optimizer step of the checkpoint before, or 0.
        step: optimizer step of the checkpoint.
    """
    file = training / HISTORY
    entries = read_json(file)["history"] if file.is_file() else []
    logged = [(int(row["step"]), float(row["learning_rate"])) for row in entries if "learning_rate" in row]
    within = [rate for at, rate in logged if since < at <= step]
    if within or not logged:
        return sum(within) / len(within) if within else None
    return min(logged, key=lambda entry: abs(entry[0] - step))[1]
