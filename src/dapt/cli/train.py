"""``dapt train``, what it can be told, and the bundled comparison, ``dapt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from dapt.cli import common
from dapt.cli.common import command, given_settings, readable_errors, say_error, show_run
from dapt.errors import UserError
from dapt.progress import RichReporter, cell, console, say, table

if TYPE_CHECKING:  # what only some commands need, they import
    from dapt.run.directory import RunDirectory
    from dapt.settings import Settings

# Test images up to which a run is compared with zero-shot: beyond, it takes long to do unasked.
COMPARED_IMAGES = 2000


@command("train")
def train(
    context: Context,
    dataset: Annotated[
        str | None, Argument(help="'bundled', a benchmark, a folder, .csv/.jsonl, packed images.")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Run directory to write.")] = None,
    method: common.MethodOption = None,
    shots: common.ShotsOption = None,
    seed: common.SeedOption = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    support_set: Annotated[Path | None, Option(help="Saved support set, not a draw.")] = None,
    backbone: common.BackboneOption = None,
    pretrained: common.PretrainedOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    epochs: common.EpochsOption = None,
    lr: Annotated[float | None, Option(help="Learning rate.")] = None,
    config: Annotated[Path | None, Option("--config", "-c", help="YAML file of settings.")] = None,
    settings: common.SetOption = None,
    tune_settings: Annotated[
        bool, Option("--tune-settings", help="Search lr and betas on held-out support images.")
    ] = False,
    strict: common.StrictOption = False,
    resume: Annotated[bool, Option("--resume", help="Continue a stopped run.")] = False,
    overwrite: common.OverwriteOption = False,
) -> None:
    """Tune prompts on a few labelled images, and evaluate them."""
    from dapt.engine import data, evaluate, features, processes, search
    from dapt.engine.fit import Interrupted
    from dapt.methods import get_method
    from dapt.run import train as training
    from dapt.run.directory import RunDirectory

    with readable_errors(output, f"dapt train --output {output} --resume", Interrupted):
        if output is None:
            raise UserError("no run directory; add --output, such as --output runs/first")
        run, reporter = RunDirectory(output), RichReporter()
        how: dict[str, Any] = {"resume": resume, "overwrite": overwrite}
        final = _settings(given_settings(context, assignments=settings), config, run, resume)
        group = processes.join_processes()
        if group.first:
            training.check_output(run, final, **how)
        if tune_settings and not group.alone:
            raise UserError("--tune-settings is done by one process; start it without torchrun")
        if tune_settings and not (resume and run.exists):
            final = search.search_settings(final, reporter)
        images = shared = None
        if group.alone and not (resume and run.finished):
            images, shared = data.open_data(final), features.Shared(features.backbone_of(final))
        training.train(final, output, data=images, shared=shared, reporter=reporter, **how)
        if not group.first:
            return
        tuned = show_run(run).test.accuracy
        learns = not get_method(final.method).still
        if images and shared and learns and len(images.task.test) <= COMPARED_IMAGES:
            zero = evaluate.evaluate_zero_shot(images.task, final, reporter, shared)["accuracy"]
            say(f"zero-shot, which learns nothing: {100 * zero:.1f} % on the same images")
            if tuned < zero:
                search_too = "--tune-settings or " if final.shots > 1 else ""  # it holds images out
                say(
                    f"tuning made it worse; give more images a class (it had {final.shots}), try "
                    f"{search_too}--method linear-probe, or stay with --method zero-shot"
                )


def _settings(
    said: dict[str, Any], config: Path | None, run: RunDirectory, resume: bool
) -> Settings:
    """Settings of a run: what its options say, else its file, else the run that is resumed."""
    from dapt.safe.files import read_json
    from dapt.settings import absolute_paths, idle_settings, make_settings, read_settings_file

    given = (absolute_paths(read_settings_file(config)) if config else {}) | said
    if resume and run.exists:
        given = {**run.read_settings().model_dump(), **given}
    if "dataset" not in given:
        missing = f"{run.path} holds no run to resume, and no" if resume else "no"
        raise UserError(
            f"{missing} dataset is given; name one, such as: dapt train bundled -o {run.path}"
        )
    if given.get("support_set"):
        drawn = read_json(Path(given["support_set"]), "support set file")
        if isinstance(drawn, dict):  # what else it holds is checked later
            given.setdefault("shots", drawn.get("shots"))
    final = make_settings(given)
    if idle := ", ".join(sorted(said.keys() & idle_settings(final.method))):
        say_error(
            f"dapt: warning: {final.method} does not use {idle}; 'dapt settings --method "
            f"{final.method}' lists what it uses"
        )
    return final


@command("methods")
def methods() -> None:
    """List the methods: what each learns, and by which loss terms."""
    from dapt.methods import METHODS
    from dapt.settings import make_settings

    made = table("name", "method", "what is learned", "losses besides cross-entropy")
    for name, row in METHODS.items():
        settings = make_settings({"dataset": "bundled", "method": name})
        losses = ", ".join(term.name for term in row.losses)
        made.add_row(name, row.title, row.describe(settings) or "–", losses or "–")
    console.print(made)


@command("settings")
def list_settings(
    dataset: Annotated[str, Argument(help="Show the settings published for it.")] = "bundled",
    shots: Annotated[int, Option(min=1, help="Support images a class.")] = 16,
    method: common.MethodOption = None,
) -> None:
    """List every setting with its default for a dataset, and what it means; or one method's."""
    from dapt.methods import get_method
    from dapt.settings import all_fields, default_settings, idle_settings

    given: dict[str, Any] = {"dataset": dataset, "shots": shots}
    idle = frozenset[str]()
    if method is not None:
        get_method(method)
        given, idle = {**given, "method": method}, idle_settings(method)
    values = default_settings(given) | given
    made = table("setting", "default", "meaning")
    for name, field in all_fields().items():
        if name in idle:
            continue
        value = values.get(name, field.default)
        made.add_row(name, "" if value is None else cell(str(value)), field.description or "")
    console.print(made)


@command("demo")
def demo(
    output: Annotated[Path, Option("--output", "-o", help="Where all of it goes.")] = Path("demo"),
    epochs: Annotated[int | None, Option(min=1, help="Passes over the support set.")] = None,
    seed: Annotated[int, Option(min=0, help="Of support set, prompts and order.")] = 1,
) -> None:
    """Compare zero-shot, a linear probe, CoOp, VPT, VLPT and DAPT on the bundled task."""
    from dapt.demo import run_demo
    from dapt.engine.fit import Interrupted

    with readable_errors(output, f"dapt demo --output {output}", Interrupted):
        run_demo(output, epochs=epochs, seed=seed, reporter=RichReporter())
