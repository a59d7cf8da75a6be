"""Grids of runs: a suite says what, a plan lists the runs, workers do them.

Each run is an ordinary run directory; a grid keeps no state of its own, so it can be killed at any
moment and started again: ``Grid(make_plan(read_suite(suite_file("few-shot")), "results")).run()``.
"""

from dapt.grid.grid import Grid
from dapt.grid.plan import SUITES, Plan, PlannedRun, Suite, make_plan, read_suite, suite_file

__all__ = ["SUITES", "Grid", "Plan", "PlannedRun", "Suite", "make_plan", "read_suite", "suite_file"]
