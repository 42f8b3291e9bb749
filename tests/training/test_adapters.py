"""One policy everywhere: what is trained with an adapter is what is sampled, evaluated, measured and referred to."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from align.config import LossSection, RemedySection, TokenMaskSection, TrainSection
from align.config.train import EntanglementSection
from align.entanglement.measure import MeasureJob, load_measured, measuring
from align.entanglement.products import GradientProducts
from align.entanglement.token_products import token_matrix, token_products
from align.errors import ConfigError, ModelError
from align.losses.registry import resolve
from align.models.adapter_folders import adapter_start
from align.models.layout import base_model, choose_layout, has_adapter
from align.models.loading import load_merged_policy, load_policy, load_tokenizer
from align.models.logps import add_completion_head, pair_logps
from align.models.tokenization import tokenize_pairs
from align.run.checks import check_train
from align.training import train as training
from align.training.adapters import CONTINUED, check_merges
from align.training.trainer import PreferenceTrainer
from tests.helpers.builders import changed_adapter, llama_config, make_base, rows

CLOSE = 1e-5
"""Difference of a token's log-prob (nats) that float32 explains."""
EXACT = 1e-9
"""The same in float64."""
TRAINER = {
    "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "bf16": False,
    "gradient_checkpointing": False,
}  # fmt: skip
LAYERS: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
EMBEDDING = {"target_modules": ["q_proj", "embed_tokens"]}
HEAD = {"target_modules": ["q_proj", "lm_head"]}
TIE = {"ensure_weight_tying": True}
FRESH: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "biases": {"bias": "all"},
    "bias of the update": {"lora_bias": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved head, tied": {"modules_to_save": ["lm_head"]} | TIE,
    "embedding": EMBEDDING,
    "embedding, tied": EMBEDDING | TIE,
    "head": HEAD,
    "tokens": {"trainable_token_indices": [4, 5, 9]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [4, 5, 9]}},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "activated": {"alora_invocation_tokens": [9]},
    "ranks": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
}
UNMERGED = {"bias of the update", "activated"}
TASK = {"task_type": "CAUSAL_LM"}
QV = TASK | {"target_modules": ["q_proj", "v_proj"]}
STARTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(**TASK, **LAYERS),
    "embedding": lambda: LoraConfig(**TASK, **LAYERS | EMBEDDING),
    "head": lambda: LoraConfig(**TASK, **LAYERS | HEAD),
    "tokens": lambda: LoraConfig(**TASK, **LAYERS, trainable_token_indices=[4, 5, 9]),
    "saved head": lambda: LoraConfig(**TASK, **LAYERS, modules_to_save=["lm_head"]),
    "loha": lambda: peft.LoHaConfig(**QV, r=2),
    "lokr": lambda: peft.LoKrConfig(**QV, r=2),
    "ia3": lambda: peft.IA3Config(**TASK, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(**TASK, target_modules=["q_proj"], r=4),
    "oft": lambda: peft.OFTConfig(**QV, r=4, oft_block_size=0),
    "boft": lambda: peft.BOFTConfig(**QV, boft_block_size=4),
    "layer norms": lambda: peft.LNTuningConfig(**TASK, target_modules=["input_layernorm"]),
    "vector bank": lambda: peft.VBLoRAConfig(**QV, r=2, vector_length=8, num_vectors=10),
    "fourier": lambda: peft.FourierFTConfig(**QV, n_frequency=20),
    "hra": lambda: peft.HRAConfig(**QV, r=2),
}


def on_bases(kinds: Iterable[str]) -> list[tuple[str, bool]]:
    """(kind, whether the base is tied): of adapters that leave embedding and head alone, one base is enough."""
    own = ("embedding", "head", "tokens")
    return [(kind, tied) for kind in kinds for tied in (False, True) if not tied or any(part in kind for part in own)]


def batch() -> dict[str, Tensor]:
    """Three pairs of 12 tokens; the invocation token 9 stands in each prompt."""
    ids = torch.randint(3, 21, (6, 12), generator=torch.Generator().manual_seed(3))
    ids[3:, :5] = ids[:3, :5]
    ids[:, 3] = 9
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": (torch.arange(12) >= 5).long().expand_as(ids).contiguous(),
    }


def plain(model: nn.Module) -> Tensor:
    """Log-probs [6, 11] of the tokens of ``batch`` from the full logits of a model as it is."""
    own, was = batch(), model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"], use_cache=False).logits
    model.train(was)
    logps = logits[:, -12:-1].double().log_softmax(dim=-1)
    return logps.gather(2, own["input_ids"][:, 1:, None])[..., 0]


def completions(logps: Tensor) -> Tensor:
    """The same, 0 in the prompts."""
    return logps * batch()["completion_mask"][:, 1:]


def scored(model: nn.Module, layout: Any = "concatenated") -> Tensor:
    """Log-probs [6, 11] of completion tokens by the training's own code, without dropout."""
    was = model.training
    model.eval()
    with torch.no_grad():
        found = pair_logps(model, batch(), layout).tokens.logps.double()
    model.train(was)
    return found


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.cpu() - other.cpu()).abs().max())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base with a head of its own, and one whose head is its embedding."""
    return [make_base(tmp_path_factory.mktemp("base"), tied=tied) for tied in (False, True)]


def section(model: Path, fields: dict[str, Any] | None, **more: Any) -> TrainSection:
    loss = LossSection(loss="dpo", parameters={"beta": 1.0})
    return TrainSection(**({"model": str(model), "methods": {"m": loss}, "peft": fields, "trainer": TRAINER} | more))


def train(config: TrainSection, output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PreferenceTrainer, Tensor]:
    """The trainer after two steps, and the reference log-probs [6] of ``batch`` before the first."""
    seen: list[Any] = []
    make = training.make_trainer

    def noted(*args: Any, **kwargs: Any) -> PreferenceTrainer:
        trainer = make(*args, **kwargs)
        seen.extend([trainer, torch.cat(trainer.compute_ref_log_probs(trainer.model, batch())).double()])
        return trainer

    monkeypatch.setattr(training, "make_trainer", noted)
    training.train_policy(Dataset.from_list(rows(8)), config, "m", output, seed=1)
    return seen[0], seen[1]


def one_policy_everywhere(config: TrainSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Train, and compare every way in which the policy and its reference are used; the policy to sample from."""
    first = plain(load_policy(config.model, dtype="float32"))
    trainer, reference = train(config, tmp_path / "out", monkeypatch)
    assert difference(reference, completions(first).sum(dim=1)) < 10 * CLOSE
    trained = plain(trainer.model)
    assert difference(trained, first) > 1e-2
    assert difference(scored(trainer.model, trainer.layout), completions(trained)) < CLOSE
    folder = str(tmp_path / "out" / "model")
    assert difference(plain(load_policy(folder, dtype="float32")), trained) < CLOSE
    unmerged = plain(load_policy(folder, dtype="float64"))
    sampled = load_merged_policy(folder, dtype="float64")
    assert difference(unmerged, trained) < 2 * CLOSE  # float32 rounds log-probs near 10 by 1e-6, at every layer
    assert difference(plain(sampled), unmerged) < EXACT
    assert has_adapter(load_merged_policy(folder, dtype="float32")) == has_adapter(sampled)
    if has_adapter(sampled):
        return sampled
    sampled.save_pretrained(tmp_path / "merged")
    assert difference(plain(load_policy(str(tmp_path / "merged"), dtype="float64")), unmerged) < EXACT
    measured_like(folder, trained, completions(first))
    return sampled


def measured_like(folder: str, trained: Tensor, first: Tensor) -> None:
    """The entanglement of the policy in ``folder``: log-probs, changes since the reference, products, token sums."""
    policy = load_measured(folder)
    job = MeasureJob(folder, None, resolve("dpo", {}), None, 2048, 64)
    work = measuring(policy, job)
    found = work(tokenize_pairs(Dataset.from_list(rows(2)), load_tokenizer(folder), max_length=64))
    own, gradients = batch(), GradientProducts(policy)(batch())
    logps = torch.cat([gradients.chosen_logps, gradients.rejected_logps])
    assert difference(logps, completions(trained).sum(dim=1)) < 10 * CLOSE
    with torch.no_grad():
        changes = torch.cat(work.reference_logps(own))  # type: ignore[attr-defined]
    assert difference(changes, first.sum(dim=1)) < 10 * CLOSE and len(found) == 2
    add_completion_head(base_model(policy))
    parameters = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    tokens = pair_logps(policy, own, "concatenated").tokens.logps
    vectors = []
    for row in (0, 3):
        policy.zero_grad()
        tokens[row].sum().backward(retain_graph=True)
        vectors.append({name: p.grad.double().clone() for name, p in parameters.items() if p.grad is not None})
    inner, *squares = (
        sum(float((a[name] * b[name]).sum()) for name in a) for a, b in (vectors, [vectors[0]] * 2, [vectors[1]] * 2)
    )
    scale = (squares[0] * squares[1]) ** 0.5
    assert abs(float(gradients.inner[0]) - inner) < 1e-5 * scale
    assert float(gradients.chosen_sq[0]) == pytest.approx(squares[0], rel=1e-5)
    moved = GradientProducts(policy)(own, {name: value.float() for name, value in vectors[1].items()})
    assert abs(float(moved.chosen_jvp[0]) - inner) < 1e-4 * scale
    assert float(moved.rejected_jvp[0]) == pytest.approx(squares[1], rel=1e-4)
    pair = {name: value[[0, 3]] for name, value in own.items()}
    for values in (*token_products(policy, pair), token_matrix(policy, pair)):
        assert abs(float(values.sum()) - inner) < 1e-4 * scale
    assert difference(plain(policy), trained) < CLOSE, "measuring changed the policy"


@pytest.mark.parametrize(("kind", "tied"), on_bases(FRESH))
def test_a_trained_adapter_is_one_policy(
    kind: str, tied: bool, bases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = section(bases[tied], LAYERS | FRESH[kind])
    sampled = one_policy_everywhere(config, tmp_path, monkeypatch)
    assert has_adapter(sampled) == (kind in UNMERGED)


@pytest.mark.parametrize(("kind", "tied"), on_bases(STARTS))
def test_an_adapter_that_is_trained_further_is_one_policy(
    kind: str, tied: bool, bases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reference is the adapter that it started from, here with weights of its own."""
    folder = changed_adapter(bases[tied], tmp_path / "start", STARTS[kind]())
    one_policy_everywhere(section(folder, None), tmp_path, monkeypatch)
    assert adapter_start(str(tmp_path / "out" / "model")) == str(tmp_path / "out" / "model" / "ref")


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("PiSSA", {"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' subtracts the adapter's start"),
    ("OLoRA", {"init_lora_weights": "olora"}, {}, "init_lora_weights: 'olora' subtracts the adapter's start"),
    ("EVA", {"init_lora_weights": "eva"}, {}, "init_lora_weights: 'eva' needs activations"),
    ("repeated layers", {"layer_replication": [[0, 2], [1, 2]]}, {}, "layer_replication: repeats layers"),
    ("KaSA", {"kasa_config": {}}, {}, "kasa_config: changes the base weights"),
    ("MonteCLoRA", {"monteclora_config": {}}, {}, "monteclora_config: draws weights"),
    ("Arrow", {"arrow_config": {}}, {}, "arrow_config: routes"),
    ("another task", {"task_type": "SEQ_CLS"}, {}, "task_type: found 'SEQ_CLS', expected CAUSAL_LM"),
    ("biases, live", {"bias": "all"}, {"trainer": TRAINER | {"precompute_ref_log_probs": False}}, "bias: found 'all'"),
    ("biases under a mask", {"bias": "lora_only"}, {"methods": {"m": LossSection(
        loss="dpo", token_mask=TokenMaskSection())}}, "bias: found 'lora_only', expected none"),
    ("a synced reference", {}, {"trainer": TRAINER | {"sync_ref_model": True}}, "sync_ref_model: found true"),
    ("activated, checkpointed", {"alora_invocation_tokens": [9]}, {"trainer": {}}, "cannot be trained with gradient"),
    ("activated, measured", {"alora_invocation_tokens": [9]}, {"entanglement": EntanglementSection()},
     "is not measured"),
    ("activated, remedied", {"alora_invocation_tokens": [9]}, {"methods": {"m": LossSection(
        loss="dpo", remedy=RemedySection(kind="normalise"))}}, "is not measured"),
    ("another revision", {}, {"trainer": TRAINER | {"model_init_kwargs": {"revision": "v2"}}},
     r"model_init_kwargs\.revision: found 'v2', expected none"),
    ("a GGUF file", {}, {"trainer": TRAINER | {"model_init_kwargs": {"gguf_file": "x.gguf"}}}, "gguf_file: found"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "more", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_cannot_be_one_policy_is_refused_when_the_run_is_checked(
    kind: str, fields: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check_train(section(tmp_path, LAYERS | fields, **more), {"output_dir": "x"})
    assert error.value.hint and error.value.code in ("adapter", "trainer-key")


@pytest.mark.parametrize(
    ("config", "tied", "message"),
    [
        (lambda: peft.PromptTuningConfig(**TASK, num_virtual_tokens=3), False, "peft_type: found PROMPT_TUNING"),
        (lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=3), False, "peft_type: found PREFIX_TUNING"),
        (lambda: peft.PromptEncoderConfig(**TASK, num_virtual_tokens=3, encoder_hidden_size=8), False, "P_TUNING"),
        (lambda: peft.AdaLoraConfig(**QV, total_step=9), False, "peft_type: found ADALORA"),
        (lambda: LoraConfig(**TASK, **LAYERS, bias="all"), False, "bias: found 'all', expected none"),
        (
            lambda: LoraConfig(**TASK, **LAYERS, init_lora_weights="pissa"),
            False,
            "'pissa' subtracts",
        ),
        (lambda: LoraConfig(**TASK, **LAYERS | EMBEDDING | TIE), True, "ensure_weight_tying: found True and a base"),
        (lambda: peft.TrainableTokensConfig(**TASK, token_indices=[4, 5]), True, "found 'TRAINABLE_TOKENS' and a base"),
    ],
)
def test_an_adapter_that_has_no_copy_is_not_trained_further(
    config: Callable[[], Any], tied: bool, message: str, tmp_path: Path
) -> None:
    folder = changed_adapter(make_base(tmp_path / "base", tied=tied), tmp_path / "start", config())
    with pytest.raises(ConfigError, match=message):
        check_train(section(folder, None), {"output_dir": "x"})
    sampled = load_merged_policy(str(folder), dtype="float32")  # to sample from it is right
    assert difference(plain(sampled), plain(load_policy(str(folder), dtype="float32"))) < CLOSE


def test_what_can_be_trained_further_is_what_is_tried_here() -> None:
    kinds = {make().peft_type.value for make in STARTS.values()}
    assert kinds <= set(CONTINUED)


def test_two_adapters_are_refused(tmp_path: Path) -> None:
    folder = changed_adapter(make_base(tmp_path / "base", tied=False), tmp_path / "start", STARTS["lora"]())
    with pytest.raises(ConfigError, match=r"found it and an adapter, .*, as train\.model"):
        check_train(section(folder, LAYERS), {"output_dir": "x"})


def test_rounds_need_an_adapter_that_merges(tmp_path: Path) -> None:
    for fields in ({"alora_invocation_tokens": [9]}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))}: found .*cannot be merged"):
            check_merges(section(tmp_path, LAYERS | fields))


def test_nothing_is_merged_in_16_bits(tmp_path: Path) -> None:
    """An update far below the spacing of the weights would be lost."""
    folder = changed_adapter(make_base(tmp_path / "base", tied=False), tmp_path / "start", STARTS["lora"]())
    assert has_adapter(load_merged_policy(str(folder), dtype="bfloat16"))
    assert not has_adapter(load_merged_policy(str(folder), dtype="float64"))


def test_an_adapter_of_another_task_is_no_policy(tmp_path: Path) -> None:
    folder = changed_adapter(make_base(tmp_path / "base", tied=False), tmp_path / "start", STARTS["lora"]())
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    with pytest.raises(ModelError, match="trained for the task SEQ_CLS, expected CAUSAL_LM"):
        load_policy(str(folder))


def test_an_activated_adapter_is_trained_row_by_row(tmp_path: Path) -> None:
    """It looks for its tokens in each row, and packed pairs are one."""
    fields = LoraConfig(**TASK, **LAYERS, alora_invocation_tokens=[9], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(llama_config()), fields)
    assert choose_layout(model, batch(), "auto") == "concatenated"
    with pytest.raises(ConfigError, match="an activated LoRA acts only after its invocation tokens"):
        choose_layout(model, batch(), "shared_prefix")
    assert difference(scored(model), completions(plain(model))) < CLOSE
    with pytest.raises(ModelError, match="gradient products are not measured: an activated LoRA"):
        GradientProducts(model)


def test_prompt_learning_is_not_measured() -> None:
    model = get_peft_model(LlamaForCausalLM(llama_config()), peft.PromptTuningConfig(**TASK, num_virtual_tokens=3))
    with pytest.raises(ModelError, match="gradient products are not measured: a prompt-learning adapter"):
        GradientProducts(model)
