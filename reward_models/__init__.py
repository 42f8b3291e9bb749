"""Reward models: training, scoring, ensembles, calibration, and judges that give a completion a score or a preference.

Imports ``align.training`` and the packages below it; never ``align.filtering``, ``align.evaluation``,
``align.commands`` or ``align.run``.
"""
