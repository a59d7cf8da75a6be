"""``dapt train``, and the bundled comparison, ``dapt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dapt.cli.common import (
    DeviceOption,
    DomainOption,
    NamesOption,
    RootOption,
    StrictOption,
    app,
    metrics_table,
    readable_errors,
    say,
)
from dapt.errors import UserError
from dapt.progress import RichReporter, console

if TYPE_CHECKING:
    from dapt.run.directory import RunDirectory

DEMO_FOLDER = Path("demo")

# Test images up to which a run is compared with zero-shot: beyond, it takes long to do unasked.
COMPARED_IMAGES = 2000


@app.command()
def train(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="'bundled', a benchmark's name, a folder, a .csv/.jsonl file, or packed images."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory to write.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="See 'dapt methods'.")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Support images a class.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of support set, prompts and order.")] = None,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    support_set: Annotated[
        Path | None, typer.Option(help="Saved support set, in place of a draw.")
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", "-b", help="'bundled', open_clip name, hub id, or file."),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Tag of the open_clip model, a file, or 'random'.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    device: DeviceOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the support set.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of settings.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Any setting as name=value; see 'dapt settings'."),
    ] = None,
    tune_settings: Annotated[
        bool,
        typer.Option("--tune-settings", help="Search lr and betas on held-out support images."),
    ] = False,
    strict: StrictOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the run there.")] = False,
) -> None:
    """Tune prompts on a few labelled images, and evaluate them.

    **Examples**

        dapt train bundled -o runs/first

        dapt train photos/ -o runs/photos --shots 8 --tune-settings

        dapt train caltech101 --root /data -o runs/caltech -b ViT-B-16 --pretrained openai

        dapt train -o runs/photos --resume

        torchrun --nproc-per-node 2 -m dapt.cli train photos/ -o runs/photos
    """
    with readable_errors(output):
        from dapt.engine.data import task_of
        from dapt.engine.features import Shared, backbone_of
        from dapt.engine.measure import evaluate_zero_shot
        from dapt.engine.processes import join_processes
        from dapt.methods import get_method
        from dapt.run.directory import RunDirectory
        from dapt.run.train import check_output
        from dapt.run.train import train as run_training
        from dapt.settings import (
            absolute_paths,
            make_settings,
            parse_assignment,
            read_settings_file,
        )

        options: dict[str, Any] = {
            "dataset": dataset,
            "method": method,
            "shots": shots,
            "seed": seed,
            "root": root and str(root),
            "domain": domain,
            "class_names": class_names and str(class_names),
            "support_set": support_set and str(support_set),
            "backbone": backbone,
            "pretrained": pretrained,
            "precision": precision,
            "device": device,
            "epochs": epochs,
            "lr": lr,
            "strict": strict or None,
        }
        given = read_settings_file(config) if config else {}
        given |= {name: value for name, value in options.items() if value is not None}
        given |= dict(parse_assignment(text) for text in settings or [])
        if output is None:
            raise UserError("no run directory; add --output, such as --output runs/first")
        run = RunDirectory(output)
        if resume and run.exists:
            # What is not said again is as it was.
            given = {**run.read_settings().model_dump(), **given}
        if "dataset" not in given:
            missing = f"{output} holds no run to resume, and no" if resume else "no"
            raise UserError(
                f"{missing} dataset is given; name one, such as: dapt train bundled -o {output}"
            )
        reporter = RichReporter()
        given = absolute_paths(given)
        if given.get("support_set"):
            given.setdefault("shots", _shots_of(Path(given["support_set"])))
        final = make_settings(given)
        ranks = join_processes()
        if ranks.first:
            check_output(run, final, resume=resume, overwrite=overwrite)
        if tune_settings and not ranks.alone:
            raise UserError("--tune-settings is done by one process; start it without torchrun")
        if tune_settings and not (resume and run.exists):
            from dapt.engine.search import search_settings

            final = search_settings(final, reporter)
        shared = task = None
        if ranks.alone and not (resume and run.finished):
            task = task_of(final)
            shared = Shared(backbone_of(final))
        run_training(
            final,
            output,
            resume=resume,
            overwrite=overwrite,
            reporter=reporter,
            shared=shared,
            task=task,
        )
        if ranks.first:
            # Read at once: another process, told to overwrite, may replace the run meanwhile.
            result = _result(run)
            _show_run(run, result)
        if (
            task
            and shared
            and get_method(final.method).learns_prompts
            and len(task.test) <= COMPARED_IMAGES
        ):
            before = evaluate_zero_shot(task, final, reporter, shared)["accuracy"]
            _compare(result["test"]["accuracy"], before, final.shots)


def _result(run: RunDirectory) -> dict[str, Any]:
    """Metrics of the run that was just finished, and under ``seconds`` how long tuning took."""
    try:
        seconds = run.read_environment().get("tuning_seconds")
        if not isinstance(seconds, float):
            raise UserError(f"{run.environment_file} is damaged; run 'dapt train' again")
        return {**run.read_metrics(), "seconds": seconds}
    except UserError as error:
        if run.finished:
            raise
        raise UserError(
            f"{run.path} is in use by another process, which has replaced the run that was made "
            "here; give each its own --output"
        ) from error


def _compare(tuned: float, before: float, shots: int) -> None:
    """Say whether tuning was worth it: with few images it may not be."""
    say(f"zero-shot, which learns nothing: {100 * before:.1f} % on the same images")
    if tuned < before:
        search = "--tune-settings or " if shots > 1 else ""  # a search holds images out
        say(
            f"tuning made it worse; give more images a class (it had {shots}), try "
            f"{search}--method linear-probe, or stay with --method zero-shot"
        )


def _shots_of(support_set: Path) -> Any:
    """Shots that a saved support set was drawn with; what else it holds is checked later."""
    from dapt.safe.files import read_json

    value = read_json(support_set, "support set file")
    return value.get("shots") if isinstance(value, dict) else None


def _show_run(run: RunDirectory, result: dict[str, Any]) -> None:
    console.print(metrics_table(f"{result['dataset']}, {result['method']}", result["test"]))
    for name, values in result["dispersion"].items():
        say(f"{name}-dispersion {values['before']:.3f} before, {values['after']:.3f} after")
    say(
        f"{result['learned_parameters']:,} learned parameters, tuned in "
        f"{result['seconds']:g} s; everything is in {run.path}"
    )


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where runs and picture go.")
    ] = DEMO_FOLDER,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the support set.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of support set, prompts and order.")] = 1,
) -> None:
    """Compare zero-shot, a linear probe, CoOp, VPT, VLPT and DAPT on the bundled task."""
    with readable_errors(output, "demo"):
        from dapt.demo import run_demo

        run_demo(output, epochs=epochs, seed=seed, reporter=RichReporter())
