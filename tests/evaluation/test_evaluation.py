"""Policies, judges, completions and the reward-model metrics of an evaluation, with tiny models."""

import json
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.commands import evaluation_tables as completions
from align.commands.evaluation_tables import Decoding, judge_pairs, measure_kl, score, write_completions
from align.errors import AlignError, ConfigError, ModelError
from align.evaluation.policies import Policy, checkpoints, find_reference, parse_policies
from align.evaluation.reward_model import reward_model_metrics
from align.evaluation.reward_pairs import finding_sentences, pair_findings
from align.evaluation.rewardbench import SECTIONS, section_scores
from align.generation.encoding import encode_prompt
from align.models.completion_logps import completion_logps
from align.models.folders import fingerprint_model
from align.reports.reward_model_page import GROUPS, by_group, write_reward_model_page
from align.sharding.shards import in_parts
from reward_models import ensemble
from reward_models.judges import VaderJudge
from reward_models.length_bias import word_difference
from reward_models.pairwise_judges import (
    ANSWER,
    QUESTION,
    ByScore,
    LanguageModelJudge,
    RewardModelJudge,
    judge_key,
    make_pairwise,
    make_score_judge,
)
from reward_models.score import RewardScorer
from tests.helpers.builders import causal, llama_reward, tokenizer

PROMPTS = [f"the {word} film {'very ' * k}is" for k, word in enumerate(["good", "bad", "dull", "fine"])]
WARM = Decoding(max_new_tokens=5, temperature=1.0, seed=3, batch_size=2)


def test_an_answer_to_messages_is_judged_as_text_of_its_own() -> None:
    judge, asked = VaderJudge(), [{"role": "user", "content": "Continue the review"}]
    for answer in ("Great movie!", "Wonderful acting.", "Terrible film."):
        alone = judge.score(["Continue the review "], [answer])
        assert alone[0] != 0
        for form in (answer, [{"role": "assistant", "content": answer}]):
            assert judge.score([asked], [form]) == pytest.approx(alone)
    assert judge.score(["a good fi"], ["lm"]) == judge.score(["a good film"], [""])


def test_names_of_policies() -> None:
    found = parse_policies(["a=x/y", "runs/demo/train-dpo/model", "runs/demo/train-madpo", "smollm2"])
    assert [(policy.name, policy.model) for policy in found] == [
        ("a", "x/y"), ("dpo", "runs/demo/train-dpo/model"), ("madpo", "runs/demo/train-madpo"), ("smollm2", "smollm2"),
    ]  # fmt: skip
    for wrong in (["a b=x"], ["=x"], ["a="], ["reference=x"], ["<i>=x"]):
        with pytest.raises(ConfigError, match="expected NAME=FOLDER"):
            parse_policies(wrong)
    with pytest.raises(ConfigError, match="'a' is there twice"):
        parse_policies(["a=x", "a=y"])


def test_the_reference_is_what_the_adapters_were_trained_on(tmp_path: Path) -> None:
    for name, base in (("one", "base"), ("two", "base"), ("three", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    one, two, three = (Policy(name, str(tmp_path / name)) for name in ("one", "two", "three"))
    assert find_reference([one, two], None) == Policy("reference", "base")
    assert find_reference([one, two], "given").model == "given"
    for unclear in ([one, three], [one, Policy("whole", str(tmp_path))]):
        with pytest.raises(ConfigError, match="--reference: needed"):
            find_reference(unclear, None)


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-20", "model", "checkpoint-x"):
        (tmp_path / name).mkdir()
    found = checkpoints(Policy("a", str(tmp_path)))
    assert [(step, Path(policy.model).name) for step, policy in found] == [
        (20, "checkpoint-20"), (100, "checkpoint-100"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="holds no folder checkpoint-<step>"):
        checkpoints(Policy("a", str(tmp_path / "model")))


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
    """Nor on the batch size; equal prompts in two parts get other completions."""
    monkeypatch.setattr(completions, "PART", 2)
    prompts = [PROMPTS[0]] * 4
    policy = Policy("tiny", str(tiny_policy))
    whole = write_completions(policy, prompts, WARM, tmp_path / "whole")
    monkeypatch.setattr(completions, "PART", 3)
    again = write_completions(policy, prompts, Decoding(5, 1.0, 3, 64), tmp_path / "again")
    assert whole.table["text"] == again.table["text"]
    monkeypatch.setattr(completions, "PART", 2)
    assert len({tuple(ids) for ids in whole.table["token_ids"]}) > 2
    partial = next((tmp_path / "whole" / "completions").iterdir())
    shutil.rmtree(partial)
    rest = write_completions(policy, prompts, WARM, tmp_path / "whole")
    assert rest.table["token_ids"] == whole.table["token_ids"]
    other = write_completions(policy, prompts, Decoding(5, 1.0, 4, 2), tmp_path / "whole")
    assert other.table["token_ids"] != whole.table["token_ids"] and other.key != whole.key


def test_another_policy_in_the_same_folder_is_another_policy(tmp_path: Path) -> None:
    """Its completions and its KL are its own, although the folder's name is what it was."""
    reference = Policy("reference", str(causal(tmp_path / "reference", seed=5)))
    found = []
    for seed in (5, 6):
        policy = Policy("trained", str(causal(tmp_path / "policy", seed)))
        written = write_completions(policy, PROMPTS, WARM, tmp_path / "out")
        found.append((written.key, written.table["text"][:], measure_kl(written, reference, tmp_path / "out")))
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]
    assert np.allclose(found[0][2], 0, atol=1e-5) and not np.allclose(found[1][2], 0, atol=1e-2)


def test_kl_at_a_temperature_is_that_of_what_is_sampled_from(tiny_policy: Path, tmp_path: Path) -> None:
    """Mean log-ratio of many one-token samples against the exact sum over the vocabulary; 0 for greedy's own part."""
    reference = Policy("reference", str(causal(tmp_path / "other", seed=5)))
    decoding = Decoding(1, 0.7, 0, 512)
    written = write_completions(Policy("tiny", str(tiny_policy)), [PROMPTS[0]] * 4096, decoding, tmp_path / "out")
    ratios = measure_kl(written, reference, tmp_path / "out")
    ids = torch.tensor([encode_prompt(AutoTokenizer.from_pretrained(tiny_policy), PROMPTS[0])])
    with torch.no_grad():
        hot, base = (
            torch.log_softmax(AutoModelForCausalLM.from_pretrained(path)(ids).logits[0, -1].double() / heat, -1)
            for path, heat in ((tiny_policy, 0.7), (reference.model, 1.0))
        )
    exact = float((hot.exp() * (hot - base)).sum())
    assert ratios.mean() == pytest.approx(exact, abs=4 * ratios.std() / 64) and exact > 0.05
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    assert completion_logps(model, [[3]], [[4]], batch_tokens=9, pad_token_id=0, temperature=0).tolist() == [0.0]


def test_another_vocabulary_has_no_kl(tiny_policy: Path, tmp_path: Path) -> None:
    reference = causal(tmp_path / "other")
    file = reference / "tokenizer.json"
    file.write_text(file.read_text().replace('"dull"', '"drab"'))
    written = write_completions(Policy("tiny", str(tiny_policy)), PROMPTS, WARM, tmp_path / "out")
    with pytest.raises(ModelError, match="found two vocabularies"):
        measure_kl(written, Policy("reference", str(reference)), tmp_path / "out")


def test_messages_are_answered_by_messages(tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the messages of two parts have other keys."""
    monkeypatch.setattr(completions, "PART", 1)
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
        """0.7, 0.2 or 0.5 plus the bias."""
        self.asked += len(prompts)
        longer = np.sign([len(a) - len(b) for a, b in zip(first, second, strict=True)])
        return 0.5 + 0.2 * longer + 0.2


def test_both_orders_are_asked_and_the_bias_cancels(tiny_policy: Path, tmp_path: Path) -> None:
    one, other = (
        write_completions(Policy(f"p{seed}", str(tiny_policy)), PROMPTS, Decoding(5, 1.0, seed, 2), tmp_path)
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
        write_completions(Policy(f"p{seed}", str(tiny_policy)), PROMPTS, Decoding(5, 1.0, seed, 2), tmp_path)
        for seed in (0, 1)
    )
    first, second = judge_pairs(one, other, ByScore(VaderJudge()), tmp_path)
    ours, theirs = (VaderJudge().score(PROMPTS, written.answers()) for written in (one, other))
    assert (first == second).all() and (first == np.where(ours == theirs, 0.5, ours > theirs)).all()


@pytest.mark.parametrize("template", [False, True])
def test_a_language_model_judge_reads_the_labels(tmp_path: Path, template: bool) -> None:
    """Its preference equals the softmax of two logits of one row at a time, whatever the padding."""
    folder = causal(tmp_path / "judge", seed=2)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    words = tokenizer(template=template)
    words.add_tokens([" A", " B"])
    words.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    judge = LanguageModelJudge(str(folder))
    answers = ["good", "very very bad film", "dull", "a plot"]
    found = judge.prefer(PROMPTS, answers, answers[::-1])
    labels = [words.convert_tokens_to_ids(label) for label in (" A", " B")]
    for k, value in enumerate(found):
        asked = QUESTION.format(prompt=PROMPTS[k], first=answers[k], second=answers[::-1][k]).strip()
        text = f"user : {asked} assistant :{ANSWER}" if template else asked + "\n\n" + ANSWER
        with torch.no_grad():
            logits = model(torch.tensor([words(text)["input_ids"]])).logits[0, -1]
        assert value == pytest.approx(float(logits[labels].softmax(-1)[0]), abs=1e-5)
    assert make_pairwise(f"llm:{folder}").name == f"llm:{folder}"


@pytest.mark.model
def test_a_response_cannot_end_its_turn_and_long_ones_are_cut_alike(assets: Path) -> None:
    judge = LanguageModelJudge(str(assets / "smollm2"), max_length=200)
    ending = "<|im_end|>"
    special = judge._tokenizer.convert_tokens_to_ids(ending)
    usual = judge._question("Is it?", "Yes.", "No.").count(special)
    assert usual > 0
    assert judge._question(f"Is{ending}", f"Yes.{ending}", f"No.{ending}").count(special) == usual
    row = judge._question("one " * 500, "two " * 500, "three")
    assert len(row) <= 200 and row[-len(judge._frame[3]) :] == judge._frame[3]
    text = judge._tokenizer.decode(row)
    assert text.count("two") >= 40 and text.count("one") >= 20 and "three" in text


def test_a_language_model_without_labels_is_refused(tiny_policy: Path) -> None:
    with pytest.raises(ConfigError, match="as the same token"):
        LanguageModelJudge(str(tiny_policy))


def test_a_reward_model_is_a_judge(tmp_path: Path) -> None:
    folder = llama_reward(tmp_path / "rm")
    judge = make_score_judge(str(folder))
    assert isinstance(judge, RewardModelJudge)
    plain = judge.score(["the film is"], [" good"])
    alone = RewardScorer(folder, batch_tokens=64, max_length=64).score_texts(["the film is good"])
    assert plain == pytest.approx(alone, abs=1e-5)
    preferred = make_pairwise(str(folder)).prefer(PROMPTS, ["good"] * 4, ["good"] * 4)
    assert preferred.tolist() == [0.5] * 4


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
        of_rewards = ensemble._key([adapter], Dataset.from_list([{"id": "a"}]), 64)
        found.append((fingerprint_model(str(adapter)), fingerprint_model(str(tmp_path / "base")), of_rewards))
    assert all(one != other for one, other in zip(*found, strict=True))
    assert fingerprint_model("some/hub-id") == "some/hub-id"


def test_a_judge_that_is_asked_for_yes_or_no_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model's folder has slashes; and its verdicts are another judge's than those of the same model as `llm:`."""
    asked: list[str] = []
    monkeypatch.setattr("reward_models.pairwise_judges.make_judge", lambda name: asked.append(name) or VaderJudge())
    model = tmp_path / "judge"
    model.mkdir()
    make_score_judge(f"yes-no:{model}")
    assert asked == [f"yes-no:{model}"]
    before = {kind: judge_key(f"{kind}{model}") for kind in ("", "llm:", "yes-no:")}
    assert len(set(before.values())) == 3
    (model / "weights").write_text("other")
    assert not {judge_key(f"{kind}{model}") for kind in before} & set(before.values())


@pytest.mark.parametrize(
    ("name", "message"), [("vadre", "did you mean `vader`"), ("llm:x/y", "only says which of two")]
)
def test_judges_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(AlignError, match=message):
        make_score_judge(name)


def test_an_adapter_is_a_policy(tiny_policy: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_policy / name, tmp_path / "adapter")
    policy = Policy("adapted", str(tmp_path / "adapter"))
    written = write_completions(policy, PROMPTS, WARM, tmp_path)
    assert np.abs(measure_kl(written, find_reference([policy], None), tmp_path)).max() > 1e-3


def test_rewardbench_sections() -> None:
    accuracies = {subset: 0.5 for weights in SECTIONS.values() for subset in weights}
    accuracies["math-prm"] = 1.0
    found = section_scores(accuracies)
    assert found is not None and found["missing"] == []
    assert found["sections"]["Reasoning"] == pytest.approx(0.75)  # maths counts as much as all code together
    assert found["overall"] == pytest.approx((0.5 * 3 + 0.75) / 4)
    part = section_scores({"alpacaeval-easy": 1.0, "mt-bench-easy": 0.0})
    assert part is not None and part["sections"] == {"Chat": pytest.approx(100 / 128)} and part["overall"] is None
    assert section_scores({"mine": 1.0}) is None


def test_metrics_of_a_reward_model_say_what_they_see() -> None:
    rng = np.random.default_rng(0)
    offset = rng.normal(0, 4, 300)
    chosen, rejected = offset + rng.normal(2, 1, 300), offset + rng.normal(0, 1, 300)
    groups = ["a" if value > 0 else "b" for value in offset]
    found = reward_model_metrics(chosen, rejected, groups, seed=0)
    assert found["accuracy"]["value"] == pytest.approx((chosen > rejected).mean()) and found["auc"]["high"] < 0.75
    assert set(found["categories"]) == {"a", "b"} and found["opis"]["differs"]
    assert "Across prompts it orders worse" in found["said"][1] and "does not mean the same" in found["said"][2]
    assert found["macro_accuracy"] == pytest.approx(
        np.mean([found["categories"][name]["accuracy"]["value"] for name in "ab"])
    )
    blind = reward_model_metrics(rng.normal(size=300), rng.normal(size=300), None, seed=0)
    assert blind["said"][0].startswith("At chance") and blind["opis"] is None and blind["categories"] == {}


def scored_pairs(count: int = 60) -> tuple[Dataset, np.ndarray]:
    """Pairs of which the reward model likes the longer response, whatever the label."""
    rng = np.random.default_rng(5)
    table = []
    for k in range(count):
        lengths = rng.permutation([3, 3 + 1 + k % 9])
        chosen, rejected = (" ".join(["good"] * int(n)) + f" {k}" for n in lengths)
        table.append({"id": f"p{k}", "prompt": "<b>film</b>", "chosen": chosen, "rejected": rejected + " <i>",
                      "teacher_margin": float(k % 5)})  # fmt: skip
    pairs = Dataset.from_list(table)
    return pairs, word_difference(pairs) + rng.normal(0, 0.1, count)


def test_pair_findings_name_length_distance_and_disagreements() -> None:
    pairs, margins = scored_pairs()
    distance = np.arange(60.0)
    found = pair_findings(pairs, margins, distances=(distance, 49.5), seed=0)
    assert found["length"]["accuracy_longer"]["value"] == 1 and found["length"]["accuracy_shorter"]["value"] == 0
    assert found["ood"]["share"] == pytest.approx(10 / 60)
    assert found["ood"]["accuracy_far"]["value"] == pytest.approx(np.mean(margins[50:] > 0))
    assert [one["id"] for one in found["ood"]["farthest"]] == [f"p{k}" for k in range(59, 49, -1)]
    shown = [one["margin"] for one in found["disagreements"]]
    assert shown == sorted(shown) and shown[0] == margins.min() and max(shown) < 0
    gold = np.asarray(pairs["teacher_margin"])
    assert found["reference_correlation"]["value"] == pytest.approx(np.corrcoef(margins, gold)[0, 1])
    said = finding_sentences(found)
    assert said[0].startswith("It pays for longer responses") and "16.7% of the pairs are farther" in said[1]
    fair = pair_findings(pairs.remove_columns("teacher_margin"), np.ones(60), distances=None, seed=0)
    assert fair["ood"] is None and fair["reference_correlation"] is None and fair["disagreements"] == []
    assert finding_sentences(fair) == []


def test_the_page_of_a_reward_model_escapes_every_text(tmp_path: Path) -> None:
    pairs, margins = scored_pairs()
    pairs = pairs.add_column("group", ["<u>one"] * 30 + [f"g{k}" for k in range(30)])
    groups = list(pairs["group"])
    found = reward_model_metrics(margins, np.zeros(60), groups, seed=0)
    found |= pair_findings(pairs, margins, distances=(np.arange(60.0), 49.5), seed=0)
    found["run"] = {"model": "<script>m", "pairs": "p", "command": "c", "chat": False, "seconds": 1}
    write_reward_model_page(tmp_path / "page.html", found, margins, groups=groups, words=word_difference(pairs))
    page = (tmp_path / "page.html").read_text()
    assert not any(f"<{tag}" in page for tag in ("script", "b>film", "i>", "u>one"))
    assert "&lt;b&gt;film" in page and "&lt;u&gt;one" in page and "other groups" in page
    assert "Where does it contradict the labels most?" in page and "distance 59.00" in page


def test_groups_of_margins_lose_no_pair() -> None:
    margins = np.arange(40.0)
    groups = [f"g{k % 11}" for k in range(40)]
    made = by_group(margins, groups)
    assert len(made) == GROUPS + 1 and sorted(chain(*made.values())) == margins.tolist()
    assert made["g0"] == margins[::11].tolist() and by_group(margins, None) == {"margins": margins.tolist()}
