"""Grids of runs: a suite says what, a plan lists the runs, workers do them.

    suite = read_suite(suite_file("few-shot"))
    plan = make_plan(suite, "results")
    result = run_plan(plan, workers=2)

Each run is an ordinary run directory; a grid keeps no state of its own, so it can be killed at
any moment and started again.
"""

from dapt.grid.grid import Result, run_plan
from dapt.grid.plan import Plan, PlannedRun, make_plan
from dapt.grid.suite import Suite, read_suite, suite_file, suite_names

__all__ = [
    "Plan",
    "PlannedRun",
    "Result",
    "Suite",
    "make_plan",
    "read_suite",
    "run_plan",
    "suite_file",
    "suite_names",
]
