"""Completions, KL, scores and preferences of an evaluation with tiny models: cached, resumed, never confused."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.commands import evaluation_tables as tables
from align.commands.evaluation_tables import judge_pairs, measure_kl, score, write_completions
from align.errors import ModelError
from align.evaluation.policies import Policy, find_reference
from align.generation.types import Sampling
from align.io.stage import KEY, PARTIAL
from align.models.completion_logps import completion_logps
from align.models.folders import fingerprint_model
from align.models.tokenization import encode_prompt
from align.sharding.shards import in_parts
from reward_models.judges import VaderJudge
from reward_models.pairwise_judges import (
    ByScore,
)
from tests.helpers.builders import causal

PROMPTS = [f"the {word} film {'very ' * k}is" for k, word in enumerate(["good", "bad", "dull", "fine"])]
WARM = Sampling(5, seed=3, batch_size=2)


def test_finished_parts_are_not_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def work(rows: range) -> Dataset:
        if rows.start == 6 and len(made) < 3:
            raise KeyboardInterrupt
        made.append(rows.start)
        return Dataset.from_dict({"row": list(rows)})

    with pytest.raises(KeyboardInterrupt):
        in_parts(8, 3, tmp_path, work, what="rows")
    assert made == [0, 3] and len(list(tmp_path.iterdir())) == 2
    made.append(-1)
    assert in_parts(8, 3, tmp_path, work, what="rows")["row"] == list(range(8))
    assert made == [0, 3, -1, 6]


def test_completions_do_not_depend_on_where_the_work_was_stopped(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not depend on the batch size either; equal prompts in two shards get different completions."""
    monkeypatch.setattr(tables, "PART", 2)
    prompts = [PROMPTS[0]] * 4
    policy = Policy("tiny", str(tiny_policy))
    whole = write_completions(policy, prompts, WARM, tmp_path / "whole")
    monkeypatch.setattr(tables, "PART", 3)
    again = write_completions(policy, prompts, Sampling(5, seed=3, batch_size=64), tmp_path / "again")
    assert whole.table["text"] == again.table["text"]
    monkeypatch.setattr(tables, "PART", 2)
    assert len({tuple(ids) for ids in whole.table["token_ids"]}) > 2
    partial = next((tmp_path / "whole" / "completions").iterdir())
    shutil.rmtree(partial)
    rest = write_completions(policy, prompts, WARM, tmp_path / "whole")
    assert rest.table["token_ids"] == whole.table["token_ids"]
    other = write_completions(policy, prompts, Sampling(5, seed=4, batch_size=2), tmp_path / "whole")
    assert other.table["token_ids"] != whole.table["token_ids"] and other.key != whole.key


def test_another_policy_in_the_same_folder_is_another_policy(tmp_path: Path) -> None:
    """A new policy under the same folder name gets its own completions and its own KL."""
    reference = Policy("reference", str(causal(tmp_path / "reference", seed=5)))
    found = []
    for seed in (5, 6):
        policy = Policy("trained", str(causal(tmp_path / "policy", seed)))
        written = write_completions(policy, PROMPTS, WARM, tmp_path / "out")
        found.append((written.key, written.table["text"][:], measure_kl(written, reference, tmp_path / "out").exact))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert np.allclose(found[0][2], 0, atol=1e-5) and not np.allclose(found[1][2], 0, atol=1e-2)


def test_kl_at_a_temperature_is_that_of_what_is_sampled_from(tiny_policy: Path, tmp_path: Path) -> None:
    """The mean log-ratio of many one-token samples is the exact sum over the vocabulary; greedy log-probs are 0."""
    reference = Policy("reference", str(causal(tmp_path / "other", seed=5)))
    sampling = Sampling(1, 0.7, batch_size=512)
    written = write_completions(Policy("tiny", str(tiny_policy)), [PROMPTS[0]] * 4096, sampling, tmp_path / "out")
    found = measure_kl(written, reference, tmp_path / "out")
    ids = torch.tensor([encode_prompt(PROMPTS[0], AutoTokenizer.from_pretrained(tiny_policy))])
    with torch.no_grad():
        hot, base = (
            torch.log_softmax(AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, -1].double() / heat, -1)
            for path, heat in ((tiny_policy, 0.7), (reference.model, 1.0))
        )
    exact = float((hot.exp() * (hot - base)).sum())
    assert found.exact == pytest.approx(np.full(4096, exact), rel=1e-4) and exact > 0.05
    assert found.log_ratios.mean() == pytest.approx(exact, abs=4 * found.log_ratios.std() / 64)


def test_completion_logps_are_those_of_the_tempered_softmax(tiny_policy: Path) -> None:
    """One token and two, against log_softmax(logits / T); at temperature 1 they differ, and greedy ones are 0."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    prompts, completions = [[3, 5], [4]], [[6], [7, 2]]
    with torch.no_grad():
        rows = [
            torch.log_softmax(model(torch.tensor([[*p, *c]])).logits[0].double() / 0.7, -1)
            for p, c in zip(prompts, completions, strict=True)
        ]
    exact = [float(rows[0][1, 6]), float(rows[1][0, 7] + rows[1][1, 2])]
    settings = {"batch_tokens": 64, "pad_token_id": 0}
    assert completion_logps(model, prompts, completions, **settings, temperature=0.7) == pytest.approx(exact, abs=1e-4)
    assert (np.abs(completion_logps(model, prompts, completions, **settings) - exact) > 0.01).all()
    assert completion_logps(model, prompts, completions, **settings, temperature=0).tolist() == [0.0, 0.0]


def test_another_vocabulary_has_no_kl(tiny_policy: Path, tmp_path: Path) -> None:
    reference = causal(tmp_path / "other")
    file = reference / "tokenizer.json"
    file.write_text(file.read_text().replace('"dull"', '"drab"'))
    written = write_completions(Policy("tiny", str(tiny_policy)), PROMPTS, WARM, tmp_path / "out")
    with pytest.raises(ModelError, match="found two vocabularies"):
        measure_kl(written, Policy("reference", str(reference)), tmp_path / "out")


def test_messages_are_answered_by_messages(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages of two shards may have different keys."""
    monkeypatch.setattr(tables, "PART", 1)
    prompts = [[{"role": "user", "content": "good film"}], [{"role": "user", "content": "bad plot", "name": "x"}]]
    written = write_completions(Policy("tiny", str(tiny_policy)), prompts, WARM, tmp_path / "out")
    assert [answer[0]["role"] for answer in written.answers()] == ["assistant"] * 2
    assert written.answers()[0][0]["content"] == written.table["text"][0]
    assert score(written, VaderJudge(), tmp_path / "out").shape == (2,)


class Counting:
    """A judge that prefers the longer response, adds 0.2 to the first, and counts how often it is asked."""

    name = "vader"
    asked = 0

    def prefer(self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """0.7, 0.3 or 0.5 plus the bias of 0.2."""
        self.asked += len(prompts)
        longer = np.sign([len(a) - len(b) for a, b in zip(first, second, strict=True)])
        return 0.5 + 0.2 * longer + 0.2


def test_both_orders_are_asked_and_the_bias_cancels(tiny_policy: Path, tmp_path: Path) -> None:
    one, other = (
        write_completions(Policy(f"p{seed}", str(tiny_policy)), PROMPTS, Sampling(5, seed=seed, batch_size=2), tmp_path)
        for seed in (0, 1)
    )
    judge = Counting()
    first, second = judge_pairs(one, other, judge, tmp_path)
    assert judge.asked == 2 * len(PROMPTS)
    longer = np.sign([len(a) - len(b) for a, b in zip(one.table["text"], other.table["text"], strict=True)])
    assert np.allclose((first + second) / 2, 0.5 + 0.2 * longer) and np.allclose(first - second, 0.4)
    judge_pairs(one, other, judge, tmp_path)
    assert judge.asked == 2 * len(PROMPTS)  # the verdicts were kept


def test_a_judge_of_single_responses_is_asked_once(tiny_policy: Path, tmp_path: Path) -> None:
    one, other = (
        write_completions(Policy(f"p{seed}", str(tiny_policy)), PROMPTS, Sampling(5, seed=seed, batch_size=2), tmp_path)
        for seed in (0, 1)
    )
    first, second = judge_pairs(one, other, ByScore(VaderJudge()), tmp_path)
    ours, theirs = (VaderJudge().score(PROMPTS, written.answers()) for written in (one, other))
    assert (first == second).all() and (first == np.where(ours == theirs, 0.5, ours > theirs)).all()


def test_an_adapter_is_a_policy(tiny_policy: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_policy / name, tmp_path / "adapter")
    policy = Policy("adapted", str(tmp_path / "adapter"))
    written = write_completions(policy, PROMPTS, WARM, tmp_path)
    assert measure_kl(written, find_reference([policy], None), tmp_path).exact.max() > 1e-3


def test_another_base_is_another_adapter(tmp_path: Path) -> None:
    for name, text in (("adapter_config.json", json.dumps({"base_model_name_or_path": str(tmp_path / "base")})),
                       ("adapter_model.safetensors", "own")):  # fmt: skip
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_text(text)
    (tmp_path / "base").mkdir()
    found = []
    for weights in ("one", "two"):
        (tmp_path / "base" / "model.safetensors").write_text(weights)
        adapter = tmp_path / "adapter"
        found.append((fingerprint_model(str(adapter)), fingerprint_model(str(tmp_path / "base"))))
    assert all(one != other for one, other in zip(*found, strict=True))
    assert fingerprint_model("some/hub-id") == "some/hub-id"


@pytest.mark.parametrize("wrong", [Sampling(5, n=2)])
def test_only_one_completion_of_everything_that_can_be_drawn(wrong: Sampling, tmp_path: Path) -> None:
    """The table holds one completion per prompt."""
    with pytest.raises(ValueError, match="expected n = 1, got n = 2"):
        write_completions(Policy("p", "nowhere"), PROMPTS, wrong, tmp_path)


def test_shards_of_another_format_are_not_read(tiny_policy: Path, tmp_path: Path) -> None:
    """An earlier version left its shards, one completion per row, directly in the folder of the parts."""
    policy, out = Policy("tiny", str(tiny_policy)), tmp_path / "out"
    whole = write_completions(policy, PROMPTS, WARM, out)
    (folder,) = (out / "completions").iterdir()
    partial = folder.with_name(folder.name + PARTIAL)
    (partial / "parts").mkdir(parents=True)
    (partial / KEY).write_text(whole.key)
    Dataset.from_dict({"text": [" stale"] * 4}).to_parquet(str(partial / "parts" / "00000000.parquet"))
    shutil.rmtree(folder)
    again = write_completions(policy, PROMPTS, WARM, out)
    assert again.table["text"][:] == whole.table["text"][:] and not (folder / "parts").exists()
