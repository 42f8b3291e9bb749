"""A run that is stopped while it samples resumes with the remaining prompts and gives the same result."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from align.config import RunConfig
from align.data.messages import with_arguments
from align.data.pairs import read_pairs, write_pairs
from align.generation.sampling_job import SamplingJob, completions_of
from align.generation.transformers_engine import TransformersEngine
from align.generation.types import keyed_prompts
from align.io.files import read_json
from align.models.completion_logps import completion_logps
from align.models.loading import load_policy, load_tokenizer
from align.models.tokenization import encode_prompt
from align.run.stages import sampling, work_of
from tests.helpers.builders import TEMPLATE, bert_reward, causal

PROMPTS = [f"the {a} {b} is" for a in ("good", "bad", "dull") for b in ("film", "plot", "review")]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    causal(tmp_path / "policy")
    bert_reward(tmp_path / "runs" / "r" / "reward" / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    prompts = str(tmp_path / "prompts.jsonl")
    policy = str(tmp_path / "policy")
    tree = {
        "name": "r", "output_dir": str(tmp_path / "runs"),
        "reward": {"model": policy, "pairs": {"path": "pairs.jsonl"}},
        "sample": {"prompts": prompts, "num_generations": 3, "max_new_tokens": 6},
        "train": {"model": policy, "methods": {"dpo": {"loss": "dpo"}}},
        "evaluate": {"prompts": prompts, "max_new_tokens": 6, "judge": "vader"},
    }  # fmt: skip
    return RunConfig.model_validate(tree)


def stopped(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Record the prompts that are sampled from now on; raise Ctrl-C in the call after ``after`` of them."""
    seen: list[str] = []
    generate = TransformersEngine.generate

    def counted(self: TransformersEngine, prompts: Any, *more: Any, **settings: Any) -> Any:
        if len(seen) >= after:
            raise KeyboardInterrupt
        seen.extend(prompts)
        return generate(self, prompts, *more, **settings)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    return seen


@pytest.mark.parametrize("heat", [0.5, 1.0])
def test_the_log_probs_are_those_of_what_was_decoded(heat: float, config: RunConfig, tmp_path: Path) -> None:
    """They are those of softmax(logits / T) for the policy that sampled, and at temperature 1 for the reference."""
    assert config.evaluate is not None and config.train is not None
    trained = causal(tmp_path / "trained", seed=3)
    settings = config.evaluate.model_copy(update={"temperature": heat})
    job = SamplingJob(str(trained), sampling.run_sampling(config, settings), config.train.model)
    sampled = job.start()(keyed_prompts(PROMPTS))
    words = load_tokenizer(config.train.model)
    for name, folder, divisor in (("policy", str(trained), heat), ("reference", config.train.model, 1.0)):
        model = load_policy(folder, dtype="float32").eval()
        for prompt, (found,), (logp,) in zip(PROMPTS, completions_of(sampled), sampled[f"logp_{name}"], strict=True):
            given = words(prompt, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([given + words(found.text, add_special_tokens=False)["input_ids"]])
            if ids.shape[1] - len(given) != len(
                found.token_ids
            ):  # it ended before its length, in a token that is not in the text
                continue
            with torch.no_grad():
                logps = torch.log_softmax(model(ids).logits[0, len(given) - 1 : -1].double() / divisor, dim=-1)
            assert logp == pytest.approx(logps.gather(1, ids[0, len(given) :, None]).sum().item(), abs=1e-4)


@pytest.mark.parametrize(("fields", "measured"), [({}, (True, True)), ({"temperature": 0.5}, (True, False)),
                                                  ({"top_p": 0.9}, (True, False))])  # fmt: skip
def test_a_kl_only_of_what_has_one(
    fields: dict[str, float], measured: tuple[bool, bool], config: RunConfig, tmp_path: Path
) -> None:
    """There is no gain per root KL at another temperature or under top-p, no correlation without margins."""
    assert config.evaluate is not None
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=fields), "reward": None})
    root, rng = config.folder, np.random.default_rng(0)
    write_pairs(
        Dataset.from_list([{"id": "a", "prompt": "a", "chosen": " b", "rejected": " c"}]), root / "margins" / "pairs"
    )
    for name, texts, ratio in (("reference", " dull", 0.0), ("dpo", " good", 2.0)):
        (root / f"generate-{name}").mkdir(parents=True)
        table = {"prompt": PROMPTS, "text": [texts] * 9, "tokens": [1] * 9, "logp_reference": [-3.0] * 9}
        table["logp_policy"] = (ratio - 3 + rng.normal(0, 0.1, 9)).tolist()
        table["kl"] = [ratio] * 9
        Dataset.from_dict(table).to_parquet(str(root / f"generate-{name}" / "completions.parquet"))
    (tmp_path / "out").mkdir()
    work_of("evaluate")(config, tmp_path / "out")
    found = read_json(tmp_path / "out" / "metrics.json")
    policy = found["policies"]["dpo"]
    assert (policy["kl"] is not None, policy["gain_per_root_kl"] is not None) == measured
    assert found["judge_correlation"] is None and policy["gain"]["value"] > 0


@pytest.mark.parametrize("stage", ["sample", "generate-reference"])
def test_a_stopped_stage_repeats_no_finished_part(
    stage: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = work_of(stage)
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    whole.mkdir()
    halted.mkdir()
    work(config, whole)
    monkeypatch.setattr(sampling, "PART", 4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = stopped(patch, 8)
        work(config, halted)
    assert first == PROMPTS[:8]
    rest = stopped(monkeypatch, 99)
    work(config, halted)
    assert rest == PROMPTS[8:] and not (halted / "parts").exists()
    if stage == "sample":
        assert read_pairs(halted / "train").to_list() == read_pairs(whole / "train").to_list()
        return
    tables = [pq.read_table(folder / "completions.parquet").to_pydict() for folder in (whole, halted)]
    for name in ("prompt", "text", "tokens"):
        assert tables[0][name] == tables[1][name]
    assert tables[0]["logp_policy"] == pytest.approx(tables[1]["logp_policy"], abs=1e-5)


def test_pairs_say_which_of_their_responses_the_limit_of_tokens_cut_off(config: RunConfig, tmp_path: Path) -> None:
    assert config.sample is not None and config.train is not None
    job = SamplingJob(config.train.model, sampling.run_sampling(config, config.sample, 3))
    groups = completions_of(job.start()(keyed_prompts(PROMPTS)))
    (tmp_path / "out").mkdir()
    work_of("sample")(config, tmp_path / "out")
    pairs = read_pairs(tmp_path / "out" / "train")
    found = set()
    for pair in pairs:
        reasons = {one.text: one.finish_reason for one in groups[int(pair["id"])]}
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_finish_reason"] == reasons[pair[side]]
            found.add(reasons[pair[side]])
    assert found == {"stop", "length"}


def test_the_arguments_of_the_chat_template_go_from_prompts_to_judges(config: RunConfig, tmp_path: Path) -> None:
    """The stages complete, pair and judge conversations as they are rendered for training."""
    assert config.sample is not None and config.evaluate is not None and config.train is not None
    words = load_tokenizer(config.train.model)
    words.chat_template = "{% if short %}very {% endif %}{% for tool in tools or [] %}plot {% endfor %}" + TEMPLATE
    words.save_pretrained(config.train.model)
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    rows[0] |= {"tools": [{"name": "a"}]}  # type: ignore[dict-item]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(config.sample.prompts).write_text(lines)
    short = {"chat_template_kwargs": {"short": True}}
    update = {"sample": config.sample.model_copy(update=short), "evaluate": config.evaluate.model_copy(update=short)}
    config = config.model_copy(update=update | {"reward": None})
    (tmp_path / "out").mkdir()
    work_of("generate-reference")(config, tmp_path / "out")
    table = Dataset.from_parquet(str(tmp_path / "out" / "completions.parquet"))
    assert json.loads(table[0]["tools"]) == [{"name": "a"}] and table[1]["tools"] is None
    model = load_policy(config.train.model, dtype="float32").eval()
    for row, begin in zip(table, ["very plot user", *["very user"] * 8], strict=True):
        prompt = encode_prompt(with_arguments(row["prompt"], row), words)
        assert words.decode(prompt).startswith(begin)
        sampled = words(row["text"], add_special_tokens=False)["input_ids"]
        if len(sampled) == row["tokens"]:
            logp = completion_logps(model, [prompt], [sampled], batch_tokens=99, pad_token_id=0)[0]
            assert row["logp_reference"] == pytest.approx(logp, abs=1e-4)


def test_pairs_keep_what_their_prompts_have(config: RunConfig) -> None:
    """The prompt's id, group and the user's own columns; other prompts have others, or none."""
    assert config.sample is not None
    own = [{"id": f"q{k}", "group": "ab"[k % 2], "source": {"n": k}, "text": ["x", 3][k % 2]} for k in range(8)]
    table = [{"prompt": text} | more for text, more in zip(PROMPTS, [*own, {}], strict=True)]
    Path(config.sample.prompts).write_text("".join(json.dumps(row) + "\n" for row in table))
    folder = config.folder / "sample"
    work_of("sample")(config, folder)
    pairs = read_pairs(folder / "train")
    assert len(pairs) > 3
    for row in pairs:
        given = table[PROMPTS.index(row["prompt"])]
        found = {"id": row["prompt_id"], "group": row["group"], "source": row["source"], "text": row["text"]}
        assert found == {name: given.get(name) for name in found}
