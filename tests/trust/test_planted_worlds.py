"""What `align trust` says in worlds whose truth is known: noise claims nothing, and gold margins are believed."""

from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from align.stats import share_interval
from align.trust.analysis import analyze, leads
from align.trust.linear_proxy import DPO, MADPO, SOFT, Family, HeldOut, Setting, held_out, scaled
from align.trust.measure import _measured
from align.trust.selection import Selection, bootstrap, choose, cluster_sums, standard_error, undecided
from align.trust.sentences import sentences
from tests.trust.test_trust import SMALL

WORLDS = 20
FAST = Family(grid=SMALL.grid, spreads=(0.2, 0.8, 3.2))


def world(kind: str, seed: int, count: int = 150, size: int = 5) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Features, margins and folds: ``kind`` names what is noise, or is gold, ties or reversed."""
    rng = np.random.default_rng([seed, 11])
    x = rng.normal(size=(count, size))
    gold = x @ (2 * np.ones(size) / np.sqrt(size))
    chance = np.full(count, 0.5) if kind in ("both", "labels") else expit(gold)
    margin = 2 * rng.normal(size=count) if kind in ("both", "margins") else gold
    label = np.where(rng.random(count) < chance, 1.0, -1.0)
    if kind == "ties":
        margin = np.where(rng.random(count) < 0.5, 0.0, gold)
    if kind == "reversed":
        margin = -gold
    return x * label[:, None], margin * label, [rng.permutation(count) % 5]


def measured(kind: str, seed: int, **options: Any) -> dict[str, Any]:
    return analyze(*world(kind, seed, **options), FAST, same_labels=False, seed=seed)


CLAIMS = ("better than chance", "worse than chance", "better by", "worse by", "worth", "in sight", "as good", "odds")


def claims(found: dict[str, Any]) -> list[str]:
    said = sentences(found, "outside")
    text = " ".join(said[name] for name in ("verdict", "labels", "margin", "both", "against", "more"))
    text = text.replace("not measurably better than chance", "")
    return [claim for claim in (*CLAIMS, "Train with") if claim in text]


@pytest.mark.parametrize("kind", ["both", "labels"])
def test_noise_claims_nothing(kind: str) -> None:
    assert sum(bool(claims(measured(kind, seed))) for seed in range(WORLDS)) <= WORLDS // 20


def test_noise_in_the_margins_is_never_believed() -> None:
    """The labels are informative, so their gain over chance is claimed; no margin is, and nothing is worth labels."""
    for seed in range(WORLDS // 2):
        found = measured("margins", seed)
        assert found["chosen"]["trust"] == found["chosen"]["strength"] == 0
        said = sentences(found, "outside")
        assert (
            "worth" not in said["both"] and "odds" not in said["margin"] and "in sight" not in " ".join(said.values())
        )


def test_literal_sentences_where_nothing_is_known() -> None:
    found = measured("both", 1)
    said = sentences(found, "outside")
    assert said["verdict"] == (
        "These data cannot tell; plain DPO is the default: on 150 pairs no setting has a lead, over chance and over "
        "the other loss, beyond its 95% interval."
    )
    gain = found["against"]["dpo"]
    numbers = f"{gain['value']:.3f} nats a pair ({gain['low']:.3f} to {gain['high']:.3f})"
    assert said["against"] == f"Against plain DPO: no lead that these data show, {numbers}."
    assert said["labels"].startswith("Labels alone: a policy trained on them is not measurably better than chance")
    assert said["more"].endswith("more pairs may show a difference where these show none.")
    assert said["both"].endswith(")."), "no sentence of worth follows"


def test_gold_margins_are_believed() -> None:
    """In few pairs of many directions labels alone learn little, and the gold margins lead."""
    found = measured("gold", 0, count=300, size=40)
    assert found["decided"] and found["chosen"]["trust"] > 0 and found["chosen"] == found["proposed"]
    said = sentences(found, "outside")
    assert said["verdict"].startswith("Train ") and "Against plain DPO: better by" in said["against"]


def test_reversed_margins_are_reported_as_such() -> None:
    found = measured("reversed", 0)
    assert found["decided"] and found["chosen"]["trust"] == 0
    assert sentences(found, "outside")["verdict"].startswith("Train with plain DPO: the margins contradict the labels")


def test_ties_count_half() -> None:
    features, margin, folds = world("ties", 0)
    found = analyze(features, margin, folds, FAST, same_labels=False, seed=0)["agreement"]
    assert found == share_interval(np.where(margin == 0, 0.5, margin > 0)).to_dict() and found["value"] > 0.6


def gain(value: float, half: float) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def test_a_lead_is_beyond_both_intervals() -> None:
    against = {"dpo": gain(0.1, 0.05), "soft_labels": gain(0.1, 0.05)}
    agree = gain(0.7, 0.1)
    for proposed in (SOFT, DPO):
        assert leads(proposed, 1.0, agree, gains={"both": gain(0.2, 0.1)}, against=against)
        assert not leads(proposed, 1.0, agree, gains={"both": gain(0.1, 0.2)}, against=against)
        unclear = {name: gain(0.1, 0.2) for name in against}
        assert not leads(proposed, 1.0, agree, gains={"both": gain(0.2, 0.1)}, against=unclear)
    assert leads(DPO, 0.0, gain(0.3, 0.1), gains={}, against={})
    assert not leads(DPO, 0.0, gain(0.45, 0.1), gains={}, against={})


def described(**changes: Any) -> dict[str, Any]:
    against = {"dpo": gain(0.1, 0.05), "madpo": gain(-0.1, 0.05), "soft_labels": gain(0.01, 0.05)}
    curve = [{"share": s, "labels": 0.30 - 0.10 / s, "chosen": 0.28 - 0.02 / s} for s in (0.25, 0.5, 1.0)]
    found = {
        "slope": 1.0, "decided": True, "pairs": 100, "chosen": {"trust": 0.5, "strength": 0.0},
        "interval": {"trust": [0.25, 0.75]}, "agreement": gain(0.7, 0.1), "against": against, "curve": curve,
        "gains": {"labels": gain(0.2, 0.05), "margin": gain(-0.2, 0.05), "both": gain(0.26, 0.1)},
    }  # fmt: skip
    return found | changes


def test_literal_sentences_of_a_lead() -> None:
    said = sentences(described(), "outside")
    assert said["against"] == (
        "Against plain DPO: better by 0.100 nats a pair (0.050 to 0.150). "
        "Against MADPO: worse by 0.100 nats a pair (0.050 to 0.150). "
        "Against soft labels: no measurable difference, 0.010 nats a pair (-0.040 to 0.060)."
    )
    assert said["both"].endswith("better than chance. One margin is worth about 1.5 labels.")
    assert said["more"].endswith("with about 4.0 times as many pairs labels alone would be as good.")
    assert "predicts an unseen label worse than chance, by 0.200 nats a pair (0.150 to 0.250)" in said["margin"]
    flat = [{"share": s, "labels": 0.1, "chosen": 0.2} for s in (0.25, 0.5, 1.0)]
    endless = sentences(described(curve=flat), "outside")
    assert endless["both"].endswith("No number of further labels in sight would replace the margins.")
    assert endless["more"].endswith("no number of pairs in sight would make labels alone as good.")
    unclear = sentences(described(curve=flat, decided=False), "outside")
    assert "in sight" not in " ".join(unclear.values())


def test_signs_that_are_not_clear_are_none() -> None:
    sign = {"clear": False, "z": 1.0, "correlation": 0.1}
    assert (
        sentences(described(signs={"length": sign}), "outside")["shared"] == "Shared errors: no sign of one in length."
    )
    clear = sentences(described(signs={"length": sign | {"clear": True, "z": 4.0}}), "outside")["shared"]
    assert "favor the longer response (z 4.0;" in clear
    clear = sentences(described(signs={"length": sign | {"clear": True, "z": -4.0}}), "outside")["shared"]
    assert "favor the shorter response (z -4.0;" in clear


def test_held_out_labels_rule_out_what_is_three_standard_errors_behind() -> None:
    """The evidence's favorite is chosen only if the labels leave it."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=100)
    noise = (noise - noise.mean()) / noise.std()
    loglik = np.zeros((100, 4, 1))
    loglik[:, 1, 0] = -0.3 + noise  # mean difference 3 standard errors of 0.1
    loglik[:, 2, 0] = -0.05 + noise
    loglik[:, 3, 0] = -1.0
    assert undecided(loglik, Selection(0, 0), 1.0).ravel().tolist() == [True, False, True, False]
    theta, x = rng.normal(size=(5, 4, 1)), rng.normal(size=(50, 5))
    found = HeldOut(loglik - 0.6, np.full(100, -0.6), 0.5)
    for favorite, allowed in ((1, False), (2, True)):
        chosen = choose(found, theta, theta[:, favorite, 0], x, SMALL, same_labels=False)
        assert (chosen.setting == favorite) == allowed


def test_standard_errors_are_over_clusters() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=(40, 2)), 5, axis=0)
    clusters = np.repeat(np.arange(40), 5)
    assert cluster_sums(values, clusters) == pytest.approx(5 * values[::5])
    assert standard_error(values, clusters) == pytest.approx(values[::5].std(axis=0) / np.sqrt(40))
    assert standard_error(values, None) == pytest.approx(values.std(axis=0) / np.sqrt(200))


@pytest.mark.parametrize("times", [1, 4])
def test_the_bootstrap_is_a_plain_loop_over_clusters(times: int) -> None:
    """Near ties between the settings: the interval is that of 95%, and copies do not make it narrower."""
    grid = tuple(Setting(t, 0.0) for t in (0.0, 0.25, 0.5, 0.75, 1.0))
    loglik = np.random.default_rng(2).normal(size=(60, 5, 1))
    loglik -= 0.7 * loglik.mean(axis=0)
    rng = np.random.default_rng(0)
    chosen = [grid[int(loglik[rng.integers(0, 60, 60), :, 0].mean(axis=0).argmax())].trust for _ in range(500)]
    found = bootstrap(
        np.repeat(loglik, times, axis=0), grid, seed=0, clusters=np.repeat(np.arange(60), times) if times > 1 else None
    )
    assert found["trust"] == tuple(np.quantile(chosen, [0.025, 0.975]))
    assert found["trust"] != tuple(np.quantile(chosen, [0.25, 0.75]))


def test_learning_curves_do_not_depend_on_the_order_of_the_rows() -> None:
    """A quarter of the clusters is drawn, all pairs of each: with adjacent pairs of a prompt as with shuffled ones."""
    features, margin, _ = world("gold", 3, count=200)
    clusters = np.repeat(np.arange(50), 4)
    fold = clusters % 5

    part = Family(grid=(DPO, MADPO), spreads=(0.8,))
    quarter = [
        held_out(scaled(features), margin, [fold], part, share=0.25, clusters=clusters, seed=k) for k in (0, 0, 1)
    ]
    assert [bool((one.loglik == quarter[0].loglik).all()) for one in quarter] == [True, True, False]
    order = np.random.default_rng(0).permutation(200)
    moved = held_out(scaled(features)[order], margin[order], [fold[order]], part, share=0.25, clusters=clusters[order])
    assert moved.loglik == pytest.approx(quarter[0].loglik[order], abs=1e-5)


def test_few_groups_are_refused_and_many_pairs_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    from align.errors import DataError
    from align.trust import measure

    def table(prompts: int) -> Dataset:
        rows = [{"prompt": f"p {k % prompts}", "chosen": f"a {k}", "rejected": f"b {k}"} for k in range(60)]
        return Dataset.from_list(rows)

    with pytest.raises(DataError, match="found 60 pairs in 7 groups that share prompts or responses"):
        _measured(table(7), 0)
    monkeypatch.setattr(measure, "MOST", 30)
    pairs, clusters = _measured(table(20), 0)
    assert len(pairs) == 30 and np.bincount(clusters).tolist() == [3] * 10
