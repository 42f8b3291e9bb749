"""Train a reward model and score pairs with it: trl's reward script with one import changed."""

from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from reward_models import RewardConfig, RewardTrainer  # was: from trl import RewardConfig, RewardTrainer


def main() -> None:
    script, training, model = TrlParser((ScriptArguments, RewardConfig, ModelConfig)).parse_args_and_config()
    name = script.dataset_name
    dataset = load_dataset("json", data_files=name) if Path(name).is_file() else load_dataset(name)
    trainer = RewardTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
