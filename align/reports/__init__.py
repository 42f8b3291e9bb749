"""Plots, verdicts and self-contained HTML pages, each rendered from the numbers of one JSON report."""
