"""vLLM: what it samples greedily, and its log-probs of what it samples, against transformers."""

from functools import cache
from typing import Any

import torch

from align.errors import EnvironmentProblem
from align.generation.engines import make_engine
from align.generation.types import Sampling
from align.generation.vllm_engine import VllmEngine
from align.generation.vllm_install import import_vllm
from align.models.loading import load_policy
from scripts.gpu_check.cases import Case, NotHere, Settings, judge

PROMPTS = ["The capital of France is", "Once upon a time there was a", "Review: the film was", "One two three four"]
TOKENS = 24
NATS = 0.1
"""Largest difference of a token's log-prob between vLLM and transformers, both in float32."""


def cases() -> dict[str, Case]:
    """Name -> case."""
    return {"vLLM greedy": _greedy, "vLLM log-probs": _logps}


@cache
def _engine(model: str) -> VllmEngine:
    try:
        import_vllm()
    except EnvironmentProblem as error:
        raise NotHere(error.message) from None
    return VllmEngine(model, options={"max_model_len": 512, "dtype": "float32", "gpu_memory_utilization": 0.5})


def _greedy(settings: Settings) -> dict[str, Any]:
    sampling = Sampling(TOKENS, temperature=0)
    drawn = [found[0].token_ids for found in _engine(settings.model).generate(PROMPTS, sampling)]
    other = make_engine("transformers", settings.model, batch_size=1)
    expected = [found[0].token_ids for found in other.generate(PROMPTS, sampling)]
    differing = sum(a != b for a, b in zip(drawn, expected, strict=True))
    return judge({"prompts": len(PROMPTS), "differing": differing}, {"differing": 1})


def _logps(settings: Settings) -> dict[str, Any]:
    engine = _engine(settings.model)
    found = engine.generate(PROMPTS, Sampling(TOKENS, n=4, seed=0, logprobs=True))
    device = "cuda" if settings.gpu else "cpu"
    model = load_policy(settings.model, dtype="float32").to(device).eval()
    largest, tokens = 0.0, 0
    for prompt, completions in zip(PROMPTS, found, strict=True):
        start = engine.encode(prompt)
        for one in completions:
            ids = torch.tensor([start + one.token_ids], device=device)
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, len(start) - 1 : -1].float().log_softmax(-1)
            own = logps.gather(-1, ids[0, len(start) :, None]).squeeze(-1).cpu()
            largest = max(largest, float((own - torch.tensor(one.logprobs)).abs().max()))
            tokens += len(one.token_ids)
    return judge({"tokens": tokens, "nats": largest}, {"nats": NATS})
