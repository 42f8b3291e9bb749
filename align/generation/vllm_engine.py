"""Sampling with vLLM in this process: continuous batching, prefix caching, adapters without merging."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from align.errors import ConfigError, EnvironmentProblem, ModelError
from align.generation.encoding import stop_ids, to_completion
from align.generation.types import ENDS, Completion, Engine, Sampling, prompt_keys, sample_seed
from align.generation.vllm_adapters import vllm_model
from align.generation.vllm_install import import_vllm
from align.io.console import log
from align.models.loading import load_tokenizer
from align.models.tokenization import encode_prompt

IN_FLIGHT = 4096
"""Requests handed to vLLM at once; it batches them itself."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
"""Defaults of environment variables. The scheduler runs in this process, which makes its order reproducible."""
CPU_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "4"}
"""The same for a CPU, GiB of the key-value cache. Without it vLLM wants 92% of the machine's memory to be free; it is
not set next to ``gpu_memory_utilization``, the share of the memory that vLLM takes."""


class VllmEngine(Engine):
    """Sample with vLLM's own batching and a seed for every sample of every prompt.

    The random numbers of a completion do not depend on the other prompts, because each request has its own generator.
    Its logits depend on them by rounding: vLLM batches as load allows, and its kernels may round differently at another
    batch size. If rounding changes a draw, the rest of that completion differs. ``VLLM_BATCH_INVARIANT=1`` makes
    batches bitwise equal (slower, on the GPUs that vLLM supports it for). The same call with the same prompts and seed
    gives the same completions. The draws differ from those of the transformers engine.

    Args:
        model: folder or hub id. A LoRA adapter on linear layers is loaded as a LoRA request on its base model,
            not merged; one that vLLM would serve as another model is merged into its base (``vllm_model``).
        options: arguments of ``vllm.LLM``, passed through: ``tensor_parallel_size``, ``pipeline_parallel_size``,
            ``data_parallel_size`` (which vLLM takes only under its own launcher), ``dtype``,
            ``gpu_memory_utilization``, ``max_model_len``, ... By default prefix caching is on, and on a CPU the
            weights are float32, run eagerly, and get a cache of ``CPU_CACHE``.

    Raises:
        EnvironmentProblem: vLLM is missing or cannot be imported.
        ConfigError: vLLM refuses an option.
        ModelError: the model cannot be loaded, or its adapter can be neither served nor merged.
    """

    name = "vllm"

    def __init__(self, model: str, *, options: dict[str, Any] | None = None) -> None:
        sized = "gpu_memory_utilization" in (options or {})
        for name, value in (ENVIRONMENT | ({} if sized else CPU_CACHE)).items():
            os.environ.setdefault(name, value)
        self.vllm = import_vllm()
        self.refusals = (ValueError, getattr(self.vllm.exceptions, "VLLMClientError", ValueError))
        given = dict(options or {})
        with vllm_model(model, trust_remote_code=bool(given.get("trust_remote_code", False))) as served:
            defaults: dict[str, Any] = {"enable_prefix_caching": True, "seed": 0} | served.options
            if self.vllm.platforms.current_platform.is_cpu():
                defaults |= {"dtype": "float32", "enforce_eager": True}
            self.tokenizer = load_tokenizer(model if (Path(model) / "tokenizer_config.json").exists() else served.base)
            self.llm = self._load(served.base, defaults | given)
            self.stops = stop_ids(self.tokenizer, _generation_config(served.base))
        self.adapter = None
        if served.adapter is not None:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest("policy", 1, served.adapter)
        self._calls = 0

    def encode(self, prompt: Any) -> list[int]:
        """Token ids of a prompt; see ``encode_prompt``."""
        return encode_prompt(prompt, self.tokenizer)

    def stream(
        self, prompts: Sequence[Any], sampling: Sampling, keys: Sequence[str] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield (index of a prompt, its completions) as vLLM finishes them; none for a prompt that vLLM refuses.

        Raises:
            EnvironmentProblem: vLLM gave up a completion.
        """
        keys = prompt_keys(prompts) if keys is None else keys
        ids = [encode_prompt(prompt, self.tokenizer) for prompt in prompts]
        self._calls += 1
        jobs = deque((k, sample) for k in range(len(ids)) for sample in range(sampling.n))
        refused: set[int] = set()
        running: dict[str, tuple[int, int]] = {}
        found: dict[int, dict[int, Completion]] = {}
        engine = self.llm.llm_engine
        try:
            while jobs or running:
                while jobs and len(running) < IN_FLIGHT:
                    k, sample = jobs.popleft()
                    request = f"{self._calls}-{k}-{sample}"
                    if k in refused:
                        continue
                    if self._add(request, ids[k], keys[k], sample_seed(sampling.seed, keys[k], sample), sampling):
                        running[request] = (k, sample)
                    else:
                        refused.add(k)
                        yield k, []
                for output in engine.step() if running else ():
                    if not output.finished:
                        continue
                    k, sample = running.pop(output.request_id)
                    _check_end(output.outputs[0], keys[k])
                    group = found.setdefault(k, {})
                    group[sample] = self._completion(ids[k], output.outputs[0], sampling)
                    if len(group) == sampling.n:
                        yield k, [group[number] for number in range(sampling.n)]
                        del found[k]
        finally:
            if running:
                engine.abort_request(list(running))

    def _load(self, base: str, settings: dict[str, Any]) -> Any:
        try:
            return self.vllm.LLM(model=base, **settings)
        except TypeError as error:
            raise ConfigError(
                f"vLLM refuses an option: {_first_line(error)}", code="engine-option", hint="see `vllm serve --help`"
            ) from None
        except self.refusals as error:
            raise ModelError(
                f"{base}: vLLM cannot load it ({_first_line(error)})",
                code="model-load",
                hint="change the options given to vLLM, such as --option gpu_memory_utilization=0.5, or use --engine "
                "transformers",
            ) from None

    def _add(self, request: str, ids: list[int], key: str, seed: int, sampling: Sampling) -> bool:
        """Hand a prompt to vLLM; False if vLLM refuses it, which is logged with its key."""
        parameters = self.vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            seed=seed,
            logprobs=0 if sampling.logprobs else None,
            stop_token_ids=self.stops,
            stop=list(sampling.stop) or None,
            detokenize=bool(sampling.stop),
            output_kind=self.vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )
        prompt = self.vllm.TokensPrompt(prompt_token_ids=ids)
        try:
            self.llm.llm_engine.add_request(request, prompt, parameters, lora_request=self.adapter)
        except self.refusals as error:
            log.warning("prompt %s is left out: vLLM refuses it (%s); shorten it, or raise max_model_len",
                        key, _first_line(error))  # fmt: skip
            return False
        return True

    def _completion(self, prompt: list[int], output: Any, sampling: Sampling) -> Completion:
        tokens = list(output.token_ids)
        logprobs = None
        if output.logprobs is not None:
            logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)]
        return to_completion(self.tokenizer, prompt, tokens, self.stops, logprobs, sampling.stop)


def _check_end(output: Any, key: str) -> None:
    """Refuse a completion that vLLM gave up, of which a part is there.

    Raises:
        EnvironmentProblem: names the prompt by its key.
    """
    reason = getattr(output, "finish_reason", None)
    if reason not in (*ENDS, None):
        raise EnvironmentProblem(
            f"vLLM: prompt {key}: found finish_reason {reason!r}, expected {' or '.join(ENDS)}",
            code="engine-output",
            hint="run it again; what was completed is kept",
        )


def _generation_config(base: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
