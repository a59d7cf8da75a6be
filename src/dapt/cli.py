"""The ``dapt`` command: reads arguments, calls the package, prints what came of it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dapt.errors import UserError
from dapt.progress import RichReporter, console, errors

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Distribution-aware prompt tuning: a good classifier from CLIP and a few photos.",
)
data = typer.Typer(no_args_is_help=True, help="Look at datasets and their support sets.")
app.add_typer(data, name="data")

RunArgument = Annotated[Path, typer.Argument(help="Run directory that 'dapt train' wrote.")]
RootOption = Annotated[
    Path | None, typer.Option("--root", help="Folder that holds the benchmarks.")
]
DomainOption = Annotated[str | None, typer.Option(help="Style of the bundled task.")]
NamesOption = Annotated[
    Path | None, typer.Option("--class-names", help="JSON file: folder name -> class name.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]

DEMO_FOLDER = Path("demo")

# What the operating system says when there is no room or no right to write.
_STORAGE = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file size limit is reached; raise it",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission is denied; change it, or use another path",
    errno.EPERM: "permission is denied; change it, or use another path",
}


@contextmanager
def _readable_errors(run: Path | None = None, command: str = "train") -> Iterator[None]:
    """Turn what a user can mend into one sentence and exit code 2.

    Args:
        run: directory that ``command`` writes to; a hint says how to go on with what is there.
        command: "train" or "demo".
    """
    from dapt.train import Interrupted

    def again(start: str) -> str:
        if run is None or not run.exists():
            return ""
        return f"{start}dapt {command} --output {run}{' --resume' if command == 'train' else ''}"

    try:
        yield
    except UserError as error:
        _stop(str(error))
    except (Interrupted, KeyboardInterrupt):
        _say_error(f"stopped{again('; go on with: ')}")
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        _stop(f"{error.filename or run}: {_STORAGE[error.errno]}{again(', then: ')}")


def _stop(sentence: str) -> None:
    _say_error(f"dapt: {sentence}")
    raise typer.Exit(2)


def _say_error(line: str) -> None:
    errors.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _say(line: str) -> None:
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


@app.command()
def train(
    dataset: Annotated[
        str | None,
        typer.Argument(help="'bundled', a benchmark's name, a folder, or a .csv/.jsonl file."),
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard the run there.")] = False,
) -> None:
    """Tune prompts on a few labelled images, and evaluate them.

    **Examples**

        dapt train bundled -o runs/first

        dapt train photos/ -o runs/photos --shots 8 --tune-settings

        dapt train caltech101 --root /data -o runs/caltech -b ViT-B-16 --pretrained openai

        dapt train -o runs/photos --resume
    """
    with _readable_errors(output):
        from dapt.runs import RunDirectory
        from dapt.settings import make_settings, parse_assignment, read_settings_file
        from dapt.train import check_output
        from dapt.train import train as run_training

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
        given = _absolute(given)
        if given.get("support_set"):
            given.setdefault("shots", _shots_of(Path(given["support_set"])))
        final = make_settings(given)
        check_output(run, final, resume=resume, overwrite=overwrite)
        if tune_settings and not (resume and run.exists):
            from dapt.search import search_settings

            final = search_settings(final, reporter)
        run_training(final, output, resume=resume, overwrite=overwrite, reporter=reporter)
        _show_run(run)


def _shots_of(support_set: Path) -> Any:
    """Shots that a saved support set was drawn with; what else it holds is checked later."""
    from dapt.files import read_json

    value = read_json(support_set, "support set file")
    return value.get("shots") if isinstance(value, dict) else None


def _absolute(given: dict[str, Any]) -> dict[str, Any]:
    """Paths among the settings made absolute, so that a run is found again from anywhere."""
    from dapt.data import BENCHMARKS

    given, names = dict(given), {"bundled", *BENCHMARKS}
    for setting in ("dataset", "root", "class_names", "support_set", "backbone", "pretrained"):
        value = given.get(setting)
        if isinstance(value, str) and value not in names and Path(value).expanduser().exists():
            given[setting] = str(Path(value).expanduser().resolve())
    return given


def _show_run(run: Any) -> None:
    from dapt.files import read_json

    result = read_json(run.metrics_file, "metrics")
    spent = read_json(run.environment_file, "environment")
    console.print(_metrics_table(f"{result['dataset']}, {result['method']}", result["test"]))
    for name, values in result["dispersion"].items():
        _say(f"{name}-dispersion {values['before']:.3f} before, {values['after']:.3f} after")
    _say(
        f"{result['learned_parameters']:,} learned parameters, tuned in "
        f"{spent['tuning_seconds']:g} s; everything is in {run.path}"
    )


def _metrics_table(title: str, values: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = {"accuracy": "top-1", "top5": "top-5", "macro_f1": "macro-F1", "ece": "ECE"}
    cells = [f"{values['images']:,}"]
    table.add_column("images", justify="right")
    for name, label in columns.items():
        if name in values:
            table.add_column(label, justify="right")
            cells.append(f"{100 * values[name]:.1f} %")
    table.add_row(*cells)
    return table


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate a run's prompts: on its own test images, another domain, or another dataset.

    **Examples**

        dapt eval runs/first

        dapt eval runs/first --domain high-contrast

        dapt eval runs/caltech --dataset oxford_pets --root /data
    """
    with _readable_errors():
        from dapt.files import write_json
        from dapt.runs import RunDirectory
        from dapt.train import evaluate_task, load_classifier, task_of

        directory = RunDirectory(run)
        directory.require()
        settings = directory.read_settings()
        changes = {
            "dataset": dataset,
            "root": root and str(root),
            "domain": domain,
            "class_names": class_names and str(class_names),
        }
        if dataset is not None:  # where the other one's classes come from is its own affair
            changes = {**dict.fromkeys(("domain", "class_names")), **changes}
            settings = settings.model_copy(update={"domain": None, "class_names": None})
        settings = settings.model_copy(update={k: v for k, v in changes.items() if v is not None})
        task = task_of(settings, evaluate=True) if dataset else task_of(settings)
        classifier = load_classifier(directory, task.class_names, task.template, device=device)
        result = evaluate_task(classifier, task, settings, RichReporter())
        if dataset or domain:
            name = "-".join(filter(None, [Path(dataset or settings.dataset).stem, domain]))
            write_json(directory.path / f"eval-{name}.json", {"dataset": task.name, "test": result})
        if as_json:
            typer.echo(json.dumps(result, ensure_ascii=False))
        else:
            console.print(_metrics_table(f"{task.name}, prompts of {run}", result))


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    device: DeviceOption = None,
) -> None:
    """Classify images with a run's prompts.

    **Examples**

        dapt predict runs/photos new/*.jpg

        dapt predict runs/photos new/ --top 3 --json
    """
    with _readable_errors():
        from dapt.predict import find_images
        from dapt.predict import predict as run_prediction
        from dapt.runs import RunDirectory
        from dapt.train import load_classifier

        paths = find_images(images)
        classifier = load_classifier(RunDirectory(run), device=device)
        with RichReporter().stage("predicting", len(paths)) as advance:
            found = run_prediction(classifier, paths, top=top, advance=advance)
        for prediction in found:
            if as_json:
                ranked = [{"class": c, "probability": p} for c, p in prediction.classes]
                line = {"path": str(prediction.path), "classes": ranked}
                typer.echo(json.dumps(line, ensure_ascii=False))
            else:
                ranked_text = ", ".join(f"{c} {p:.1%}" for c, p in prediction.classes)
                typer.echo(f"{prediction.path}: {ranked_text}")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where runs and picture go.")
    ] = DEMO_FOLDER,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the support set.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of support set, prompts and order.")] = 1,
) -> None:
    """Compare zero-shot, a linear probe, CoOp, VPT, VLPT and DAPT on the bundled task."""
    with _readable_errors(output, "demo"):
        from dapt.demo import run_demo

        run_demo(output, epochs=epochs, seed=seed, reporter=RichReporter())


@app.command()
def bench(
    backbone: Annotated[str, typer.Option("--backbone", "-b", help="As for 'dapt train'.")] = (
        "ViT-B-16"
    ),
    pretrained: Annotated[
        str | None, typer.Option(help="Weights of an open_clip model; by default random ones.")
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="JSON list or text file of names; by default the bundled.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 32,
    eval_batch_size: Annotated[int, typer.Option(min=1, help="Images an evaluation batch.")] = 100,
    variants: Annotated[str, typer.Option(help="Of plain, fp32, bf16, fp16.")] = "plain,fp32,bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns each variant takes.")] = 3,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Time training steps only.")] = False,
    device: DeviceOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to it.")] = (
        None
    ),
) -> None:
    """Time a training step and an evaluation, the plain way and ours, in one run.

    **Examples**

        dapt bench --class-names sun397.json --batch-size 16 --json bench.json

        dapt bench -b bundled --variants plain,fp32 --rounds 10
    """
    with _readable_errors():
        from open_clip import list_models

        from dapt.bench import read_class_names, run_bench
        from dapt.data import open_task
        from dapt.files import write_json

        if json_file and not json_file.parent.is_dir():
            raise UserError(f"--json {json_file}: its folder does not exist; make it first")
        names = read_class_names(class_names) if class_names else open_task("bundled").class_names
        chosen = [v.strip() for v in variants.split(",") if v.strip()]
        with RichReporter().stage("bench", (rounds + 1) * len(chosen)) as advance:
            report = run_bench(
                backbone=backbone,
                # What the weights are does not change the time.
                pretrained=pretrained or ("random" if backbone in list_models() else None),
                class_names=names,
                batch_size=batch_size,
                eval_batch_size=eval_batch_size,
                variants=chosen,
                rounds=rounds,
                evaluation=not no_eval,
                device=device or "auto",
                advance=advance,
            )
        if json_file:
            write_json(json_file, report)
        _show_bench(report)


def _show_bench(report: dict[str, Any]) -> None:
    """One row a variant, with ratios to the first."""
    rows = report["variants"]
    first = next(iter(rows.values()))
    table = Table(
        title=f"{report['backbone']}, {report['classes']:,} classes, batch {report['batch_size']}, "
        f"{report['threads']} threads",
        title_justify="left",
    )
    table.add_column("")
    for column in ("forward s", "backward s", "step s", "×", "of matmul", "eval images/s", "×",
                   "peak GB"):  # fmt: skip
        table.add_column(column, justify="right")
    for name, row in rows.items():
        speed = row.get("eval_images_per_second")
        table.add_row(
            name,
            f"{row['forward']:.2f}",
            f"{row['backward']:.2f}",
            f"{row['step']:.2f}",
            f"{first['step'] / row['step']:.1f}",
            f"{row['share_of_matmul_rate']:.0%}",
            f"{speed:.1f}" if speed else "",
            f"{speed / first['eval_images_per_second']:.1f}" if speed else "",
            f"{row['peak_bytes'] / 1e9:.1f}",
        )
    console.print(table)
    rates = (f"{p} {r / 1e9:,.0f}" for p, r in report["matmul_flops_per_second"].items())
    _say(f"matrix products, Gflop/s: {', '.join(rates)}")


@app.command()
def methods() -> None:
    """List the methods: what each learns, and by which loss terms."""
    from dapt.methods import METHODS

    table = Table("name", "method", "text prompt", "visual prompt", "loss terms")
    for name, row in METHODS.items():
        learns = ["learned" if row.text else "words", "learned" if row.visual else "–"]
        if row.probe:
            learns = ["–", "–"]
        table.add_row(name, row.title, *learns, ", ".join(row.terms) or "–")
    console.print(table)


@app.command(name="settings")
def list_settings(
    dataset: Annotated[str, typer.Argument(help="Show the settings published for it.")] = "bundled",
    shots: Annotated[int, typer.Option(min=1, help="Support images a class.")] = 16,
) -> None:
    """List every setting with its default for a dataset, and what it means."""
    from dapt.settings import Settings, default_settings

    defaults = default_settings({"dataset": dataset, "shots": shots})
    given = {"dataset": dataset, "shots": shots}
    table = Table("setting", "default", "meaning")
    for name, field in Settings.model_fields.items():
        value = given.get(name, defaults.get(name, field.default))
        table.add_row(name, "" if value is None else str(value), field.description or "")
    console.print(table)


@data.command(name="support-set")
def support_set(
    dataset: Annotated[str, typer.Argument(help="As for 'dapt train'.")],
    shots: Annotated[int, typer.Option(min=1, help="Support images a class.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 1,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    save: Annotated[
        Path | None, typer.Option(help="Write it to a file that 'dapt train' can take.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Draw a support set exactly as the published protocol does, and print it.

    **Examples**

        dapt data support-set bundled --shots 4

        dapt data support-set caltech101 --root /data --shots 16 --seed 1 --json
    """
    with _readable_errors():
        from dapt.data import draw_support_set, open_task

        task = open_task(dataset, root=root, domain=domain, class_names=class_names)
        drawn = draw_support_set(task, shots, seed)
        if save:
            drawn.save(save)
        if as_json:
            typer.echo(json.dumps(drawn.to_json(), ensure_ascii=False))
            return
        for part in ("train", "val"):
            for item in getattr(drawn, part):
                typer.echo(f"{part}\t{item.label}\t{item.class_name}\t{item.path}")


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from dapt import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the ``dapt`` command."""
    app()


if __name__ == "__main__":
    main()
