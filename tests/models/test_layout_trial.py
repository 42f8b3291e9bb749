"""What the trial of the layouts finds: windows of the mask alone, adapters that look at their row, noise."""

import sys
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from align.errors import ConfigError
from align.models import attention
from align.models.layout import base_model, choose_layout, longest_sequence
from align.models.logps import pair_logps
from tests.models.test_logps import BATCH, make_batch, one_by_one, tiny

WINDOWED: dict[str, dict[str, Any]] = {
    "Qwen2Moe": {
        "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2, "num_experts": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2,
    },
    "Phimoe": {"sliding_window": 32, "num_local_experts": 2, "num_experts_per_tok": 2},
}  # fmt: skip
LONG = make_batch([(30, 14, 20), (4, 3, 5)])
SHORT = make_batch([(12, 10, 6), (4, 3, 5)])


def agree(model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    layout = choose_layout(model, batch, "auto")
    with torch.no_grad():
        found, expected = pair_logps(model, batch, layout), one_by_one(model, batch)
    return torch.allclose(torch.cat([found.chosen, found.rejected]).double(), expected, atol=1e-3)


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_of_the_mask_alone_is_seen(family: str) -> None:
    """These models do not hand their window to attention; rows below the window stay packed, longer ones do not."""
    model = tiny(family, **WINDOWED[family]).float()
    assert choose_layout(model, SHORT, "auto") == "shared_prefix" and agree(model, SHORT)
    assert choose_layout(model, SHORT, "auto", longest=50) == "concatenated"
    assert choose_layout(model, LONG, "auto") == "concatenated" and agree(model, LONG)
    with pytest.raises(ConfigError, match=r"shared_prefix is not exact for this model: in a trial its log-probs"):
        choose_layout(tiny(family, **WINDOWED[family]).float(), LONG, "shared_prefix")


@pytest.mark.parametrize("family", ["Mistral", "Gemma3Text"])
def test_a_window_that_attention_is_given_stays_packed(family: str) -> None:
    model = tiny(family, sliding_window=32).float()
    assert choose_layout(model, LONG, "auto") == "shared_prefix" and agree(model, LONG)


def test_the_longest_sequence_counts_the_longer_response() -> None:
    from datasets import Dataset

    ids = {"prompt_ids": [[1] * 3, [1] * 9], "chosen_ids": [[1], [1] * 2], "rejected_ids": [[1] * 8, [1]]}
    table = Dataset.from_dict(ids)
    assert longest_sequence(table, None) == 11 and longest_sequence(table, 7) == 7


def test_an_activated_lora_is_refused() -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    model = get_peft_model(tiny("Llama").float(), lora)
    assert choose_layout(model, BATCH, "auto") == "concatenated"
    with pytest.raises(ConfigError, match="an activated LoRA acts only after its invocation tokens, looked for"):
        choose_layout(model, BATCH, "shared_prefix")


def test_an_adapter_that_looks_at_its_row_is_found_before_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output is zero until the first step; the trial gives it weights and takes them back."""
    model = get_peft_model(tiny("Llama").float(), LoraConfig(r=2, target_modules=["v_proj"]))
    layer = base_model(model).model.layers[0].self_attn.v_proj
    plain = layer.forward

    def of_the_row(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        update = layer.lora_B["default"](layer.lora_A["default"](states)).cumsum(dim=1)
        return plain(states, *args, **kwargs) + update

    assert choose_layout(model, BATCH, "auto") == "shared_prefix"
    base_model(model).set_attn_implementation("sdpa")
    monkeypatch.setattr(layer, "forward", of_the_row)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert choose_layout(model, BATCH, "auto") == "concatenated"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Llama", {"attention_dropout": 0.1}), ("GPT2", {}), ("OPT", {"dropout": 0.1, "attention_dropout": 0.0})],
)
def test_noise_in_training_is_found(family: str, fields: dict[str, Any]) -> None:
    """Dropout as a module, as an argument of attention and as a function; the random state is left as it was."""
    model = tiny(family, **fields).float()
    state = torch.get_rng_state()
    assert choose_layout(model, BATCH, "auto", training=True) == "concatenated" and not model.training
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ConfigError, match="it draws noise in training, such as dropout"):
        choose_layout(model, BATCH, "shared_prefix", training=True)
    assert choose_layout(model, BATCH, "auto") == "shared_prefix"


def test_flash_attention_serves_packed_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the flash_attn package, which needs a GPU: its kernel is called and the numbers are exact."""
    calls = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, **kwargs: Any) -> Tensor:
        calls.append(causal)
        states = (part.transpose(1, 2) for part in (query, key, value))
        return scaled_dot_product_attention(*states, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def dropout_p(**kwargs: Any) -> dict[str, Any]:
        return {"causal": kwargs["is_causal"]}

    loaded = []

    def load(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        loaded.append(implementation)
        return (kernel, kernel, None, flash._pad_input, flash._unpad_input), (dropout_p, dict)

    model = tiny("Llama").float()
    expected = one_by_one(model, BATCH)
    home = sys.modules["transformers.modeling_utils"]
    for place in (flash, home):
        monkeypatch.setattr(place, "lazy_import_flash_attention", load)
    monkeypatch.setattr(type(model), "_flash_attn_import_error", lambda *args, **kwargs: None)
    monkeypatch.setattr(type(model), "_flash_attn_can_dispatch", lambda *args, **kwargs: None)
    model.set_attn_implementation("flash_attention_2")
    assert choose_layout(model, BATCH, "shared_prefix") == "shared_prefix"
    assert model.config._attn_implementation == attention.NAMES["flash_attention_2"]
    calls.clear()
    found = pair_logps(model, BATCH, "shared_prefix")
    assert torch.allclose(torch.cat([found.chosen, found.rejected]).double(), expected.double(), atol=1e-3)
    assert calls == [True, True] and set(loaded) == {"flash_attention_2"}
