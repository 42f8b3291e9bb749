"""metrics.json of `align best-of-n` -> one HTML file: reward over n by the judge that chooses and by another one."""

from pathlib import Path
from typing import Any

from align.data.text import plain
from align.io.files import write_text
from align.reports import plots
from align.reports.html import environment
from align.stats import above, below, ends, excludes, interval


def write_best_of_n_page(target: Path, found: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Render the page of ``found``, the metrics, and ``samples``, see ``shown_samples``, to ``target``."""
    write_text(target, render_best_of_n_page(found, samples))


def render_best_of_n_page(found: dict[str, Any], samples: list[dict[str, Any]]) -> str:
    """The page as text."""
    sentence, details = verdict(found)
    return (
        environment()
        .get_template("best_of_n.html.j2")
        .render(found=found, headline=sentence, details=details, samples=samples, plots=_plots(found))
    )


def verdict(found: dict[str, Any]) -> tuple[str, list[str]]:
    """What choosing the best of N gains, and whether the second half of the samples still helps, in sentences."""
    last, half = found["curve"][-1], found["second_half"]
    scorer, gold, n = found["scorer"], found["gold"], found["n"]
    if gold is None:
        return (
            f"The best of {n} by {scorer} scores {interval(last['score'])}, one sample "
            f"{interval(found['curve'][0]['score'])}.",
            [f"{scorer} judges its own selection, so this rises with n by construction. --gold names another judge."],
        )
    gain = last["gold_gain"]
    if excludes(gain, 0.0):
        verb = "raises" if gain["value"] > 0 else "lowers"
        sentence = f"Choosing the best of {n} by {scorer} {verb} the reward by {gold} by {interval(gain)}."
    else:
        sentence = f"Choosing the best of {n} by {scorer} changes nothing that {gold} sees: {interval(gain)}."
    details = []
    if half is not None:
        step = f"From the best of {half['from']} to the best of {n}, {gold}"
        if below(half["gold"], 0.0):
            details.append(
                f"{step} falls by {interval(_negative(half['gold']))} while {scorer} rises: more samples exploit "
                f"{scorer}. Choose from fewer, and do not train on its pairs without a guard."
            )
        elif above(half["gold"], 0.0):
            details.append(f"{step} still rises, by {interval(half['gold'])}.")
        else:
            details.append(f"{step} is not seen to change, {interval(half['gold'])}.")
    return sentence, details


def _negative(estimate: dict[str, Any]) -> dict[str, Any]:
    low, high = (None if estimate[end] is None else -estimate[end] for end in ("high", "low"))
    return estimate | {"value": -estimate["value"], "low": low, "high": high}


def shown_samples(groups: list[Any], best: list[int], scores: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first ``count`` prompts, each with its best sample and its first one, and their scores.

    Args:
        groups: the prompts with their candidates.
        best: index of the best candidate of each prompt.
        scores: name -> scores [P, N].
        count: prompts, at most.
    """
    shown = []
    for k, group in enumerate(groups[:count]):
        chosen = {"best": best[k]} | ({"first": 0} if best[k] else {})
        shown.append(
            {
                "prompt": plain(group.prompt),
                "completions": {
                    name: {
                        "text": plain(group.candidates[place].completion),
                        "scores": {judge: float(values[k, place]) for judge, values in scores.items()},
                    }
                    for name, place in chosen.items()
                },
            }
        )
    return shown


def _plots(found: dict[str, Any]) -> dict[str, Any]:
    """Gains over n, one plot for each judge: their units differ."""
    curve = found["curve"]
    made = {}
    for key, judge in (("gain", found["scorer"]), ("gold_gain", found["gold"])):
        if judge is not None:
            points = [(float(row["n"]), ends(row[key])) for row in curve]
            made[judge] = plots.interval_lines({judge: points}, x_title="n", y_title=f"gain by {judge}")
    return made
