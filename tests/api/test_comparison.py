"""``compare_policies``: that of `align eval compare`, loaded models and folders alike; own judges; what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.api import compare_policies
from align.commands.compare import write_comparisons
from align.commands.evaluation_job import Settings
from align.errors import AlignError
from align.generation.types import Completion, Engine, Sampling
from align.io.files import read_json
from reward_models import RewardModel
from tests.api.test_pair_tables import in_python
from tests.helpers.builders import causal, llama_reward

PROMPTS = [f"the {word} film {'very ' * k}is" for k, word in enumerate(["good", "bad", "dull", "fine"])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two policies and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    return causal(folder / "one", 0), causal(folder / "two", 1), llama_reward(folder / "rm")


class Longer:
    """Prefers the longer completion."""

    name = "longer"

    def score(self, prompts: Any, completions: Any) -> np.ndarray:
        return np.array([len(text) for text in completions], dtype=float)


class First:
    """Prefers what is shown first: all position bias."""

    name = "first"

    def prefer(self, prompts: Any, first: Any, second: Any) -> np.ndarray:
        return np.ones(len(prompts))


def test_numbers_and_page_are_those_of_the_verb(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    one, two, judge = map(str, models)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in PROMPTS))
    sampling = Sampling(6, 1.0, seed=2, batch_size=64)
    write_comparisons(
        [one, two], Settings(str(tmp_path / "prompts.jsonl"), tmp_path / "out", judge, sampling, limit=None, shown=100)
    )
    (expected,) = read_json(tmp_path / "out" / "report.json")["comparisons"].values()
    found = compare_policies(one, two, PROMPTS, judge=judge, max_new_tokens=6, seed=2)
    assert {key: found.details[key] for key in expected if key != "run"} == {
        key: value for key, value in expected.items() if key != "run"
    }
    assert found.win_rate == expected["win_rate"]["rate"]["value"]
    assert found.interval == (expected["win_rate"]["rate"]["low"], expected["win_rate"]["rate"]["high"])
    assert found.table["prompt"] == PROMPTS and np.mean(found.table["preference"]) == found.win_rate
    found.write_page(tmp_path / "pages" / "compare.html")
    assert found.summary.split(" (")[0].startswith("one wins") and PROMPTS[2] in (
        tmp_path / "pages" / "compare.html"
    ).read_text(encoding="utf-8")
    loaded = compare_policies(one, two, PROMPTS, judge=RewardModel.from_pretrained(judge), max_new_tokens=6, seed=2)
    assert loaded.table.to_list() == found.table.to_list()


def test_a_loaded_model_writes_what_its_folder_writes(models: tuple[Path, Path, Path]) -> None:
    one, two, _ = models
    model = AutoModelForCausalLM.from_pretrained(two, dtype="float32").train()
    settings: dict[str, Any] = {"judge": Longer(), "max_new_tokens": 6}
    by_folder, loaded = (compare_policies(one, policy, PROMPTS, **settings) for policy in (two, model))
    assert loaded.table.to_list() == by_folder.table.to_list() and model.training
    model.name_or_path = model.config._name_or_path = ""
    given = compare_policies(one, model, PROMPTS, tokenizer=AutoTokenizer.from_pretrained(two), **settings)
    assert given.table.to_list() == by_folder.table.to_list()
    with pytest.raises(AlignError, match=r"does not say where it comes from.*\n.*give tokenizer="):
        compare_policies(one, model, PROMPTS, **settings)


def test_a_policy_against_itself_ties(models: tuple[Path, Path, Path]) -> None:
    """Ties count half and give no interval; a judge with nothing but position bias gives one half."""
    same = compare_policies(models[0], models[0], PROMPTS, judge=Longer(), max_new_tokens=6)
    assert same.win_rate == 0.5 and same.interval is None and set(same.table["preference"]) == {0.5}
    biased = compare_policies(models[0], models[1], PROMPTS, judge=First(), max_new_tokens=6)
    assert biased.win_rate == 0.5 and biased.details["win_rate"]["position_bias"]["value"] == 0.5


def test_several_completions_of_a_prompt_count_once(models: tuple[Path, Path, Path]) -> None:
    """The first ones are those of n=1; a prompt has the mean of its preferences, and the interval is over prompts."""
    one, two, _ = models
    single = compare_policies(one, two, PROMPTS, judge=Longer(), max_new_tokens=6)
    several = compare_policies(one, two, PROMPTS, judge=Longer(), max_new_tokens=6, n=3)
    assert len(several.table) == 12 and several.table.select(range(4)).to_list() == single.table.to_list()
    means = np.array(several.table["preference"]).reshape(3, 4).mean(axis=0)
    rate = several.details["win_rate"]
    assert several.win_rate == pytest.approx(means.mean()) and rate["rate"]["n"] == 4
    assert (rate["wins"], rate["losses"]) == (int((means > 0.5).sum()), int((means < 0.5).sum()))
    assert several.details["texts"]["one"]["tokens"]["units"] == 4 and several.details["run"]["n_prompts"] == 4


class Broken:
    name = "broken"

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def prefer(self, prompts: Any, first: Any, second: Any) -> np.ndarray:
        return np.array(self.values)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"judge": "vadr"}, "judge-name", "'vadr' is not known (did you mean `vader`?)"),
        ({"judge": 3}, "judge-name", "judge: found 3, expected a name, or an object that judges"),
        ({"judge": "vader", "max_length": 9}, "eval-judge", "max_length: found 9 for the judge vader"),
        ({"judge": Broken([1.0, 0.0])}, "eval-judge", "an array of shape (2,), expected 4 preferences"),
        ({"judge": Broken([0.5, 1.5, 0.0, 1.0])}, "eval-judge", "the preference 1.5 for completion 1"),
        ({"judge": Broken([0.5, 0.5, float("nan"), 1.0])}, "eval-judge", "the preference nan for completion 2"),
        ({"prompts": []}, "data-empty", "prompts: holds no prompt"),
        ({"prompts": "the film"}, "data-type", "prompts: found a str"),
        ({"prompts": ["the film", "", None]}, "prompt-row", "prompts[1]: found empty text"),
        ({"prompts": [[{"role": "usr", "content": "x"}]]}, "prompt-row", "prompts[0]: found role 'usr'"),
        ({"prompts": [[{"role": "assistant", "content": "x"}]]}, "prompt-row", "found a last message by assistant"),
        ({"n": 0}, "config-option", "n: found 0"),
        ({"max_new_tokens": 1.5}, "config-option", "max_new_tokens: found 1.5"),
        ({"temperature": -1.0}, "config-option", "temperature: found -1.0"),
        ({"a": 3}, "eval-policy", "a: found 3"),
        ({"b": "no/where/at/all"}, "model-load", "no/where/at/all"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], code: str, words: str, models: tuple[Path, Path, Path]) -> None:
    given: dict[str, Any] = {"a": models[0], "b": models[1], "prompts": PROMPTS, "judge": "vader", "max_new_tokens": 2}
    with pytest.raises(AlignError) as caught:
        compare_policies(**(given | arguments))
    assert caught.value.code == code and words in str(caught.value)
    in_python(caught.value)


class Fixed(Engine):
    """Yields the given completions per prompt, last prompt first."""

    def __init__(self, name: str, items: Any) -> None:
        self.name = name
        self.items = items

    def stream(self, prompts: Any, sampling: Sampling, keys: Any = None) -> Any:
        yield from reversed([(k, self.items(k)) for k in range(len(prompts))])


def said(*texts: str) -> list[Completion]:
    return [Completion(text, list(text.encode()), "stop") for text in texts]


def test_an_engine_of_your_own_is_a_policy() -> None:
    """Fixed texts come back in the order of the prompts; the judge prefers the longer ones, which are known."""
    lengths = [3, 1, 4, 2]
    mine = Fixed("mine", lambda k: said("x" * lengths[k % 4]))
    other = Fixed("other", lambda k: said("yy"))
    found = compare_policies(mine, other, PROMPTS, judge=Longer())
    assert found.table["a"] == ["x" * length for length in lengths] and set(found.table["b"]) == {"yy"}
    assert found.table["preference"] == [1.0, 0.0, 1.0, 0.5] and found.win_rate == 0.625
    assert found.details["texts"]["mine"]["tokens"]["value"] == 2.5 and found.details["a"] == "mine"
    assert found.details["run"]["policies"] == {"mine": "the engine mine", "other": "the engine other"}
    assert len(compare_policies(mine, other, PROMPTS, judge=Longer(), n=2).table) == 8


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (lambda k: said("a", "b"), "found 2 completions for prompt 3, expected 1"),
        (lambda k: [Completion("a", [], "stop")], "found a text without token_ids for prompt 3"),
        (lambda k: [Completion(None, [1], "stop")], "found the text None for prompt 3"),  # type: ignore[arg-type]
        (lambda k: [Completion("a", (1,), "stop")], r"found the token_ids \(1,\) for prompt 3"),  # type: ignore[arg-type]
        (lambda k: [Completion("a", [1], "eos")], "found the finish_reason 'eos' for prompt 3"),  # type: ignore[arg-type]
        (lambda k: ["a"], "found a str for prompt 3, expected a Completion"),
        (lambda k: Completion("a", [1], "stop"), r"expected \(number of a prompt, list of its completions\)"),
        (lambda k: [], r"none of 4 prompts was completed by every policy \(not completed: odd 4\)"),
    ],
)
def test_what_an_engine_must_yield(items: Any, words: str) -> None:
    good = Fixed("good", lambda k: said("a"))
    with pytest.raises(AlignError, match=words) as caught:
        compare_policies(Fixed("odd", items), good, PROMPTS, judge=Longer())
    in_python(caught.value)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([0, 1, 3], "nothing for prompt 2"), ([0, 1, 2, 2], "the index 2 twice"), ([0, 1, 2, 4], "the index 4, expected")],
)
def test_an_engine_yields_each_prompt_once(numbers: list[int], words: str) -> None:
    class Odd(Fixed):
        def stream(self, prompts: Any, sampling: Sampling, keys: Any = None) -> Any:
            yield from ((k, said("a")) for k in numbers)

    with pytest.raises(AlignError, match=f"engine odd: found {words}") as caught:
        compare_policies(Odd("odd", None), Fixed("good", lambda k: said("a")), PROMPTS, judge=Longer())
    assert caught.value.code == "engine-output"


def test_an_engine_that_returns_nothing_or_takes_others_arguments() -> None:
    """The second is refused before anything is sampled."""

    class Nothing(Fixed):
        def stream(self, prompts: Any, sampling: Sampling, keys: Any = None) -> Any:
            return None

    class Fewer(Fixed):
        def stream(self, prompts: Any) -> Any:  # type: ignore[override]
            raise AssertionError

    good = Fixed("good", lambda k: said("a"))
    with pytest.raises(AlignError, match=r"\[engine-output\] engine odd: found None, expected an iterator"):
        compare_policies(Nothing("odd", None), good, PROMPTS, judge=Longer())
    with pytest.raises(AlignError, match=r"b: .*stream\(prompts, sampling, keys\) cannot be called: too many"):
        compare_policies(good, Fewer("odd", None), PROMPTS, judge=Longer())


@pytest.mark.parametrize("kind", ["score", "prefer"])
@pytest.mark.parametrize(
    "given",
    [None, ["a"] * 4, [None] * 4, (x for x in ()), [[1.0]] * 4, 1.0, [1.0, [2.0]]],
    ids=lambda given: f"{given!r:.12}",
)
def test_what_a_judge_must_return(kind: str, given: Any) -> None:
    judge = type("Odd", (), {"name": "odd", kind: lambda *_: given})()
    good = Fixed("good", lambda k: said("a"))
    with pytest.raises(AlignError, match=r"\[eval-judge\] judge odd: found .*, expected 4 ") as caught:
        compare_policies(good, Fixed("other", lambda k: said("b")), PROMPTS, judge=judge)
    in_python(caught.value)


def test_judges_that_cannot_be_called_are_refused_before_anything_is_sampled() -> None:
    class Never(Fixed):
        def stream(self, prompts: Any, sampling: Sampling, keys: Any = None) -> Any:
            raise AssertionError

    class Fewer:
        name = "odd"

        def score(self, completions: Any) -> Any:
            raise AssertionError

    for judge in (Fewer(), Longer):
        with pytest.raises(AlignError, match=r"\[judge-name\] judge: .*score\(prompts, completions\) cannot be called"):
            compare_policies(Never("a", None), Never("b", None), PROMPTS, judge=judge)


def test_there_is_no_default_judge(models: tuple[Path, Path, Path]) -> None:
    with pytest.raises(TypeError, match="judge"):
        compare_policies(models[0], models[1], PROMPTS)  # type: ignore[call-arg]


@pytest.mark.parametrize("prefix", ["", "reward-server:"])
def test_a_judge_whose_template_takes_no_answer_is_refused_before_anything_is_sampled(
    prefix: str, tmp_path: Path
) -> None:
    judge = llama_reward(tmp_path / "judge")
    (judge / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('asks alone') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    engine = Fixed("unasked", lambda k: pytest.fail("sampled before the judge's template was tried"))
    with pytest.raises(AlignError, match="asks alone"):
        compare_policies(engine, engine, [[{"role": "user", "content": "the film is"}]], judge=f"{prefix}{judge}")
