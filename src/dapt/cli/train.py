"""Runs, one or many: ``dapt train``, ``experiment``, and what is made of all of them."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Exit, Option, echo

import dapt
from dapt.cli import common
from dapt.cli.common import command, given_settings, listed, readable_errors, say_error, show_run
from dapt.cli.outline import outlines
from dapt.data.there import require_dataset
from dapt.errors import UserError
from dapt.progress import (
    Reporter,
    RichReporter,
    cell,
    console,
    counted,
    duration,
    errors,
    say,
    table,
)
from dapt.safe.files import read_json

if TYPE_CHECKING:  # what only some commands need, they import
    from dapt.engine.data import Data
    from dapt.engine.features import Shared
    from dapt.grid import Grid, PlannedRun, Suite
    from dapt.run.directory import RunDirectory
    from dapt.run.records import Test
    from dapt.settings import Settings

# Test images up to which a run is compared with zero-shot: beyond, it takes long to do unasked.
COMPARED_IMAGES = 2000
# Points below zero-shot from which tuned prompts are not worth another try.
FAR_BELOW = 3.0


@command("train")
def train(
    context: Context,
    dataset: Annotated[
        str | None, Argument(help="'bundled', benchmark, folder, .csv/.jsonl or packed images.")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Run directory to write.")] = None,
    method: Annotated[
        str | None,
        Option("--method", "-m", help="See 'dapt methods'.", show_default="auto; benchmarks: dapt"),
    ] = None,
    head: Annotated[
        str | None, Option(help="Head of another method, fitted on the tuned features.")
    ] = None,
    shots: common.ShotsOption = None,
    every: Annotated[bool, Option("--all", help="Train on every image, test on none.")] = False,
    seed: common.SeedOption = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    multi_label: Annotated[
        bool, Option("--multi-label", help="Several labels per image; most tables show this.")
    ] = False,
    support_set: Annotated[Path | None, Option(help="Saved support set to use.")] = None,
    backbone: Annotated[
        list[str] | None,
        Option("--backbone", "-b", help=common.BACKBONES, show_default="by dataset"),
    ] = None,
    pretrained: common.PretrainedOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    epochs: common.EpochsOption = None,
    lr: Annotated[float | None, Option(help="Learning rate.", show_default="the method's")] = None,
    loss: Annotated[
        list[str] | None, Option(help="Add a loss to a method that tunes: inter=0.1, intra=10.")
    ] = None,
    config: Annotated[Path | None, Option("--config", "-c", help="YAML file of settings.")] = None,
    settings: common.SetOption = None,
    plugin: common.PluginOption = None,
    tune_settings: Annotated[
        bool, Option("--tune-settings", help="Search lr and loss weights on held-out images.")
    ] = False,
    effort: Annotated[
        str | None,
        Option(
            help="Time to try slower methods: seconds, minutes, hours, 20m.", show_default="seconds"
        ),
    ] = None,
    strict: common.StrictOption = False,
    resume: Annotated[bool, Option("--resume", help="Continue a stopped run.")] = False,
    overwrite: common.OverwriteOption = False,
) -> None:
    """Train a classifier on a few labelled images, say what to expect from it, and evaluate it."""
    if dataset is not None:
        require_dataset(dataset)
    from dapt.engine.fit import Interrupted
    from dapt.run.directory import RunDirectory

    with readable_errors(output, _again(output), Interrupted):
        if output is None:
            raise UserError("no run directory; add --output, such as --output runs/first")
        run, how = RunDirectory(output), {"resume": resume, "overwrite": overwrite}
        said = given_settings(context, assignments=settings)
        final = _settings(said, config, head, loss or [], run, resume, every, effort)
        _train(final, run, how, effort, tune_settings)


def _again(output: Path | None) -> str:
    """The command that goes on with a run."""
    return f"dapt train --output {shlex.quote(str(output))} --resume"


def _train(
    final: Settings, run: RunDirectory, how: dict[str, Any], effort: str | None, tune: bool
) -> None:
    """Look for better settings or a method, if asked to; tune, and tell what came of it."""
    from dapt.clip.known import STAND_IN
    from dapt.engine import data, features, processes, search
    from dapt.engine.effort import time_of
    from dapt.methods import get_method
    from dapt.run import train as training
    from dapt.run.effort import choose_method

    group, reporter, resume = processes.join_processes(), RichReporter(), how["resume"]
    unfinished = resume and run.search_file.is_file() and not run.exists
    searches = unfinished or (effort is not None and time_of(effort) > 0)
    if searches and tune:
        raise UserError("--effort and --tune-settings are two searches; give one of them")
    if group.first:
        training.check_output(run, final, **how)
    if (searches or tune) and not group.alone:
        asked = "--effort" if searches else "--tune-settings"
        raise UserError(f"{asked} is done by one process; start it without torchrun")
    if tune and not (resume and run.exists):
        final = search.search_settings(final, reporter)
    images = shared = None
    if group.alone and not (resume and run.finished):
        images, at = data.open_data(final), training.pinned(run, resume)
        say(data.found_in(images, final))
        shared = features.Shared(features.backbone_of(final, revision=at))
    if searches and images and shared:
        more: dict[str, Any] = {"data": images, "shared": shared, "reporter": reporter}
        final = choose_method(final, effort, run.path, **more, **how)
        how = {"resume": True, "overwrite": False}
    if group.first and get_method(final.method).learns and not run.finished:
        say(f"should it be stopped, this goes on: {_again(run.path)}")
    training.train(final, run.path, data=images, shared=shared, reporter=reporter, **how)
    if group.first:
        final = run.read_settings()  # which may be others, on this backbone
        tuned = show_run(run).test
        if tuned and images and shared and len(images.task.test) <= COMPARED_IMAGES:
            _compare(final, tuned, images, shared, reporter, tune)
        if run.stands_in():
            say_error(f"dapt: warning: {STAND_IN}; see 'dapt backbones'")


def _compare(
    final: Settings, tuned: Test, images: Data, shared: Shared, reporter: Reporter, tune: bool
) -> None:
    """Say how the untouched model does on the same images, and what to do if it does better."""
    from dapt.engine.evaluate import evaluate_zero_shot
    from dapt.methods import get_method

    if get_method(final.method).still or not shared.backbone.reads_text:
        return
    found = evaluate_zero_shot(images.task, final, reporter, shared)
    figure, called = ("accuracy", "") if tuned.map is None else ("map", "mAP ")
    zero, own = found[figure], getattr(tuned, figure)
    say(f"zero-shot, which learns nothing: {called}{100 * zero:.1f} % on the same images")
    if own < zero:
        _say_what_else(final, 100 * (zero - own), images, tune)


def _say_what_else(settings: Settings, points: float, data: Data, tune: bool) -> None:
    """What to do about a run so many points worse than no tuning; not what was just done.

    That is to ``tune`` settings, to take the method, and to take all images there are.
    """
    from dapt.engine.data import images_a_class
    from dapt.methods import get_method

    images, there = images_a_class(data.support.train), images_a_class(data.task.train)
    had = " to ".join(f"{count:,}" for count in dict.fromkeys((min(images), max(images))))
    more = "take more images with --shots" if images != there else "give more images a class"
    if get_method(settings.method).learns and points > FAR_BELOW:
        say(
            f"{settings.method} is {points:.1f} points below zero-shot with {had} "
            f"images a class; use --method auto instead, or {more}"
        )
        return
    # A search holds images out: it needs two in a class.
    searches = get_method(settings.method).learns and max(images) > 1 and not tune
    ways = ["--tune-settings"] if searches else []
    ways += ["--method auto"] if settings.method != "auto" else []
    tried = f"try {' or '.join(ways)}, or " if ways else ""
    say(f"tuning made it worse; {more} (it had {had} a class), {tried}stay with --method zero-shot")


def _settings(
    said: dict[str, Any],
    config: Path | None,
    head: str | None,
    losses: list[str],
    run: RunDirectory,
    resume: bool,
    every: bool,
    effort: str | None,
) -> Settings:
    """Settings of a run: what its options say, else its file, else the run that is resumed."""
    from dapt.engine.data import by_images
    from dapt.settings import (
        absolute_paths,
        idle_settings,
        is_own,
        make_settings,
        parse_weight,
        read_settings_file,
    )

    given = (absolute_paths(read_settings_file(config)) if config else {}) | said
    if losses and isinstance(others := given.get("loss_weights", {}), dict):
        given["loss_weights"] = others | dict(map(parse_weight, losses))
    if head is not None:
        given["method"] = f"{given.get('method', 'dapt')}+{head}"
    kept = (run.kept_settings() if resume else None) or {}
    given = {**kept, **given}
    if "dataset" not in given:
        missing = f"{run.path} holds no run to resume, and no" if resume else "no"
        raise UserError(
            f"{missing} dataset is given; name one, such as: dapt train bundled -o {run.path}"
        )
    # Of one's own, the best, not the paper's.
    if effort or is_own(str(given["dataset"])):
        given.setdefault("method", "auto")
    if given.get("support_set"):
        drawn = read_json(Path(given["support_set"]), "support set file")
        if isinstance(drawn, dict):  # what else it holds is checked later
            given.setdefault("shots", drawn.get("shots"))
    if every:
        given |= _everything(said, given)
    final = make_settings(given)
    if final.shots != kept.get("shots"):
        final = by_images(final, given)
    idle = ", ".join(sorted(said.keys() & idle_settings(final.method, final.loss_weights)))
    if idle and not effort:  # what else is tried may use them
        say_error(
            f"dapt: warning: {final.method} does not use {idle}; 'dapt settings --method "
            f"{final.method}' lists what it uses"
        )
    return final


def _everything(said: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Settings by which every image is tuned on; none of those that were ``said`` may say less."""
    from dapt.engine.data import most_images
    from dapt.settings import make_settings

    if less := next((n for n in ("shots", "support_set", "test_fraction") if n in said), None):
        raise UserError(f"--all tunes on every image, and {less} asks for fewer; give one of them")
    whole = {"test_fraction": 0.0, "support_set": None}
    return {**whole, "shots": most_images(make_settings({**given, **whole}))}


@command("methods")
def methods(
    backbone: common.BackboneOption = None,
    pretrained: common.PretrainedOption = None,
    classes: Annotated[int, Option(min=1, help="Number of classes to count parameters for.")] = 100,
    plugin: common.PluginOption = None,
) -> None:
    """List the methods: what each learns, its loss terms and, with a backbone, how many parameters.

    The number counts what gradient descent learns; a head's size depends on the images.
    """
    counted = _counted(backbone, pretrained, classes) if backbone else {}
    figures = [f"numbers, {classes} classes"] if counted else []
    made = table("name", "method", "kind", "what is learned", "losses besides cross-entropy",
                 figures=figures)  # fmt: skip
    with outlines():
        from dapt.methods import METHODS
        from dapt.settings import make_settings

        for name, row in METHODS.items():
            settings = make_settings({"dataset": "bundled", "method": name})
            losses = ", ".join(term.name for term in row.losses)
            said = (name, row.title, row.kind, row.describe(settings) or "–", losses or "–")
            made.add_row(*said, *([counted[name]] if counted else []))
    console.print(made)


def _counted(backbone: list[str], pretrained: list[str] | None, classes: int) -> dict[str, str]:
    """How many numbers gradient descent learns of each method; "–" where a backbone takes none."""
    from dapt.clip.sources import load_backbone
    from dapt.engine.suited import usual_classifier
    from dapt.methods import METHODS

    loaded, found = load_backbone(backbone, pretrained, device="cpu"), dict[str, str]()
    names = [f"class {number}" for number in range(classes)]
    for name in METHODS:
        try:
            made = usual_classifier(name, loaded, names)
            found[name] = f"{sum(p.numel() for p in made.parts.parameters()):,}"
        except UserError:
            found[name] = "–"
    return found


@command("settings")
def list_settings(
    dataset: Annotated[str, Argument(help="Dataset whose published settings to show.")] = "bundled",
    shots: Annotated[int, Option(min=1, help="Support images per class.")] = 16,
    method: common.MethodOption = None,
    plugin: common.PluginOption = None,
) -> None:
    """List all settings, or those of one method: default for a dataset, and meaning."""
    require_dataset(dataset)
    made = table("setting", "default", "meaning")
    with outlines():
        from dapt.methods import get_method
        from dapt.settings import all_fields, default_settings, idle_settings

        given: dict[str, Any] = {"dataset": dataset, "shots": shots}
        if method is not None:
            get_method(method)
            given["method"] = method
        values, idle = default_settings(given) | given, idle_settings(method or "")
        for name, field in all_fields().items():
            if name not in idle:
                value = values.get(name, field.default)
                shown = "" if value is None else cell(str(value))
                made.add_row(name, shown, field.description or "")
    console.print(made)


@command("experiment")
def experiment(
    context: Context,
    suite: Annotated[str, Argument(help="Suite that comes with dapt, or a YAML file.")],
    root: common.RootOption = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder for runs.")] = Path("results"),
    datasets: Annotated[str | None, Option(help="Datasets instead of the suite's: a,b.")] = None,
    methods: Annotated[
        str | None, Option(help="Methods or variants of the suite: a,b; or field, or all.")
    ] = None,
    shots: Annotated[str | None, Option(help="Shots instead of the suite's: 1,16.")] = None,
    seeds: Annotated[str | None, Option(help="Seeds instead of the suite's: 1,2,3.")] = None,
    backbone: common.BackboneOption = None,
    pretrained: common.PretrainedOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    settings: common.SetOption = None,
    plugin: common.PluginOption = None,
    quick: Annotated[bool, Option("--quick", help="Run fewer shots, seeds and epochs.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and its time.")] = False,
    yaml: Annotated[bool, Option("--yaml", help="Print the suite's file, to copy.")] = False,
    retry: Annotated[bool, Option("--retry", help="Try failed runs again.")] = False,
    workers: Annotated[int | None, Option(min=1, help="Runs at the same time.")] = None,
    threads: Annotated[int | None, Option(min=1, help="Per run; else cores / workers.")] = None,
    ray: Annotated[str | None, Option(help="Address of a Ray cluster, or 'local'.")] = None,
) -> None:
    """Run a grid of methods, shots and seeds on datasets, with further evaluations."""
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
    changes: dict[str, Any] = {"settings": given_settings(context, own, settings)}
    changes |= {name: listed(context, name) for name in ("datasets", "methods", "shots", "seeds")}
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
    from dapt.grid.plan import FAILED, STATES

    plan = grid.plan
    title = f"{plan.folder.name}: {counted(len(plan.runs), 'run')} in {plan.folder}"
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
        time = f"{duration(total / workers)} with {counted(workers, 'worker')}"
        if grid.ray is not None and grid.workers is None:
            time = f"{duration(total)} of work for a machine like this one"
        say(f"{counted(len(seconds), 'run')} to do, {time}")


def _show_result(grid: Grid) -> None:
    """How many runs are done and, with exit code 1, why the others are not."""
    say(f"{grid.done} of {len(grid.plan.runs)} runs are done; all is in {grid.plan.folder}")
    if grid.done:
        say(f"tables and figures of them: dapt report {shlex.quote(str(grid.plan.folder))}")
    for sentence in dict.fromkeys(grid.failed.values()):
        titles = [title for title, said in grid.failed.items() if said == sentence]
        more = f" and {len(titles) - 1} more" if len(titles) > 1 else ""
        say_error(f"failed: {titles[0]}{more}: {sentence}")
    if grid.failed:
        say_error("details are in the failure.json of each; --retry tries them again")
        raise Exit(1)


@command("report")
def report(
    runs: Annotated[list[Path], Argument(help="Run directories, or folders that contain some.")],
    out: Annotated[Path, Option("--out", "-o", help="HTML page to write.")] = Path("report.html"),
    baseline: Annotated[
        str | None, Option(help="Method to compare with; default: zero-shot, or the first.")
    ] = None,
    features: Annotated[
        bool, Option("--features", help="Add feature maps, reliability and misnamed images.")
    ] = False,
    plugin: common.PluginOption = None,
) -> None:
    """Make one self-contained HTML page with tables and figures of any set of runs."""
    from dapt.report import write_report

    told = RichReporter()
    written = write_report(runs, out, baseline=baseline, features=features, reporter=told)
    for warning in written.warnings:
        say_error(f"warning: {warning}")
    unfinished = f", {written.unfinished} of them unfinished" if written.unfinished else ""
    failed = f", {written.failed} failed" if written.failed else ""
    say(f"{counted(written.runs, 'run')}{unfinished}{failed}: {written.page}")
    say(f"tables and figures: {written.folder}")


# Whatever follows the command's name, --help too, is for the yardsticks to read.
_UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@command("bench", context_settings=_UNREAD)
def bench(context: Context) -> None:
    """Time a training step and an evaluation, with a plain implementation and with dapt's."""
    sources = Path(dapt.__file__).resolve().parents[1]
    if sources.name != "src" or not (sources.parent / "benchmarks").is_dir():
        raise UserError(
            "'dapt bench' is in the repository and not in the wheel: pip install -e . in a checkout"
        )
    sys.path.insert(0, str(sources.parent))
    from benchmarks.command import app as yardsticks

    yardsticks(context.args, prog_name="dapt bench")
