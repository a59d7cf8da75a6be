"""``dapt experiment``: grids of runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from dapt.cli.common import DeviceOption, RootOption, app, readable_errors, say, say_error
from dapt.errors import UserError
from dapt.progress import RichReporter, cell, console, errors

if TYPE_CHECKING:
    from dapt.grid import Plan, PlannedRun, Result, Suite


@app.command()
def experiment(
    suite: Annotated[
        str,
        typer.Argument(
            help="few-shot, domain-generalization, base-to-new, cross-dataset, ablation, or a "
            "YAML file of your own."
        ),
    ],
    root: RootOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where runs go.")] = Path(
        "results"
    ),
    datasets: Annotated[str | None, typer.Option(help="Instead of the suite's: a,b.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Methods, and variants of the suite: a,b.")
    ] = None,
    shots: Annotated[str | None, typer.Option(help="Instead of the suite's: 1,16.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the suite's: 1,2,3.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="As for 'dapt train'.")
    ] = None,
    pretrained: Annotated[str | None, typer.Option(help="As for 'dapt train'.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    device: DeviceOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A setting of all runs as name=value."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shots, seeds and epochs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and how long it takes.")
    ] = False,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print the suite's file, to copy.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed runs again.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that do runs at the same time.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each run; by default cores / workers.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster to run on, or 'local'.")
    ] = None,
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
    from dapt.run.train import Interrupted

    with readable_errors():
        from dapt.grid import make_plan, read_suite, suite_file
        from dapt.grid.plan import DONE

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "torchrun divides one run among processes, an experiment divides runs: start it "
                "by itself, with --workers or --ray"
            )
        file = suite_file(suite)
        if yaml:
            typer.echo(file.read_text(encoding="utf-8"), nl=False)
            return
        given = {
            "root": root and str(root),
            "backbone": backbone,
            "pretrained": pretrained,
            "precision": precision,
            "device": device,
        }
        lists = {"datasets": datasets, "methods": methods, "shots": shots, "seeds": seeds}
        chosen = _chosen(read_suite(file), given, lists, settings or [], quick=quick)
        plan = make_plan(chosen, output)
        try:
            _run(plan, workers, threads, ray, retry=retry, dry_run=dry_run)
        except (Interrupted, KeyboardInterrupt):
            done = list(plan.states().values()).count(DONE)
            say_error(
                f"stopped with {done} of {len(plan.runs)} runs done; the same command goes on"
            )
            raise typer.Exit(130) from None


def _chosen(
    suite: Suite,
    given: dict[str, Any],
    lists: dict[str, str | None],
    assignments: list[str],
    *,
    quick: bool,
) -> Suite:
    """The suite as the command line changes it."""
    from dapt.settings import parse_assignment

    axes: dict[str, Any] = {
        name: _list(f"--{name}", text, number=name in ("shots", "seeds"))
        for name, text in lists.items()
        if text is not None
    }
    columns = axes.pop("methods", None)
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= dict(parse_assignment(text) for text in assignments)
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


def _list(option: str, text: str, *, number: bool) -> list[Any]:
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise UserError(f"{option} is empty; list at least one")
    if not number:
        return values
    if not all(value.isascii() and value.isdigit() for value in values):
        raise UserError(f"{option} {text}: give numbers with commas between them, such as 1,2,4")
    return [int(value) for value in values]


def _run(
    plan: Plan,
    workers: int | None,
    threads: int | None,
    ray: str | None,
    *,
    retry: bool,
    dry_run: bool,
) -> None:
    """Print the plan and, unless told otherwise, do it and print what became of it."""
    from dapt.grid.estimate import Estimator
    from dapt.grid.grid import run_plan, threads_of
    from dapt.grid.plan import to_do
    from dapt.grid.work import Session
    from dapt.grid.work import threads as computing_with

    states = plan.states()
    pending = to_do(states, retry=retry)
    reporter = RichReporter()
    estimator = Estimator(Session(reporter if errors.is_terminal else None))
    if pending:
        estimator.session.open_tasks(pending, reporter)
        with computing_with(threads or threads_of(workers)):
            estimator.prepare(plan, pending)
    seconds = {run: estimator.seconds(run) for run in pending}
    _show_plan(plan, states, seconds, workers or (None if ray else 1), retry=retry)
    if not dry_run:
        result = run_plan(
            plan,
            workers=workers,
            threads_each=threads,
            ray=ray,
            retry=retry,
            estimator=estimator,
            reporter=reporter,
        )
        _show_result(plan, result)


def _show_plan(
    plan: Plan,
    states: dict[PlannedRun, str],
    seconds: dict[PlannedRun, float],
    workers: int | None,
    *,
    retry: bool,
) -> None:
    """A row a dataset, and how long all takes; the work in total where ``workers`` is unknown."""
    from dapt.grid.estimate import duration
    from dapt.grid.plan import BEGUN, DONE, FAILED, NEW

    shown = (DONE, BEGUN, FAILED, NEW)
    numbers = (Column(name, justify="right") for name in ("runs", *shown, "time"))
    title = cell(f"{plan.name}: {len(plan.runs)} runs in {plan.folder}")
    table = Table("dataset", *numbers, title=title, title_justify="left")
    for dataset in dict.fromkeys(run.settings.dataset for run in plan.runs):
        runs = [run for run in plan.runs if run.settings.dataset == dataset]
        found = [states[run] for run in runs]
        expected = sum(seconds.get(run, 0.0) for run in runs)
        time = duration(expected) if expected else ""
        counts = (str(found.count(state)) for state in shown)
        table.add_row(cell(Path(dataset).name), str(len(runs)), *counts, time)
    console.print(table)
    if plan.same:
        say(f"{plan.same} more have the same settings as one of these, and are not done twice")
    if known := list(states.values()).count(FAILED):
        say(f"{known} failed before; " + ("tried again" if retry else "--retry tries them again"))
    if seconds:
        total = sum(seconds.values())
        if workers is None:  # a cluster has what room it has
            time = f"{duration(total)} of work for a machine like this one"
        else:
            time = f"{duration(total / workers)} with {workers} worker(s)"
        say(f"{len(seconds)} runs to do, {time}")


def _show_result(plan: Plan, result: Result) -> None:
    """How many runs are done and, with exit code 1, why the others are not."""
    say(f"{result.done} of {len(plan.runs)} runs are done; all is in {plan.folder}")
    if not result.failed:
        return
    reasons: dict[str, list[str]] = {}
    for title, sentence in result.failed.items():
        # A run's own path in the sentence would make each one's reason another.
        reasons.setdefault(sentence, []).append(title)
    for sentence, titles in reasons.items():
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        say_error(f"failed: {titles[0]}{more}: {sentence}")
    say_error("details are in the failure.json of each; --retry tries them again")
    raise typer.Exit(1)
