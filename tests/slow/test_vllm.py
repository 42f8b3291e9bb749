"""vLLM for real: it generates, its log-probs are the transformers model's, adapters load unmerged, the server serves.

Where vLLM is installed (scripts/assets/setup_vllm.sh): `.venv-vllm/bin/python -m pytest tests/slow/test_vllm.py`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
pytest.importorskip("vllm")

from align.errors import ConfigError, DataError, EnvironmentProblem, ModelError
from align.generation.engines import choose_engine, make_engine
from align.generation.server_client import ServerClient
from align.generation.server_engine import ServerEngine
from align.generation.types import Completion, Sampling
from align.generation.vllm_engine import VllmEngine
from align.models.loading import load_policy, load_tokenizer
from reward_models.pairwise_judges import RewardModelJudge
from reward_models.reward_server import RewardServerJudge
from tests.helpers.builders import tokenizer
from tests.helpers.launching import environment

pytestmark = [pytest.mark.slow, pytest.mark.model]

PROMPTS = ["The capital of France is", "Once upon a time there was a", "Review: the film was", "One two three four"]
CHAT = [{"role": "user", "content": "Say hello and nothing else."}]
SAMPLING = Sampling(16, n=3, seed=1, logprobs=True)
LENGTH = 512


@pytest.fixture(scope="module")
def adapter(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on SmolLM2 whose effect is large."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_policy(str(assets / "smollm2"), dtype="float32"), config)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    load_tokenizer(str(assets / "smollm2")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(adapter: Path) -> VllmEngine:
    """One engine for all: the base model with the adapter beside it."""
    return VllmEngine(str(adapter), options={"max_model_len": LENGTH})


@pytest.fixture(scope="module")
def base(engine: VllmEngine) -> Iterator[VllmEngine]:
    """The same engine with the adapter switched off."""
    kept, engine.adapter = engine.adapter, None
    yield engine
    engine.adapter = kept


def token_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each token by one forward pass of transformers."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0].float()
    scores = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return scores.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def check_logprobs(model: Any, engine: VllmEngine, prompts: list[Any], found: list[list[Completion]]) -> None:
    for prompt, group in zip(prompts, found, strict=True):
        for one in group:
            assert one.logprobs == pytest.approx(token_logprobs(model, engine.encode(prompt), one.token_ids), abs=1e-3)


def test_adapter_is_used_and_not_merged(engine: VllmEngine, adapter: Path) -> None:
    found = engine.generate(PROMPTS, SAMPLING)
    tuned = load_policy(str(adapter), dtype="float32").eval()
    check_logprobs(tuned, engine, PROMPTS, found)
    with tuned.disable_adapter():
        first = found[0][0]
        untuned = token_logprobs(tuned, engine.encode(PROMPTS[0]), first.token_ids)
    assert max(abs(a - b) for a, b in zip(first.logprobs or [], untuned, strict=True)) > 0.05


def test_logprobs_agree_with_transformers(base: VllmEngine, assets: Path) -> None:
    prompts = [*PROMPTS, CHAT]
    found = base.generate(prompts, SAMPLING)
    assert [len(group) for group in found] == [3] * 5
    assert all(len(one.token_ids) == 16 or one.finish_reason == "stop" for group in found for one in group)
    check_logprobs(load_policy(str(assets / "smollm2"), dtype="float32").eval(), base, prompts, found)


def test_greedy_is_that_of_transformers(base: VllmEngine, assets: Path) -> None:
    sampling = Sampling(24, temperature=0)
    other = make_engine("transformers", str(assets / "smollm2"), batch_size=4)
    prompts = [*PROMPTS, CHAT]
    assert base.generate(prompts, sampling) == other.generate(prompts, sampling)


def test_seeds_do_not_depend_on_the_batch(base: VllmEngine) -> None:
    many = [f"{prompt}{' and' * k}" for k in range(4) for prompt in PROMPTS]
    sampling = Sampling(12, n=2, seed=5)
    together = base.generate(many, sampling)
    assert together == base.generate(many, sampling)
    alone = [base.generate([prompt], sampling)[0] for prompt in many[:8]]
    pairs = [pair for group in zip(together, alone, strict=False) for pair in zip(*group, strict=True)]
    assert len(pairs) == 16
    assert sum(first.token_ids == second.token_ids for first, second in pairs) >= 15
    texts = {one.text for one in base.generate(["Once upon"] * 2, Sampling(12, n=4))[0]}
    assert len(texts) == 4


def test_a_prompt_that_does_not_fit(base: VllmEngine) -> None:
    with pytest.raises(DataError, match="1 of 2 prompts are refused by the vllm engine"):
        base.generate(["short", "word " * (LENGTH + 10)], Sampling(4))
    assert base.generate(["short"], Sampling(4))[0][0].token_ids


def test_options_and_models_that_vllm_refuses(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vLLM refuses an option: .*tensor_paralel"):
        VllmEngine(str(assets / "smollm2"), options={"tensor_paralel": 2})
    with pytest.raises(ModelError, match="cannot load it"):
        VllmEngine(str(assets / "smollm2"), options={"data_parallel_size": 2})
    with pytest.raises(ModelError):
        VllmEngine(str(tmp_path / "nowhere"))
    assert choose_engine("auto")[0] == ("vllm" if torch.cuda.is_available() else "transformers")


@contextmanager
def serving(model: Path, served: str, log: Path, *options: str) -> Iterator[str]:
    """Address of a vLLM server.

    Started as a module: the `vllm` command of the CPU build asks for the metadata of a package that it is not.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", served,
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH), "--port", str(port),
        "--host", "127.0.0.1", *options,
    ]  # fmt: skip
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    address = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and process.poll() is None:
            try:
                ServerClient(served, base_url=address, attempts=1).check_model()
            except EnvironmentProblem:
                time.sleep(2)
            else:
                break
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(assets: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of vLLM's server with the base model and the adapter."""
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}")
    with serving(assets / "smollm2", "base", tmp_path_factory.mktemp("server") / "log", *lora) as address:
        yield address


def test_a_served_reward_model_gives_the_local_rewards(tmp_path: Path) -> None:
    """Heads of a size that vLLM's attention on a CPU has."""
    folder = tmp_path / "reward"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words := tokenizer()), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=words.pad_token_id, num_labels=1,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    prompts, completions = ["the film is", "a plot was", "very"] * 8, [" good", " not bad", " dull", " fine film"] * 6
    with serving(folder, str(folder), tmp_path / "log", "--runner", "pooling", "--convert", "classify") as address:
        judge = RewardServerJudge(str(folder), base_url=address)
        found = judge.score(prompts, completions)
    assert found == pytest.approx(RewardModelJudge(str(folder)).score(prompts, completions), abs=1e-4)
    assert np.ptp(found) > 0.1 and not ((found > 0) & (found < 1)).all()


def test_in_a_worker_of_a_cluster(base: VllmEngine, assets: Path, tmp_path: Path) -> None:
    """What the engine gives here, it gives there."""
    pytest.importorskip("ray")
    lines = [json.dumps({"id": f"p{k}", "prompt": prompt}) + "\n" for k, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    command = [sys.executable, "-m", "align.cli", "generate", "prompts.jsonl", "--model", str(assets / "smollm2")]
    command += ["--output", "made", "--engine", "vllm", "--temperature", "0", "--max-new-tokens", "12"]
    command += ["--option", f"max_model_len={LENGTH}", "--cluster", "local,workers=1,cpus=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    made = Dataset.from_parquet(str(tmp_path / "made" / "completions.parquet"))
    here = base.generate(PROMPTS, Sampling(12, temperature=0.0))
    assert made["completion"][:] == [group[0].text for group in here]


def test_server_gives_what_the_engine_gives(server: str, base: VllmEngine) -> None:
    made = make_engine("auto", "base", batch_size=1, base_url=server)
    assert isinstance(made, ServerEngine)
    prompts = [*PROMPTS, CHAT]
    sampling = Sampling(16, temperature=0, logprobs=True)
    for mine, theirs in zip(made.generate(prompts, sampling), base.generate(prompts, sampling), strict=True):
        assert mine[0].token_ids == theirs[0].token_ids
        assert (mine[0].text, mine[0].finish_reason) == (theirs[0].text, theirs[0].finish_reason)
        assert mine[0].logprobs == pytest.approx(theirs[0].logprobs, abs=1e-3)
    drawn = made.generate(PROMPTS, SAMPLING)
    assert drawn == made.generate(PROMPTS, SAMPLING)
    tuned = ServerEngine("tuned", base_url=server).generate(PROMPTS, sampling)
    assert [group[0].text for group in tuned] != [group[0].text for group in made.generate(PROMPTS, sampling)]


def test_server_says_what_is_wrong(server: str) -> None:
    with pytest.raises(ModelError, match=r"does not serve 'bass' .did you mean `base`"):
        ServerEngine("bass", base_url=server)
    with pytest.raises(DataError, match="1 of 1 prompts are refused by the server engine"):
        ServerEngine("base", base_url=server).generate(["word " * (LENGTH + 10)], Sampling(4))
