"""A script for trl with two names changed, which a launcher may start in several processes: train, save, predict."""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from align import PreferenceConfig, PreferenceTrainer
from tests.helpers.builders import rows


def main(policy: str, folder: str, batch: int) -> None:
    pairs = Dataset.from_list(rows(16))
    fields: dict[str, Any] = {"report_to": "tensorboard", "bf16": False, "use_cpu": True, "disable_tqdm": True}
    args = PreferenceConfig(
        folder, loss="madpo", loss_kwargs={"tau": 1.5}, per_device_train_batch_size=batch, max_steps=3,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", per_device_eval_batch_size=4, **fields,
    )  # fmt: skip
    trainer = PreferenceTrainer(policy, args=args, train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    trainer.save_model()
    loss = trainer.predict(rows(16)).metrics["test_loss"]
    if trainer.is_world_process_zero():
        numbers = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "test": loss}
        (Path(folder) / "numbers.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
