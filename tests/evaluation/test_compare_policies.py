"""A comparison of policies: paired gains, KL with one origin, win rate, texts; what was not measured is left out."""

import numpy as np
import pytest

from align.evaluation.compare_policies import (
    Comparison,
    KlSamples,
    PolicySamples,
    compare_policies,
    first_samples,
    prompt_ids,
)
from align.evaluation.text_statistics import Texts

COUNT = 200
RNG = np.random.default_rng(0)
BASE = RNG.normal(0, 5, COUNT)
KL = KlSamples(RNG.uniform(1, 3, COUNT), RNG.normal(2, 3, COUNT))


def texts(word: str, length: int = 3) -> Texts:
    """Equal texts for all prompts, none of them cut off."""
    return Texts([" ".join([word] * length)] * COUNT, [length] * COUNT, [True] * COUNT)


def compared(as_it_is: bool = True, kl: KlSamples | None = KL) -> Comparison:
    """A policy that is better by 1 on every prompt, and one that is worse by 2."""
    policies = {
        "reference": PolicySamples(BASE, as_it_is=as_it_is),
        "better": PolicySamples(BASE + 1, kl, as_it_is=as_it_is),
        "worse": PolicySamples(BASE - 2, as_it_is=as_it_is),
    }
    return compare_policies(policies, baseline="reference")


def test_gains_are_paired_and_every_two_policies_are_compared() -> None:
    found = compared()
    assert found.policies["reference"]["gain"] is None
    for name, gain in (("better", 1), ("worse", -2)):
        assert found.policies[name]["gain"] == {"value": pytest.approx(gain), "low": None, "high": None, "n": COUNT}
        assert found.policies[name]["reward"]["value"] == pytest.approx(BASE.mean() + gain)
    (difference,) = found.differences
    assert (difference["a"], difference["b"], difference["difference"]["value"]) == (
        "worse",
        "better",
        pytest.approx(-3),
    )
    assert found.texts == {} and found.changes == [] and found.win_rate is None


def test_the_ratio_is_gain_over_the_root_of_twice_the_kl() -> None:
    found = compared().policies["better"]
    assert found["kl"]["value"] == pytest.approx(KL.exact.mean())
    assert found["kl_one_sample"]["value"] == pytest.approx(KL.log_ratios.mean())
    assert found["gain_per_root_kl"]["value"] == pytest.approx(1 / np.sqrt(2 * KL.exact.mean()))


@pytest.mark.parametrize(("as_it_is", "kl"), [(False, KL), (True, None)])
def test_no_ratio_of_two_origins_or_without_a_kl(as_it_is: bool, kl: KlSamples | None) -> None:
    """At another temperature the gain is counted from the tempered baseline, the KL from the reference itself."""
    found = compared(as_it_is, kl).policies["better"]
    assert found["gain_per_root_kl"] is None and (found["kl"] is None) == (kl is None)


def test_a_win_rate_of_preferences_and_changes_of_texts() -> None:
    first, second = np.repeat([1.0, 0.0], [150, 50]), np.repeat([1.0, 0.0], [100, 100])
    policies = {"a": PolicySamples(texts=texts("good", 6)), "b": PolicySamples(texts=texts("bad"))}
    found = compare_policies(policies, baseline="b", preferences=(first, second))
    assert found.win_rate is not None
    assert found.win_rate.rate.value == pytest.approx((0.75 + 0.5) / 2) and found.win_rate.ties == 50
    assert found.win_rate.length_difference.value == len("good good good good good good") - len("bad bad bad")
    assert {(change["policy"], change["what"]) for change in found.changes} == {("a", "tokens"), ("a", "repetition")}
    assert found.policies == {} and found.texts["b"]["change"] is None


def test_preferences_are_between_two_policies() -> None:
    policies = {name: PolicySamples(texts=texts(name)) for name in "abc"}
    with pytest.raises(ValueError, match=r"the texts of two policies, got those of \['a', 'b', 'c'\]"):
        compare_policies(policies, baseline="b", preferences=(np.ones(COUNT), np.ones(COUNT)))


def test_the_first_samples_show_every_policy() -> None:
    written = {"a": ["x", "y", "z"], "b": ["u", "v", "w"]}
    found = first_samples(["p", "q", "r"], written, {"a": np.array([1.0, 2.0, 3.0])}, 2)
    assert [sample["prompt"] for sample in found] == ["p", "q"]
    assert found[1]["completions"] == {"a": {"text": "y", "reward": 2.0}, "b": {"text": "v", "reward": None}}
    assert len(first_samples(["p", "q", "r"], written, {}, 9)) == 3


def test_a_prompt_that_is_given_several_times_counts_once() -> None:
    """Rewards, KL and ratio are those of the means per prompt; three copies of a file are no more evidence than one."""
    prompts = [{"prompt": [{"role": "user", "content": str(k)}]} for k in range(COUNT)]
    assert prompt_ids(prompts) is None
    codes = prompt_ids(prompts * 3)
    assert codes is not None and codes.tolist() == list(range(COUNT)) * 3
    noise = RNG.normal(0, 1, COUNT)

    def measured(copies: int, clusters: np.ndarray | None) -> Comparison:
        better = PolicySamples(np.tile(BASE + noise, copies), KlSamples(*(np.tile(values, copies) for values in KL)))
        reference = PolicySamples(np.tile(BASE, copies))
        return compare_policies({"reference": reference, "better": better}, baseline="reference", clusters=clusters)

    once, thrice = measured(1, None).policies, measured(3, codes).policies
    for name, key in (("reference", "reward"), ("better", "gain"), ("better", "kl"), ("better", "gain_per_root_kl")):
        assert thrice[name][key] == pytest.approx(once[name][key]), key
    assert measured(3, None).policies["better"]["gain"]["low"] > once["better"]["gain"]["low"]
