"""Curves that readers tell apart: predicted against observed, shares from 0 to 1, few points as dots."""

import re

from align.reports import plots


def test_a_predicted_curve_is_dashed_and_an_observed_one_is_not() -> None:
    points = ([1, 2, 3], [0.1, 0.2, 0.1])
    page = str(plots.lines({"dpo predicted": points, "dpo observed": points}, x_title="step", y_title="nats"))
    dashed = re.findall(r'<(?:polyline|line) class="[^"]* line( dash)?"', page)
    assert dashed == [" dash", "", " dash", ""]  # curves, then the legend


def test_a_share_has_its_whole_axis_and_few_points_are_dots() -> None:
    constant = {"dpo": ([1, 2, 3], [0.0, 0.0, 0.0])}
    page = str(plots.lines(constant, x_title="step", y_title="share", share=True))
    assert "-1" not in re.findall(r">(-?[\d.]+)</text>", page) and page.count(" dot") == 3
    many = {"dpo": (list(range(40)), [0.5] * 40)}
    assert " dot" not in str(plots.lines(many, x_title="step", y_title="share", share=True))
