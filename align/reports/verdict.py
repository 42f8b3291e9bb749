"""The verdict on a run in words, from the numbers of its report and their intervals."""

from dataclasses import dataclass
from typing import Any

from align.stats import above, below, excludes, interval, number

CHANCE = 0.5
SAME_KL = 0.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """The head of the page."""

    headline: str
    details: list[str]
    next_step: str


def name(method: str) -> str:
    """Display name of a method."""
    return {"dpo": "DPO", "madpo": "MADPO", "soft_madpo": "soft MADPO", "ipo": "IPO"}.get(method, method)


def verdict(report: dict[str, Any]) -> Verdict:
    """The verdict on a run; it says when no difference is seen, and stops at a reward model at chance."""
    model = report.get("reward_model")
    if model and not above(model["heldout"]["accuracy"], CHANCE):
        return Verdict(
            f"Stop: the reward model is at chance on held-out pairs: {interval(model['heldout']['accuracy'])}.",
            ["Its margins carry no information about these pairs, so no method that weights by them can be judged."],
            "Give the reward model more or cleaner pairs, or another backbone.",
        )
    details = _about_margins(report)
    evaluation = report.get("evaluation")
    if not evaluation:
        headline = (
            f"The reward model agrees with {interval(model['heldout']['accuracy'])} of the held-out labels."
            if model
            else "Nothing has been evaluated yet."
        )
        return Verdict(headline, details, "Add an `evaluate` section to measure what the policies gained.")
    policies = evaluation["policies"]
    trained = [method for method in policies if method != "reference"]
    best = "madpo" if "madpo" in trained else trained[0]
    headline = _gain(best, policies)
    for other in trained:
        if other != best:
            headline += f" {name(other)} with the same budget ended at {interval(policies[other]['reward'])}."
    details = [_compared(item, policies) for item in evaluation["comparisons"]] + details
    details = [line for method in trained if (line := _proxy_only(method, policies))] + details
    gained = above(policies[best]["gain"], 0.0)
    next_step = (
        "Read the samples, then compare reward against KL before calling one method better."
        if gained
        else "Look at the training curves: if the reward margin grew, the labels disagree with the judge."
    )
    return Verdict(headline, details, next_step)


def _gain(method: str, policies: dict[str, Any]) -> str:
    before, policy = policies["reference"]["reward"], policies[method]
    gain = policy["gain"]
    change = f"from {interval(before)} to {interval(policy['reward'])}; gain {interval(gain)}"
    change += f", KL {interval(policy['kl'])} nats." if policy["kl"] else "."
    if above(gain, 0.0):
        return f"{name(method)} raised the judge's reward {change}"
    if below(gain, 0.0):
        return f"{name(method)} lowered the judge's reward {change}"
    return f"No difference in the judge's reward seen after {name(method)}: {change}"


def _proxy_only(method: str, policies: dict[str, Any]) -> str:
    """A sentence if the reward model sees a gain and the judge does not, else an empty string."""
    gain, followed = policies[method]["gain"], policies[method].get("reward_model_gain")
    if followed is None or not above(followed, 0.0) or above(gain, 0.0):
        return ""
    return (
        f"{name(method)} learned what its labels say: the run's own reward model sees a gain of {interval(followed)}."
        " The judge rewards only part of what the reward model does."
    )


def _compared(item: dict[str, Any], policies: dict[str, Any]) -> str:
    a, b, difference = item["a"], item["b"], item["difference"]
    pair = f"{name(a)} against {name(b)}"
    if not excludes(difference, 0.0):
        return f"{pair}: no difference seen, {interval(difference)}."
    ahead = a if difference["value"] > 0 else b
    lead = f"{pair}: {name(ahead)} is ahead by {interval(difference)}"
    if policies[a]["kl"] is None:
        return f"{lead}, at a KL that was not measured."
    kls = {method: policies[method]["kl"]["value"] for method in (a, b)}
    if abs(kls[a] - kls[b]) > SAME_KL * max(kls.values()):
        ratios = {method: policies[method]["gain_per_root_kl"] for method in (a, b)}
        per = ", ".join(f"{name(method)} {interval(ratio)}" for method, ratio in ratios.items() if ratio)
        further = (
            f"{lead}, at another KL ({number(kls[a])} and {number(kls[b])} nats), so it may only have moved further"
        )
        return f"{further}; reward gained per sqrt(2 KL): {per}." if per else f"{further}."
    return f"{lead}, at about the same KL."


def _about_margins(report: dict[str, Any]) -> list[str]:
    lines = []
    out_of_fold = report.get("reward_model", {}).get("out_of_fold")
    if out_of_fold:
        inside = report["reward_model"]["in_sample"]["accuracy"]["value"]
        lines.append(
            f"Margins on the reward model's own pairs agree with {inside:.0%} of the labels in-sample and with "
            f"{out_of_fold['accuracy']['value']:.0%} out-of-fold: trust the second."
        )
    margins = report.get("margins", {})
    lines += [margins["note"]] if margins.get("note") else []
    return lines + list(margins.get("warnings", []))
