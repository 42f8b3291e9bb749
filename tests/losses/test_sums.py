"""Sums of losses: as the configuration gives them, what is refused, and that everything wrong is named at once."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from align.config import LossSection, TrainSection, load_config
from align.entanglement.conditions import loss_weights
from align.errors import AlignError, ConfigError, DataError
from align.losses.pairwise import gradient_weights
from align.losses.registry import ALIASES, LOSSES, resolve
from align.losses.spec import BoundLoss
from align.losses.sums import LossSum, bind_section, resolve_sum
from align.run.checks import check_train
from align.run.plan import measures_trust
from align.training.columns import require_margin
from align.training.loss_choice import bind
from tests.losses.inputs import evaluate, make

PAIRS = [(1.0, -1.0), (-2.0, 3.0), (4.0, 3.5)]
MARGIN = torch.tensor([1.5, -2.0, 0.1], dtype=torch.float64)


def bound(**fields: Any) -> BoundLoss:
    return bind_section(LossSection(**fields))


def test_a_sum_is_the_weighted_sum_with_its_gradient() -> None:
    """DPO and NLL at the golden pair: 0.598139 + 2.0."""
    loss, logps = resolve_sum({"madpo": 1.0, "nll": 0.1, "aot": 2.0}, {}), make(PAIRS)
    found = evaluate(loss, logps, MARGIN)
    parts = [(w, make(PAIRS)) for w in (1.0, 0.1, 2.0)]
    values = [evaluate(name, p, MARGIN) for name, (_, p) in zip(("madpo", "nll", "aot"), parts, strict=True)]
    assert torch.allclose(found, values[0] + 0.1 * values[1] + 2 * values[2])
    d_w, d_l = gradient_weights(found, logps)
    singles = [gradient_weights(value, p) for value, (_, p) in zip(values, parts, strict=True)]
    for side, total in enumerate((d_w, d_l)):
        assert torch.allclose(total, singles[0][side] + 0.1 * singles[1][side] + 2 * singles[2][side])
    one = make([(1.0, -1.0)])
    assert float(resolve_sum({"dpo": 1.0, "nll": 1.0}, {})(one)) == pytest.approx(0.598139 + 49 / 10, abs=1e-6)


def test_a_sum_needs_what_its_terms_need() -> None:
    loss = resolve_sum({"madpo": 1.0, "nll": 0.1, "bco": 1.0, "wpo": 0.5}, {})
    assert loss.spec.needs_margin and loss.spec.coupled and loss.spec.tokens == "policy" and not loss.spec.from_logps
    assert loss.spec.name == "madpo + 0.1 nll + bco + 0.5 wpo"
    plain = resolve_sum({"nll": 1.0, "simpo": 0.5}, {})
    assert plain.spec.from_logps and not plain.spec.reads_reference and plain.beta == 2.0
    assert resolve_sum({"nll": 1.0, "orpo": 1.0}, {}).beta == 1.0
    with pytest.raises(ConfigError, match="madpo needs a margin"):
        resolve_sum({"madpo": 1.0, "nll": 0.1}, {})(make(PAIRS))
    with pytest.raises(ConfigError, match=r"loss madpo \+ 0.1 nll needs a `margin` column"):
        require_margin(Dataset.from_dict({"id": ["a"]}), resolve_sum({"madpo": 1.0, "nll": 0.1}, {}))


def test_one_term_of_weight_1_is_the_loss_itself() -> None:
    assert not isinstance(resolve_sum({"madpo": 1.0}, {}), LossSum)
    assert isinstance(resolve_sum({"madpo": 2.0}, {}), LossSum)


def test_parameters_go_to_every_term_that_knows_them_unless_it_has_its_own() -> None:
    terms = {"dpo": 1.0, "ipo": {"weight": 0.5, "parameters": {"beta": 0.3}}, "nll": 0.1}
    found = bound(loss={"terms": terms}, parameters={"beta": 0.2})
    assert found.parameters == {"dpo.beta": 0.2, "ipo.beta": 0.3, "ipo.length_normalize": True}
    assert found.parameter("beta", 1.0) == 0.2 and found.parameter("tau", 7.0) == 7.0


def test_a_sum_travels_to_other_processes_and_has_a_gradient_for_remedies() -> None:
    loss = pickle.loads(pickle.dumps(resolve_sum({"dpo": 1.0, "nll": 0.1}, {})))
    d_w, d_l = loss_weights(loss, make([(0.0, 0.0)]))
    assert float(d_w) == pytest.approx(0.05 + 0.1 / 10) and float(d_l) == pytest.approx(0.05)
    d_w, d_l = loss_weights(resolve("nll", {}), make([(0.0, 0.0)]))
    assert float(d_w) == pytest.approx(0.1) and float(d_l) == 0.0


@pytest.mark.parametrize(("theirs", "name"), ALIASES.items())
def test_names_of_other_programs(theirs: str, name: str) -> None:
    assert resolve(theirs, {}).spec is LOSSES[name]


def test_loss_type_has_the_defaults_of_trl() -> None:
    """trl's beta is 0.1 for sigmoid_norm too, where ln_dpo has 5, and its labels are not smoothed."""
    found = bound(loss_type=["sigmoid_norm", "robust", "sft"], loss_weights=[1.0, 0.5, 0.2])
    assert found.spec.name == "ln_dpo + 0.5 robust + 0.2 nll"
    assert found.parameters == {"ln_dpo.beta": 0.1, "robust.beta": 0.1, "robust.label_smoothing": 0.0}
    other = bound(loss_type=["sigmoid_norm", "robust"], parameters={"beta": 0.4, "label_smoothing": 0.2})
    assert other.parameters == {"ln_dpo.beta": 0.4, "robust.beta": 0.4, "robust.label_smoothing": 0.2}
    assert bound(loss_type="ipo").spec.name == "ipo" and bound(loss="sigmoid_norm").parameters == {"beta": 5.0}
    assert bound(loss_type="exo_pair").parameters == {"beta": 0.1, "label_smoothing": 1e-3}


def test_everything_that_is_wrong_is_refused_at_once() -> None:
    terms = {
        "madpoo": 1.0, "nll": -0.1, "dpo": None, "sigmoid": {"weight": 1, "paramters": {}}, "hinge": True,
        "ipo": {"weight": 1.0, "parameters": {"beta": 0}}, "cdpo": {"weight": 1.0, "reference": "other"}, "repo": 0,
        "simpo": {"parameters": {}}, "aot": float("inf"), "bco": {"weight": 1.0, "parameters": 3},
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        resolve_sum(terms, {"bta": 0.2})
    message = str(caught.value)
    for problem in (
        "madpoo: not a loss (did you mean `madpo`?)",
        "nll: found the weight -0.1, expected a number above 0",
        "dpo: found no weight, expected a number above 0",
        "sigmoid.paramters: unknown key (did you mean `parameters`?)",
        "sigmoid: is the loss dpo, which is there already as dpo",
        "hinge: found the weight True",
        "ipo: parameters of ipo: beta: found 0, expected a number above 0",
        "cdpo.reference: all terms of a training share one reference",
        "repo: found the weight 0, expected a number above 0",
        "simpo: found no weight",
        "aot: found the weight inf",
        "bco.parameters: found 3, expected a mapping",
        "parameters.bta: not a parameter of",
    ):
        assert problem in message, problem
    assert caught.value.code == "loss-terms"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": None}, "expected `loss`, or trl's `loss_type`, found neither"),
        ({"loss": "dpo", "loss_type": "sigmoid"}, "found both"),
        ({"loss": {"terms": {}}}, "expected the name of a loss, or"),
        ({"loss": {"term": {"dpo": 1}}}, "expected the name of a loss, or"),
        ({"loss": 3}, "expected the name of a loss, or"),
        ({"loss_type": []}, "expected at least one name"),
        ({"loss": "dpo", "loss_weights": [1.0]}, "`loss_weights` belongs to a list in `loss_type`"),
    ],
)
def test_sections_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        LossSection(**fields)
    assert message in str(caught.value)


def test_a_loss_type_list_that_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"found 1 for 3 names in loss_type\n.*'sigmoid' stands there more than once"):
        bound(loss_type=["sigmoid", "sft", "sigmoid"], loss_weights=[1.0])
    with pytest.raises(ConfigError, match=r"sigmod: not a loss \(did you mean `sigmoid`\?\)"):
        bound(loss_type=["sigmod", "sft"])


def test_the_check_of_a_run_names_the_method(workspace: Path) -> None:
    """In the run file, before any model loads; a good sum passes, and its stage keys do not change other methods'."""
    sets = ["train.methods.mine.loss.terms.madpo=1.0", "train.methods.mine.loss.terms.nll="]
    config = load_config(workspace / "run.yaml", sets)
    assert config.train is not None
    with pytest.raises(AlignError, match=r"train.methods.mine: loss:\n.*nll: found no weight"):
        check_train(config.train, {"output_dir": str(workspace / "check")})
    config = load_config(workspace / "run.yaml", [sets[0], "train.methods.mine.loss.terms.nll=0.1"])
    assert config.train is not None
    check_train(config.train, {"output_dir": str(workspace / "check")})
    assert config.train.methods["mine"].names == ("madpo", "nll")
    assert set(LossSection(loss="dpo").made_from(without=set())) == {
        "loss", "parameters", "weights", "remedy", "token_mask",
    }  # fmt: skip


def test_trust_in_a_sum_is_measured(workspace: Path) -> None:
    sets = ["train.methods.mine.loss.terms={trust: 1.0, nll: 0.1}", "train.trust=auto"]
    assert measures_trust(load_config(workspace / "run.yaml", sets))
    found = bound(loss={"terms": {"trust": 1.0, "nll": 0.1}}, parameters={"slope": 2.0, "trust": 0.3, "strength": 0.0})
    assert found.parameter("trust", 0.0) == 0.3 and found.parameter("slope", 0.0) == 2.0


@pytest.mark.parametrize("loss", ["beta_dpo", "wpo", {"terms": {"dpo": 1.0, "aot": 1.0}}])
def test_a_remedy_needs_a_loss_of_the_log_probs_of_one_pair(loss: Any) -> None:
    section = LossSection(loss=loss, remedy={"kind": "normalise"})
    with pytest.raises(ConfigError, match="compares pairs or reads tokens, and a remedy or a mask needs"):
        bind("mine", section)


def test_tokens_of_the_reference_need_a_reference_in_memory(tmp_path: Path) -> None:
    trainer = {"precompute_ref_log_probs": True, "report_to": "none", "bf16": False, "use_cpu": True}
    section = LossSection(loss={"terms": {"sampo": 1.0, "nll": 0.1}})
    config = TrainSection(model=str(tmp_path), methods={"mine": section}, trainer=trainer)
    with pytest.raises(ConfigError, match=r"found true together with sampo \+ 0.1 nll, which runs the reference"):
        check_train(config, {"output_dir": str(tmp_path)})


def test_gaps_in_the_margins_are_refused_for_a_sum() -> None:
    table = Dataset.from_dict({"id": ["a", "b"], "margin": [1.0, None]})
    with pytest.raises(DataError, match="1 of 2 pairs have none"):
        require_margin(table, resolve_sum({"madpo": 1.0, "nll": 0.1}, {}))
