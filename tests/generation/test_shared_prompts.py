"""Several samples of a prompt continue one pass over it, and are the samples that separate passes give."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from align.generation.transformers_engine import PADDING_TOLERANCE, TransformersEngine
from align.generation.types import Sampling
from tests.generation.test_padding_trial import PROMPTS, SMALL, family, minimax
from tests.helpers.builders import llama_config, tokenizer


def sliding() -> PreTrainedModel:
    """Layers that keep 4 tokens, fewer than the prompts have."""
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2, head_dim=8, sliding_window=4)
    )


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "Llama": lambda: LlamaForCausalLM(llama_config()),
        "GPT2": lambda: family("GPT2", intermediate_size=64),
        "sliding": sliding,
    }


@pytest.mark.parametrize("name", ["Llama", "GPT2", "sliding"])
@pytest.mark.parametrize("size", [3, 8])
def test_samples_are_those_of_separate_passes(name: str, size: int) -> None:
    """Also where a batch ends between two samples of a prompt; each different prompt of a batch is read once."""
    model = models()[name]()
    shared, apart = (TransformersEngine(model, tokenizer(), batch_size=size) for _ in range(2))
    apart._shares_prompts = False
    tokens: list[int] = []
    embedded = model.get_input_embeddings().register_forward_hook(lambda _, given, __: tokens.append(given[0].numel()))
    sampling = Sampling(6, n=4, seed=1, logprobs=True)
    found = []
    for engine in (shared, apart):
        engine._batch_size([[5], [5, 6]])
        engine._may_share([[5, 6], [5, 6]])
        tokens.clear()
        found.append((engine.generate(PROMPTS, sampling), sum(tokens)))
    embedded.remove()
    assert shared._shares_prompts
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert [completion.token_ids for completion in one] == [completion.token_ids for completion in other]
        for mine, theirs in zip(one, other, strict=True):
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=PADDING_TOLERANCE[torch.float32])
    assert found[0][1] < (0.85 if size == 3 else 0.75) * found[1][1]


def test_one_sample_of_each_prompt_shares_nothing() -> None:
    engine = TransformersEngine(LlamaForCausalLM(llama_config()), tokenizer(), batch_size=8)
    engine.generate(PROMPTS, Sampling(2))
    assert engine._shares_prompts is None
    engine.generate(["the film"] * 3, Sampling(2))
    assert engine._shares_prompts


def test_a_model_that_cannot_continue_a_pass_reads_its_prompts_again(caplog: pytest.LogCaptureFixture) -> None:
    """A state that is no cache of keys, and one that padding changes; log-probs that are not finite."""
    model = family("Mamba", intermediate_size=64)
    engine = TransformersEngine(model, tokenizer(), batch_size=8)
    with caplog.at_level("INFO"):
        found = engine.generate(PROMPTS, Sampling(4, n=2, seed=1))
    single = TransformersEngine(model, tokenizer(), batch_size=1)
    assert found == single.generate(PROMPTS, Sampling(4, n=2, seed=1))
    if not engine._shares_prompts:
        assert caplog.text.count("each sample of a prompt reads the prompt again") == 1
    assert TransformersEngine(minimax(), tokenizer(), batch_size=8).generate(["good", "the film"], Sampling(2, n=2))
    broken = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    assert TransformersEngine(broken, tokenizer(), batch_size=8).sharing_difference() == torch.inf
