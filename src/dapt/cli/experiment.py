"""``dapt experiment``: grids of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from typer import Argument, Option

from dapt.cli.common import DeviceOption, RootOption, app, readable_errors, say, say_error
from dapt.errors import UserError
from dapt.progress import Reporter, RichReporter, cell, console, errors

if TYPE_CHECKING:
    from dapt.grid import Grid, PlannedRun, Suite


@app.command()
def experiment(
    suite: Annotated[
        str,
        Argument(
            help="few-shot, domain-generalization, base-to-new, cross-dataset, ablation, or a "
            "YAML file of your own."
        ),
    ],
    root: RootOption = None,
    output: Annotated[Path, Option("--output", "-o", help="Where runs go.")] = Path("results"),
    datasets: Annotated[str | None, Option(help="Instead of the suite's: a,b.")] = None,
    methods: Annotated[str | None, Option(help="Methods, and variants of the suite: a,b.")] = None,
    shots: Annotated[str | None, Option(help="Instead of the suite's: 1,16.")] = None,
    seeds: Annotated[str | None, Option(help="Instead of the suite's: 1,2,3.")] = None,
    backbone: Annotated[str | None, Option("--backbone", "-b", help="As for 'dapt train'.")] = None,
    pretrained: Annotated[str | None, Option(help="As for 'dapt train'.")] = None,
    precision: Annotated[str | None, Option(help="fp32, bf16 or fp16.")] = None,
    device: DeviceOption = None,
    settings: Annotated[
        list[str] | None, Option("--set", "-s", help="A setting of all runs as name=value.")
    ] = None,
    quick: Annotated[bool, Option("--quick", help="Fewer shots, seeds and epochs.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and its time.")] = False,
    yaml: Annotated[bool, Option("--yaml", help="Print the suite's file, to copy.")] = False,
    retry: Annotated[bool, Option("--retry", help="Try failed runs again.")] = False,
    workers: Annotated[int | None, Option(min=1, help="Processes that do runs at once.")] = None,
    threads: Annotated[int | None, Option(min=1, help="Of a run; else cores / workers.")] = None,
    ray: Annotated[str | None, Option(help="Address of a Ray cluster, or 'local'.")] = None,
) -> None:
    """Do a grid of runs: methods, shots and seeds on datasets, with evaluations elsewhere.

    What is done is skipped and what was stopped goes on, so the same command continues a grid,
    and several may share a folder. Without --root the suites run on the bundled task.

    **Examples**

        dapt experiment few-shot --quick

        dapt experiment few-shot --root /data --datasets dtd,eurosat --dry-run

        dapt experiment base-to-new --root /data --workers 4

        dapt experiment ablation --yaml > mine.yaml; dapt experiment mine.yaml
    """
    from dapt.engine.fit import Interrupted

    with readable_errors():
        from dapt.grid import Grid, make_plan, read_suite, suite_file
        from dapt.grid.plan import DONE
        from dapt.settings import parse_assignment

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "torchrun divides one run among processes, an experiment divides runs: start it "
                "by itself, with --workers or --ray"
            )
        file = suite_file(suite)
        if yaml:
            typer.echo(file.read_text(encoding="utf-8"), nl=False)
            return
        given = {"root": root and str(root), "backbone": backbone, "pretrained": pretrained}
        given |= {"precision": precision, "device": device}
        changes = {name: value for name, value in given.items() if value is not None}
        changes |= dict(parse_assignment(text) for text in settings or [])
        lists = {"datasets": datasets, "methods": methods, "shots": shots, "seeds": seeds}
        chosen, reporter = _chosen(read_suite(file), changes, lists, quick), RichReporter()
        grid = Grid(
            make_plan(chosen, output),
            workers=workers,
            threads=threads,
            ray=ray,
            retry=retry,
            reporter=reporter,
            progress=reporter if errors.is_terminal else Reporter(),
        )
        try:
            _show_plan(grid, grid.prepare())
            if not dry_run:
                _show_result(grid.run())
        except (Interrupted, KeyboardInterrupt):
            runs = grid.plan.runs
            done = sum(run.state() == DONE for run in runs)
            say_error(f"stopped with {done} of {len(runs)} runs done; the same command goes on")
            raise typer.Exit(130) from None


def _chosen(
    suite: Suite, changes: dict[str, Any], lists: dict[str, str | None], quick: bool
) -> Suite:
    """The suite as the command line changes it: its settings, and its lists."""
    axes: dict[str, Any] = {
        name: _list(f"--{name}", text, int if name in ("shots", "seeds") else str)
        for name, text in lists.items()
        if text is not None
    }
    columns = axes.pop("methods", None)
    if "backbone" in changes:  # its weights are not those of the suite's
        changes = {"pretrained": None, **changes}
    part = {**axes, "settings": changes}
    asked = suite.changed(part, "command line")
    if asked.bundled and (
        axes.get("datasets") == ["bundled"] or ("datasets" not in axes and asked.needs_root())
    ):
        if "datasets" not in axes:
            say("no --root: on the bundled task in place of the benchmarks")
        suite = suite.changed(suite.bundled, "bundled")
    if quick:
        suite = suite.changed(suite.quick, "quick")
        # In a folder of its own, as its runs are others.
        suite = suite.model_copy(update={"name": f"{suite.name}-quick"})
    suite = suite.changed(part, "command line")
    return suite if columns is None else suite.select(columns, "--methods")


def _list(option: str, text: str, kind: type[Any]) -> list[Any]:
    """What stands between commas."""
    try:
        values = [kind(value.strip()) for value in text.split(",") if value.strip()]
    except ValueError as error:
        raise UserError(
            f"{option} {text}: give numbers with commas between them, such as 1,2,4"
        ) from error
    if not values:
        raise UserError(f"{option} is empty; list at least one")
    return values


def _show_plan(grid: Grid, seconds: dict[PlannedRun, float]) -> None:
    """A row a dataset, and how long all takes: the work in total, for a cluster of any size."""
    from dapt.grid.estimate import duration
    from dapt.grid.plan import BEGUN, DONE, FAILED, NEW

    plan, shown = grid.plan, (DONE, BEGUN, FAILED, NEW)
    numbers = (Column(name, justify="right") for name in ("runs", *shown, "time"))
    title = cell(f"{plan.name}: {len(plan.runs)} runs in {plan.folder}")
    table = Table("dataset", *numbers, title=title, title_justify="left")
    for dataset in dict.fromkeys(run.settings.dataset for run in plan.runs):
        runs = [run for run in plan.runs if run.settings.dataset == dataset]
        states = [grid.states[run] for run in runs]
        expected = sum(seconds.get(run, 0.0) for run in runs)
        counts = (str(states.count(state)) for state in shown)
        time = duration(expected) if expected else ""
        table.add_row(cell(Path(dataset).name), str(len(runs)), *counts, time)
    console.print(table)
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
    reasons: dict[str, list[str]] = {}
    for title, sentence in grid.failed.items():
        reasons.setdefault(sentence, []).append(title)
    for sentence, titles in reasons.items():
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        say_error(f"failed: {titles[0]}{more}: {sentence}")
    say_error("details are in the failure.json of each; --retry tries them again")
    raise typer.Exit(1)
