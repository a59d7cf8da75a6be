"""Grids of runs: a suite says what, a plan lists the runs, workers do them.

    suite = read_suite(suite_file("few-shot"))
    plan = make_plan(suite, "results")
    grid = Grid(plan, workers=2).run()

Each run is an ordinary run directory; a grid keeps no state of its own, so it can be killed at
any moment and started again.
"""

from dapt.grid.grid import Grid
from dapt.grid.plan import Plan, PlannedRun, make_plan
from dapt.grid.suite import SUITES, Suite, read_suite, suite_file

__all__ = [
    "SUITES", "Grid", "Plan", "PlannedRun", "Suite", "make_plan", "read_suite", "suite_file",
]  # fmt: skip
