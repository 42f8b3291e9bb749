"""iterate.json -> one HTML file: reward of fresh samples and KL to the first policy, round by round."""

from pathlib import Path
from typing import Any

from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment
from align.stats import ends, interval


def write_rounds_page(target: Path, found: dict[str, Any]) -> None:
    """Render the page of ``found``, see ``render_rounds_page``, to ``target``."""
    write_text(target, render_rounds_page(found))


def render_rounds_page(found: dict[str, Any]) -> str:
    """The page as text.

    Args:
        found: ``name``, ``start``, ``scorer`` and ``rounds``, as iterate.json has them.
    """
    return (
        environment()
        .get_template("rounds.html.j2")
        .render(found=found, headline=headline(found), plots=_plots(found["rounds"]))
    )


def headline(found: dict[str, Any]) -> str:
    """Reward of the first and the last samples in a sentence. Rounds have other prompts, so there is no difference."""
    first, last = found["rounds"][0], found["rounds"][-1]
    reward = interval(first["pairs"]["mean_reward"])
    if first is last:
        return f"The samples of the start score {reward} by {found['scorer']}."
    kl = f", at a KL of {interval(last['kl_to_start'])} nats to the start" if last["kl_to_start"] else ""
    return (
        f"Samples of the start score {reward} by {found['scorer']}, those of the policy of round "
        f"{last['round'] - 1} {interval(last['pairs']['mean_reward'])}{kl}."
    )


def _plots(rounds: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Reward and KL of the policy that each round samples from; it has been trained in the rounds before."""
    made = []
    series = {
        "reward of its samples": [(row["round"] - 1.0, ends(row["pairs"]["mean_reward"])) for row in rounds],
        "KL to the start (nats)": [
            (row["round"] - 1.0, ends(row["kl_to_start"]) if row["kl_to_start"] else (0.0, 0.0, 0.0))
            for row in rounds
            if row["round"] == 1 or row["kl_to_start"]
        ],
    }
    for title, points in series.items():
        if len(points) > 1:
            made.append((title, plots.interval_lines({title: points}, x_title="rounds of training", y_title=title)))
    return made
