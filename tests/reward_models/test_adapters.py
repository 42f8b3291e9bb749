"""Reward models from adapters: the head comes from the adapter or from its base, or the folder is refused."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from align.commands.evaluate_reward_model import evaluate
from align.commands.score import score_pairs
from align.config import OodSection, PairsSection, RewardSection, RunConfig
from align.errors import ConfigError, ModelError
from align.filtering.score_columns import distances
from align.io.files import write_json
from align.models.loading import load_policy
from align.run.checks import check_config
from align.run.iterate import load_iterate
from reward_models.loading import LoadOptions, load_reward_model
from reward_models.pairwise_judges import make_score_judge
from reward_models.scorers import ScorerSpec
from reward_models.tokenization import reward_ids
from reward_models.train import train_reward_model
from tests.helpers.builders import causal, rows, tokenizer, trained_adapter
from tests.helpers.foreign import TEXTS, by_transformers, foreign, scorer_of

FAST = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "use_cpu": True}
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def backbone_of(folder: Path, family: str) -> Path:
    """The folder of a language model (or an encoder's body) of a family, without a reward head."""
    whole = foreign(folder.with_name("whole-" + folder.name), family)
    model = AutoModelForSequenceClassification.from_pretrained(whole)
    shutil.copytree(whole, folder)
    model.base_model.save_pretrained(folder)
    return folder


def adapter_of(
    base: Path, folder: Path, config: PeftConfig | None = None, **settings: Any
) -> tuple[Path, PreTrainedModel]:
    """A reward adapter on a folder, with random weights and a random head, and the model merged by peft."""
    torch.manual_seed(11)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    wrapped = get_peft_model(model, config or LoraConfig(**(LORA | {"task_type": "SEQ_CLS"} | settings)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_((1.0 if "modules_to_save" in name else 0.1) * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder, wrapped.merge_and_unload()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "roberta"])
@pytest.mark.parametrize("head", ["adapter", "base"])
def test_a_reward_adapter_is_the_merged_model(family: str, head: str, tmp_path: Path) -> None:
    """With the head in modules_to_save on a backbone without one, or on a base that has it."""
    base = (backbone_of if head == "adapter" else foreign)(tmp_path / "base", family)
    modules = {"gpt2": ["c_attn"], "roberta": ["query"]}.get(family, LORA["target_modules"])
    folder, merged = adapter_of(base, tmp_path / "adapter", target_modules=modules)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    scorer = scorer_of(folder)
    ids = reward_ids(TEXTS, scorer.tokenizer, 64)
    expected = by_transformers(tmp_path / "merged", ids)
    assert np.ptp(expected) > 1e-2
    assert np.allclose(scorer.rewards(ids), expected, atol=1e-4)
    assert np.allclose(scorer_of(tmp_path / "merged").rewards(ids), expected, atol=1e-4)


KINDS: dict[str, PeftConfig] = {
    "dora": LoraConfig(**LORA, use_dora=True, task_type="SEQ_CLS"),
    "all linear layers, biases": LoraConfig(r=2, target_modules="all-linear", bias="all", task_type="SEQ_CLS"),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens"], task_type="SEQ_CLS"),
    "single tokens": LoraConfig(**LORA, trainable_token_indices=[3, 5], task_type="SEQ_CLS"),
    "norms": LoraConfig(**LORA, modules_to_save=["norm"], task_type="SEQ_CLS"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="SEQ_CLS"),
    "vera": VeraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"),
    "adalora": AdaLoraConfig(init_r=2, target_r=1, target_modules=["q_proj"], total_step=9, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_that_changes_weights(kind: str, tmp_path: Path) -> None:
    folder, merged = adapter_of(causal(tmp_path / "base"), tmp_path / "adapter", copy.deepcopy(KINDS[kind]))
    merged.save_pretrained(tmp_path / "merged")
    scorer = scorer_of(folder)
    ids = reward_ids(TEXTS, scorer.tokenizer, 64)
    expected = by_transformers(tmp_path / "merged", ids)
    assert np.ptp(expected) > 1e-2
    assert np.allclose(scorer.rewards(ids), expected, atol=1e-4)


IN_16_BITS: dict[str, PeftConfig] = {
    "lora": LoraConfig(**LORA, task_type="SEQ_CLS"),
    "dora": LoraConfig(**LORA, use_dora=True, task_type="SEQ_CLS"),
    "ia3": IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="SEQ_CLS"),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[3, 4], task_type="SEQ_CLS"),
    "embedding": LoraConfig(**LORA, modules_to_save=["embed_tokens"], task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("kind", IN_16_BITS)
def test_in_16_bits_an_adapter_stays_beside_its_base(kind: str, tmp_path: Path) -> None:
    """The sum of weight and update is not rounded, and the rewards are those of 32 bits up to rounding."""
    base = foreign(tmp_path / "base")
    folder, _ = adapter_of(base, tmp_path / "adapter", copy.deepcopy(IN_16_BITS[kind]))
    ids = [[5, 6, 7, 8, 9], [9, 4, 3, 8]]
    exact, rounded, without = (
        scorer_of(model, options=LoadOptions(dtype=dtype)).rewards(ids)
        for model, dtype in ((folder, "float32"), (folder, "bfloat16"), (base, "bfloat16"))
    )
    effect = np.abs(exact - without).max()
    assert effect > 0.5 and np.abs(rounded - exact).max() < 0.1 * effect
    made = load_reward_model(folder, dtype="bfloat16")[0]
    assert isinstance(made, PreTrainedModel) and any(isinstance(part, BaseTunerLayer) for part in made.modules())


def test_an_adapter_on_an_adapter_is_refused_in_16_bits(tmp_path: Path) -> None:
    first, _ = adapter_of(foreign(tmp_path / "base"), tmp_path / "first")
    second = tmp_path / "second"
    shutil.copytree(first, second)
    config = json.loads((second / "adapter_config.json").read_text())
    write_json(second / "adapter_config.json", config | {"base_model_name_or_path": str(first)})
    with pytest.raises(ModelError, match=r"an adapter on an adapter .* which is not merged in 16 bits, expected dtype"):
        load_reward_model(second, dtype="bfloat16")
    load_reward_model(second)


def test_an_adapter_that_is_a_prompt_is_refused(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "adapter"
    )
    tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"an adapter of the kind .*PROMPT_TUNING, which cannot be merged"):
        scorer_of(tmp_path / "adapter")


def test_a_policy_adapter_on_a_base_with_a_head_gives_its_rewards(tmp_path: Path) -> None:
    """No task type, no modules_to_save: the head is the base's."""
    base = foreign(tmp_path / "base")
    folder, merged = adapter_of(base, tmp_path / "adapter", task_type=None)
    merged.save_pretrained(tmp_path / "merged")
    scorer = scorer_of(folder)
    ids = reward_ids(TEXTS, scorer.tokenizer, 64)
    assert np.allclose(scorer.rewards(ids), by_transformers(tmp_path / "merged", ids), atol=1e-4)


def test_an_adapter_on_an_adapter_is_stacked(tmp_path: Path) -> None:
    """A reward adapter that was trained on a policy's: both count."""
    policy = trained_adapter(causal(tmp_path / "base"), tmp_path / "policy", seed=5)
    plain = load_policy(str(policy)).merge_and_unload()
    plain.save_pretrained(tmp_path / "tuned")
    tokenizer().save_pretrained(tmp_path / "tuned")
    folder, merged = adapter_of(tmp_path / "tuned", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(policy)})
    merged.save_pretrained(tmp_path / "merged")
    scorer = scorer_of(folder)
    ids = reward_ids(TEXTS, scorer.tokenizer, 64)
    assert np.allclose(scorer.rewards(ids), by_transformers(tmp_path / "merged", ids), atol=1e-4)


def test_an_adapter_with_tokens_of_its_own_loads(tmp_path: Path) -> None:
    """Its file has the embedding of more tokens than its base."""
    base = backbone_of(tmp_path / "base", "llama")
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    words = tokenizer()
    words.add_tokens(["splendid", "ghastly"])
    model.resize_token_embeddings(len(words))
    lora = LoraConfig(**LORA, task_type="SEQ_CLS", modules_to_save=["embed_tokens"])
    wrapped = get_peft_model(model, lora)
    wrapped.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    scorer = scorer_of(tmp_path / "adapter")
    ids = reward_ids(["a splendid film", "a ghastly plot"], scorer.tokenizer, 64)
    assert max(map(max, ids)) == len(words) - 1
    assert np.allclose(scorer.rewards(ids), by_transformers(tmp_path / "merged", ids), atol=1e-4)


@pytest.mark.parametrize("padding", ["<pad>", "<eos>"])
def test_the_head_of_an_adapter_is_read_where_trl_trained_it(padding: str, tmp_path: Path) -> None:
    """trl saves no config.json with an adapter: the padding token of its tokenizer says where the reward was read."""
    from trl import RewardConfig, RewardTrainer

    base, words = causal(tmp_path / "base"), tokenizer()
    words.pad_token = padding
    args = RewardConfig(output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=4, use_cpu=True,
                        bf16=False, report_to="none", save_strategy="no", learning_rate=1e-2)  # fmt: skip
    table = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows(8)])
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    trainer = RewardTrainer(model=model, args=args, train_dataset=table, processing_class=words,
                            peft_config=LoraConfig(**LORA, task_type="SEQ_CLS"))  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    scorer = scorer_of(tmp_path / "adapter")
    texts = [row["prompt"] + row["chosen"] for row in table]
    with torch.no_grad():
        own = [
            trainer.model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))
            .logits.item()
            for row in reward_ids(texts, scorer.tokenizer, 64)
        ]  # fmt: skip
    assert np.allclose(scorer.score_texts(texts), own, atol=1e-4)


def policy_of(folder: Path) -> Path:
    return trained_adapter(causal(folder / "base"), folder / "policy", seed=5)


VERBS: dict[str, Callable[[str, Path], Any]] = {
    "reward score": lambda model, file: score_pairs(
        PairsSection(path=str(file)), model, file.parent / "s", batch_tokens=64, max_length=64
    ),
    "eval reward-model": lambda model, file: evaluate(
        PairsSection(path=str(file)), model, file.parent / "e", chat=False, batch_tokens=64, max_length=64, seed=0
    ),
    "pairs build, best-of-n": lambda model, file: ScorerSpec(reward_model=model).load(),
    "judges": lambda model, file: make_score_judge(model),
    "filter": lambda model, file: distances(
        Dataset.from_list(rows(8)), OodSection(model=model, pairs=PairsSection(path=str(file))), file.parent / "cache"
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_policy_adapter_is_no_reward_model(verb: str, tmp_path: Path) -> None:
    """Every verb names the head that neither the adapter nor its base has."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    wanted = r"(?s)policy: has no weights score.weight, so it is not a reward model.*modules_to_save"
    with pytest.raises(ModelError, match=wanted):
        VERBS[verb](str(policy_of(tmp_path)), tmp_path / "pairs.jsonl")


def test_a_run_and_rounds_refuse_it_before_anything_runs(tmp_path: Path) -> None:
    """Where nothing is trained on top of it: distances of a filter, scores of sampled completions."""
    policy = policy_of(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(8)))
    pairs = {"path": str(tmp_path / "pairs.jsonl")}
    reward = {"model": str(policy), "trainer": FAST}
    distances = {"filter": {"ood": {"model": str(policy), "pairs": pairs}}}
    run = RunConfig.model_validate({"name": "r", "pairs": pairs, "reward": reward} | distances)
    wanted = r"(?s)policy: has no weights score.weight, so it is not a reward model.*modules_to_save"
    with pytest.raises(ModelError, match=wanted):
        check_config(run)
    rounds = {"name": "i", "prompts": pairs, "pairs": {"reward_model": str(policy)},
              "train": {"model": str(tmp_path / "base"), "methods": {"dpo": {"loss": "dpo"}}}}  # fmt: skip
    write_json(tmp_path / "rounds.yaml", rounds)
    with pytest.raises(ModelError, match=wanted):
        load_iterate(tmp_path / "rounds.yaml", None)
    check_config(RunConfig.model_validate({"name": "r", "pairs": pairs, "reward": reward}))


def test_an_adapter_that_lost_weights_is_refused(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base")
    folder, _ = adapter_of(base, tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    lost = next(name for name in weights if name.endswith("lora_A.weight"))
    for kind, kept in (("lacks", {k: v for k, v in weights.items() if k != lost}),
                       ("has", weights | {"base_model.model.gate.weight": torch.ones(2)})):  # fmt: skip
        save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(ModelError, match=f"the adapter {kind} "):
            scorer_of(folder)


def test_two_outputs_of_an_adapter_are_refused_before_a_model_loads(tmp_path: Path) -> None:
    base = causal(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter: its classification head has 2 outputs"):
        scorer_of(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("settings", [
    {"trainer": FAST}, {"head": "logistic"},
    {"trainer": FAST, "peft": {"r": 2, "target_modules": ["v_proj"]}},
], ids=["full", "logistic", "peft"])  # fmt: skip
def test_training_starts_from_an_adapter(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The saved folder is a plain model, trained on top of the merged adapter, and scores as it did when trained."""
    start = policy_of(tmp_path)
    if kind == "reward":
        start, _ = adapter_of(causal(tmp_path / "other"), tmp_path / "adapter")
    begin, _ = load_reward_model(start, new_head=True)
    assert all(parameter.requires_grad for parameter in begin.parameters())
    pairs = Dataset.from_list(rows(8))
    train_reward_model(pairs, RewardSection(model=str(start), max_length=64, **settings), tmp_path / "out", seed=0)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    scorer = scorer_of(tmp_path / "out")
    ids = reward_ids([row["prompt"] + row["chosen"] for row in pairs], scorer.tokenizer, 64)
    assert np.allclose(scorer.rewards(ids), by_transformers(tmp_path / "out", ids), atol=1e-4)
    assert (np.asarray(scorer.score_pairs(pairs)["margin"]) > 0).mean() >= 0.7
    trained, first = scorer.model.state_dict(), begin.state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    moved = (trained[name] - first[name]).abs().max()
    assert (0 < moved < 0.2) if settings.get("head") is None and "peft" not in settings else moved == 0
    assert isinstance(begin, PreTrainedModel) and not isinstance(begin, PeftModel)


def test_a_reward_adapter_trained_on_starts_with_its_head(tmp_path: Path) -> None:
    """A training without a step saves the merged model."""
    start, merged = adapter_of(causal(tmp_path / "other"), tmp_path / "adapter")
    config = RewardSection(model=str(start), max_length=64, trainer=FAST | {"max_steps": 1, "learning_rate": 0.0})
    train_reward_model(Dataset.from_list(rows(8)), config, tmp_path / "out", seed=0)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.allclose(saved[name], value, atol=1e-6) for name, value in merged.state_dict().items())


def test_a_policy_with_a_head_for_its_words_is_a_backbone(tmp_path: Path) -> None:
    """LoRA on the language model's head, or the head itself, is left out where a reward head is trained."""
    for settings in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        lora = LoraConfig(**(LORA | {"task_type": "CAUSAL_LM"} | settings))
        model = AutoModelForCausalLM.from_pretrained(causal(tmp_path / "base"), dtype="float32")
        folder = tmp_path / str(len(settings["target_modules"]) if "target_modules" in settings else 0)
        wrapped = get_peft_model(model, lora)
        wrapped.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        loaded, _ = load_reward_model(folder, new_head=True)
        name = "model.layers.0.self_attn.q_proj.weight"
        assert torch.allclose(loaded.state_dict()[name], wrapped.merge_and_unload().state_dict()[name], atol=1e-6)


def test_an_adapter_that_merging_changes_is_refused(tmp_path: Path) -> None:
    """Two layers that share a weight of the base would each get the changes of both."""
    base = foreign(tmp_path / "base")
    folder, _ = adapter_of(base, tmp_path / "adapter", layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(ModelError, match=r"model-load.*cannot be merged into its base \(layer_replication repeats"):
        load_reward_model(folder)


@pytest.mark.parametrize(("fields", "words"), [
    ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication: repeats layers of the base"),
    ({"alora_invocation_tokens": [4]}, r"alora_invocation_tokens: an activated LoRA cannot be merged"),
    ({"lora_bias": True}, r"lora_bias: .*layers.0.self_attn.q_proj has no bias"),
    ({"task_type": "CAUSAL_LM"}, r"task_type: found 'CAUSAL_LM', expected SEQ_CLS"),
])  # fmt: skip
def test_an_adapter_that_could_not_be_saved_merged_is_refused_before_training(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = {"r": 2, "target_modules": ["q_proj"], **fields}
    reward = {"model": str(causal(tmp_path / "policy")), "peft": peft, "trainer": FAST}
    monkeypatch.setattr("reward_models.trainer.RewardTrainer.train", lambda *_: pytest.fail("training began"))
    with pytest.raises(ConfigError, match=rf"reward\.peft\.{words}"):
        train_reward_model(Dataset.from_list(rows(4)), RewardSection.model_validate(reward), tmp_path / "out", seed=0)
    if "lora_bias" not in fields:
        run = RunConfig.model_validate({"name": "r", "reward": reward, "pairs": {"path": str(tmp_path / "none.jsonl")}})
        with pytest.raises(ConfigError, match=rf"reward\.peft\.{words}"):
            check_config(run, tables=False)


def test_biases_of_an_adapter_go_into_those_of_the_base(tmp_path: Path) -> None:
    base = foreign(tmp_path / "base", "bert", words=tokenizer(eos=False))
    peft = {"r": 2, "target_modules": ["query"], "lora_bias": True}
    config = RewardSection(model=str(base), peft=peft, trainer=FAST | {"max_steps": 2}, max_length=64)
    train_reward_model(Dataset.from_list(rows(8)), config, tmp_path / "out", seed=0)
    assert np.isfinite(scorer_of(tmp_path / "out").score_texts(TEXTS)).all()
