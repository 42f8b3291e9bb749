"""The sentence and the numbers of a trace, from tables of four pairs at three steps."""

from typing import Any

import pytest
from datasets import Dataset

from align.entanglement.conditions import ENTANGLED
from align.entanglement.summary import SCREENS
from align.entanglement.trace import sentence, trajectory

SCORES = {name: [0.0, 1.0, 2.0, 3.0] for name in SCREENS}


def table(verdicts: list[str], change: list[float]) -> Dataset:
    columns: dict[str, Any] = {
        "verdict": verdicts, "entangled": [verdict in ENTANGLED for verdict in verdicts],
        "cosine": [0.1, 0.2, 0.3, 0.4], "norm_ratio": [1.0] * 4, "d_w": [0.1] * 4, "d_l": [0.1] * 4,
        "logp_chosen": [-9 + value for value in change], "logp_chosen_change": change,
        "logp_rejected_change": [0.0] * 4, "step_chosen": change,
    }  # fmt: skip
    return Dataset.from_dict(columns | SCORES)


def test_what_a_trace_says() -> None:
    """Rising rejected responses count as on the page of a run, and so does what happened since the start."""
    tables = [
        table(["separated"] * 4, [0.0] * 4),
        table(["both rise", "both rise", "both fall", "separated"], [-1.0, 1.0, 1.0, 1.0]),
        table(["both rise", "separated", "separated", "separated"], [-4.0, -3.0, -2.0, 1.0]),
    ]
    found = trajectory([0, 4, 8], tables)
    assert [point["entangled"] for point in found["points"]] == [0.0, 0.75, 0.25]
    assert [point["chosen_falls"] for point in found["points"]] == [0.0, 0.25, 0.0]
    assert (found["first_step_entangled"], found["first_step_chosen_falls"], found["chosen_fell"]) == (4, 4, 0.75)
    assert sentence(found, "dpo") == (
        "dpo: pairs are entangled from step 4 on, most of them at step 4 (75%; a step would lower the chosen response "
        "of 25%); the chosen responses are -2.0 nats from the reference after 8 steps, and 75% of them fell since "
        "step 0."
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_a_trace_without_entangled_pairs_says_what_fell(steps: int) -> None:
    tables = [table(["separated"] * 4, [0.0] * 4), table(["separated"] * 4, [-3.0, -1.0, -1.0, 1.0])][:steps]
    said = sentence(trajectory([0, 4][:steps], tables), "dpo")
    assert said.startswith(
        "dpo: at no measured step were more than 2% of the pairs entangled; the chosen responses are"
    )
    assert ("75% of them fell since step 0" in said) == (steps == 2)
