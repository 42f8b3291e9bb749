"""One training of a few steps, in one process or as one of several; ``processes.py`` starts it.

python -m scripts.gpu_check.worker FOLDER
"""

import argparse
from pathlib import Path
from typing import Any

from align.io.files import write_json
from align.training.base.arguments import build_lora
from align.training.preference_config import PreferenceConfig
from align.training.trainer import PreferenceTrainer
from scripts.gpu_check.cases import Settings
from scripts.gpu_check.training import LORA, pairs

STEPS = 3


def make_trainer(
    settings: Settings,
    folder: Path,
    *,
    steps: int = STEPS,
    lora: dict[str, Any] | None = None,
    loading: dict[str, Any] | None = None,
    rate: float = 1e-4,
    bf16: bool = False,
) -> PreferenceTrainer:
    """Return a trainer of DPO that takes all pairs in each step.

    Args:
        settings: model and sizes.
        folder: for checkpoints.
        steps: optimizer steps.
        lora: fields of peft.LoraConfig; None: all weights.
        loading: ``model_init_kwargs``; None: float32.
        rate: learning rate.
        bf16: mixed precision.
    """
    table = pairs(settings.pairs, settings.prompt, settings.completion)
    args = PreferenceConfig(
        output_dir=str(folder / "checkpoints"), pairs_per_step=settings.pairs, per_device_train_batch_size=1,
        max_steps=steps, learning_rate=rate, lr_scheduler_type="constant", bf16=bf16, use_cpu=not settings.gpu, seed=0,
        gradient_checkpointing=False, max_length=None, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, precompute_ref_log_probs=True, model_init_kwargs=loading,
    )  # fmt: skip
    adapter = build_lora(lora, path="lora", task_type="CAUSAL_LM")
    return PreferenceTrainer(settings.model, args=args, train_dataset=table, peft_config=adapter)


def losses_of(trainer: PreferenceTrainer) -> list[float]:
    """Train, and return the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    """Train, and write the losses of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has settings.json; gets losses.json")
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    settings = Settings.read(arguments.folder / "settings.json")
    trainer = make_trainer(settings, arguments.folder, lora=LORA if arguments.lora else None)
    losses = losses_of(trainer)
    if trainer.is_world_process_zero():
        write_json(arguments.folder / "losses.json", losses)


if __name__ == "__main__":
    main()
