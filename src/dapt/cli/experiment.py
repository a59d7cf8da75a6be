"""Many runs: ``dapt experiment`` does them, ``dapt report`` shows them, ``dapt bench`` times."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option, echo

import dapt
from dapt.cli import common
from dapt.cli.common import command, say_error
from dapt.errors import UserError
from dapt.progress import Reporter, RichReporter, cell, console, errors, say, table

if TYPE_CHECKING:
    from dapt.grid import Grid, PlannedRun, Suite


@command("experiment")
def experiment(
    context: Context,
    suite: Annotated[str, Argument(help="A suite that ships with dapt, or a YAML file.")],
    root: common.RootOption = None,
    output: Annotated[Path, Option("--output", "-o", help="Where runs go.")] = Path("results"),
    datasets: Annotated[str | None, Option(help="Instead of the suite's: a,b.")] = None,
    methods: Annotated[str | None, Option(help="Methods, and variants of the suite: a,b.")] = None,
    shots: Annotated[str | None, Option(help="Instead of the suite's: 1,16.")] = None,
    seeds: Annotated[str | None, Option(help="Instead of the suite's: 1,2,3.")] = None,
    backbone: common.BackboneOption = None,
    pretrained: common.PretrainedOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    settings: common.SetOption = None,
    quick: Annotated[bool, Option("--quick", help="Fewer shots, seeds and epochs.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and its time.")] = False,
    yaml: Annotated[bool, Option("--yaml", help="Print the suite's file, to copy.")] = False,
    retry: Annotated[bool, Option("--retry", help="Try failed runs again.")] = False,
    workers: Annotated[int | None, Option(min=1, help="Processes that do runs at once.")] = None,
    threads: Annotated[int | None, Option(min=1, help="Of a run; else cores / workers.")] = None,
    ray: Annotated[str | None, Option(help="Address of a Ray cluster, or 'local'.")] = None,
) -> None:
    """Do a grid of runs: methods, shots and seeds on datasets, with evaluations elsewhere."""
    from dapt.engine.fit import Interrupted
    from dapt.grid import Grid, make_plan, read_suite, suite_file
    from dapt.grid.plan import DONE

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("torchrun divides one run; start an experiment with --workers or --ray")
    file, told = suite_file(suite), RichReporter()
    if yaml:
        echo(file.read_text(encoding="utf-8"), nl=False)
        return
    own = ("root", "backbone", "pretrained", "precision", "device")
    changes: dict[str, Any] = {"settings": common.given_settings(context, own, settings)}
    changes |= {name: _list(context, name) for name in ("datasets", "methods", "shots", "seeds")}
    plan = make_plan(_changed(read_suite(file), changes, quick), output)
    how: dict[str, Any] = {"workers": workers, "threads": threads, "ray": ray, "retry": retry}
    grid = Grid(plan, **how, reporter=told, progress=told if errors.is_terminal else Reporter())
    try:
        _show_plan(grid, grid.prepare())
        if not dry_run:
            _show_result(grid.run())
    except (Interrupted, KeyboardInterrupt):
        done = sum(run.state() == DONE for run in plan.runs)
        say_error(f"stopped with {done} of {len(plan.runs)} runs done; the same command goes on")
        raise Exit(130) from None


def _list(context: Context, name: str) -> list[Any] | None:
    """What stands between an option's commas; a suite refuses a list that is empty."""
    if (text := context.params[name]) is None:
        return None
    kind = int if name in ("shots", "seeds") else str
    try:
        return [kind(value.strip()) for value in text.split(",") if value.strip()]
    except ValueError as error:
        raise UserError(f"--{name} {text}: give numbers with commas between, as 1,2,4") from error


def _changed(suite: Suite, changes: dict[str, Any], quick: bool) -> Suite:
    """The suite as the command line changes it: its settings, and its lists."""
    columns, datasets = changes.pop("methods"), changes["datasets"]
    if "backbone" in changes["settings"]:  # its weights are not those of the suite's
        changes["settings"].setdefault("pretrained", None)
    part = {name: value for name, value in changes.items() if value is not None}
    asked = suite.changed(part, "command line")
    if asked.bundled and (asked.needs_root() if datasets is None else datasets == ["bundled"]):
        if datasets is None:
            say("no --root: on the bundled task in place of the benchmarks")
        suite = suite.changed(suite.bundled, "bundled")
    if quick:  # in a folder of its own, as its runs are others
        suite = suite.changed(suite.quick, "quick")
        suite = suite.model_copy(update={"name": f"{suite.name}-quick"})
    suite = suite.changed(part, "command line")
    return suite if columns is None else suite.select(columns, "--methods")


def _show_plan(grid: Grid, seconds: dict[PlannedRun, float]) -> None:
    """A row a dataset, and how long all takes: the work in total, for a cluster of any size."""
    from dapt.grid.grid import duration
    from dapt.grid.plan import FAILED, STATES

    plan = grid.plan
    title = f"{plan.folder.name}: {len(plan.runs)} runs in {plan.folder}"
    made = table("dataset", figures=("runs", *STATES, "time"), title=title)
    for dataset in dict.fromkeys(run.settings.dataset for run in plan.runs):
        runs = [run for run in plan.runs if run.settings.dataset == dataset]
        states = [grid.states[run] for run in runs]
        expected = sum(seconds.get(run, 0.0) for run in runs)
        counts = (str(states.count(state)) for state in STATES)
        time = duration(expected) if expected else ""
        made.add_row(cell(Path(dataset).name), str(len(runs)), *counts, time)
    console.print(made)
    if plan.same:
        say(f"{plan.same} more have the same settings as one of these, and are not done twice")
    if failed := list(grid.states.values()).count(FAILED):
        how = "tried again" if grid.retry else "--retry tries them again"
        say(f"{failed} failed before; {how}")
    if seconds:
        total, workers = sum(seconds.values()), grid.workers or 1
        time = f"{duration(total / workers)} with {workers} worker(s)"
        if grid.ray is not None and grid.workers is None:
            time = f"{duration(total)} of work for a machine like this one"
        say(f"{len(seconds)} runs to do, {time}")


def _show_result(grid: Grid) -> None:
    """How many runs are done and, with exit code 1, why the others are not."""
    say(f"{grid.done} of {len(grid.plan.runs)} runs are done; all is in {grid.plan.folder}")
    if not grid.failed:
        return
    for sentence in dict.fromkeys(grid.failed.values()):
        titles = [title for title, said in grid.failed.items() if said == sentence]
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        say_error(f"failed: {titles[0]}{more}: {sentence}")
    say_error("details are in the failure.json of each; --retry tries them again")
    raise Exit(1)


@command("report")
def report(
    runs: Annotated[list[Path], Argument(help="Run directories, or folders that hold some.")],
    out: Annotated[Path, Option("--out", "-o", help="HTML page.")] = Path("report.html"),
    baseline: Annotated[
        str | None, Option(help="Method to compare with; by default zero-shot, or the first.")
    ] = None,
    features: Annotated[
        bool, Option("--features", help="Feature maps, reliability, misnamed images, too.")
    ] = False,
) -> None:
    """Tables and figures of any set of runs, on one HTML page that needs nothing else."""
    from dapt.report import write_report

    told = RichReporter()
    written = write_report(runs, out, baseline=baseline, features=features, reporter=told)
    for warning in written.warnings:
        say_error(f"warning: {warning}")
    unfinished = f", {written.unfinished} of them unfinished" if written.unfinished else ""
    failed = f", {written.failed} failed" if written.failed else ""
    say(f"{written.runs} runs{unfinished}{failed}: {written.page}")
    say(f"tables and figures: {written.folder}")


# Whatever follows the command's name, --help too, is for the yardsticks to read.
_UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@command("bench", context_settings=_UNREAD)
def bench(context: Context) -> None:
    """Time a training step and an evaluation, the plain way and ours, in one run."""
    sources = Path(dapt.__file__).resolve().parents[1]
    if sources.name != "src" or not (sources.parent / "benchmarks").is_dir():
        raise UserError(
            "'dapt bench' is in the repository and not in the wheel: pip install -e . in a checkout"
        )
    sys.path.insert(0, str(sources.parent))
    from benchmarks.command import app as yardsticks

    yardsticks(context.args, prog_name="dapt bench")
