"""Train a policy on preference pairs: trl's DPO script with two lines changed."""

from pathlib import Path

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from align import PreferenceConfig as DPOConfig  # was: from trl import DPOConfig
from align import PreferenceTrainer as DPOTrainer  # was: from trl import DPOTrainer


def main() -> None:
    script, training, model = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
    name = script.dataset_name
    dataset = load_dataset("json", data_files=name) if Path(name).is_file() else load_dataset(name)
    trainer = DPOTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
