"""The model's window: completions end there, and a prompt that fills it is named, left out and stops no other."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from align.errors import DataError, EnvironmentProblem
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import Sampling
from align.generation.vllm_engine import VllmEngine
from align.models.positions import context_window, learned_positions
from tests.helpers.builders import llama_config, tokenizer

FITTING, LONG, TOO_LONG = "the film is", "the film is very " * 3, "the film is very " * 4
WINDOW = 16


def model(family: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "Llama":
        config = llama_config()
        config.max_position_embeddings = WINDOW
        config.rope_parameters = {**config.rope_parameters, **more}
        return LlamaForCausalLM(config)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer()), max_position_embeddings=WINDOW, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32,
    )  # fmt: skip
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Llama"])
def test_completions_end_at_the_window(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """A table of learned positions would fail beyond it; rotary positions would go on without a word."""
    made = TransformersEngine(model(family), tokenizer(), batch_size=4)
    made.stops = []
    assert context_window(made.model) == WINDOW and (learned_positions(made.model) is None) == (family == "Llama")
    sampling = Sampling(8, n=2)
    with caplog.at_level("WARNING"):
        found = dict(made.stream([FITTING, LONG, TOO_LONG], sampling, ["p0", "p1", "p2"]))
    assert [len(one.token_ids) for one in found[0]] == [8, 8] and found[2] == []
    assert [(len(one.token_ids), one.finish_reason) for one in found[1]] == [(4, "length")] * 2
    assert "prompt p2 is left out: found 16 tokens, expected less than the 16 of the model's window" in caplog.text
    assert found[1] == made.generate([LONG], Sampling(4, n=2), ["p1"])[0]  # the same draws, and fewer of them
    with pytest.raises(DataError, match=r"1 of 2 prompts are refused by the transformers engine, see the log:\n  ?p2"):
        made.generate([FITTING, TOO_LONG], sampling, ["p0", "p2"])


def test_scaled_positions_set_no_window() -> None:
    scaled = model("Llama", rope_type="linear", factor=4.0)
    assert context_window(scaled) is None and context_window(model("Llama")) == WINDOW
    made = TransformersEngine(scaled, tokenizer(), batch_size=4)
    made.stops = []
    assert len(made.generate([LONG], Sampling(8))[0][0].token_ids) == 8


class FakeVllm:
    """The part of vLLM's engine that ``VllmEngine`` calls; it refuses long prompts, and finishes one request a step."""

    def __init__(self, reason: str = "stop") -> None:
        self.reason = reason
        self.waiting: list[str] = []
        self.aborted: list[str] = []

    def add_request(self, request: str, prompt: Any, parameters: Any, lora_request: Any) -> None:
        if len(prompt["ids"]) >= WINDOW:
            raise ValueError("the prompt is longer than the maximum model length of 16")
        self.waiting.append(request)

    def step(self) -> list[Any]:
        assert self.waiting
        done = SimpleNamespace(token_ids=[4, 1], logprobs=None, finish_reason=self.reason)
        return [SimpleNamespace(finished=True, request_id=self.waiting.pop(0), outputs=[done])]

    def abort_request(self, requests: list[str]) -> None:
        self.aborted += requests


def vllm(engine: FakeVllm) -> VllmEngine:
    """The engine on a stand-in of vLLM."""
    made = VllmEngine.__new__(VllmEngine)
    made.vllm = SimpleNamespace(
        SamplingParams=lambda **given: given,
        TokensPrompt=lambda prompt_token_ids: {"ids": prompt_token_ids},
        sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=2)),
    )
    made.llm, made.tokenizer, made.adapter = SimpleNamespace(llm_engine=engine), tokenizer(), None
    made.refusals, made.stops, made._calls = (ValueError,), [1], 0
    return made


@pytest.mark.parametrize("flight", [1, 4096])
def test_vllm_completes_the_others(
    flight: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.generation.vllm_engine.IN_FLIGHT", flight)
    engine = FakeVllm()
    made = vllm(engine)
    with caplog.at_level("WARNING"):
        found = dict(made.stream([FITTING, TOO_LONG, LONG], Sampling(4, n=2), ["p0", "p1", "p2"]))
    assert {k: len(group) for k, group in found.items()} == {0: 2, 1: 0, 2: 2} and engine.aborted == []
    assert caplog.text.count("prompt p1 is left out: vLLM refuses it") == 1 and "maximum model length" in caplog.text


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_vllm_gave_up_is_no_completion(reason: str) -> None:
    with pytest.raises(
        EnvironmentProblem, match=rf"prompt p0: found finish_reason '{reason}', expected stop or length"
    ):
        list(vllm(FakeVllm(reason)).stream([FITTING], Sampling(4), ["p0"]))
