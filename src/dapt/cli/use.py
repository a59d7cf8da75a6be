"""What is done with a run: ``dapt eval``, ``dapt predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from dapt.cli.common import (
    DeviceOption,
    DomainOption,
    NamesOption,
    RootOption,
    RunArgument,
    StrictOption,
    app,
    metrics_table,
    readable_errors,
    say_error,
    say_json,
)
from dapt.cli.predictions import PredictionForm, prediction_printer
from dapt.errors import UserError
from dapt.progress import Reporter, RichReporter, console


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    classes: Annotated[
        str | None, typer.Option(help="base (first half by label), new (the rest) or all.")
    ] = None,
    device: DeviceOption = None,
    strict: StrictOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate a run's prompts: on its own test images, another domain, or another dataset.

    **Examples**

        dapt eval runs/first

        dapt eval runs/first --domain fluent-emoji-high-contrast

        dapt eval runs/caltech --dataset oxford_pets --root /data
    """
    with readable_errors():
        from dapt.run.directory import RunDirectory
        from dapt.run.transfer import Target, evaluate_run
        from dapt.settings import absolute_paths

        target = {
            "dataset": dataset,
            "root": root and str(root),
            "domain": domain,
            "class_names": class_names and str(class_names),
            "classes": classes,
        }
        name, result = evaluate_run(
            RunDirectory(run),
            Target(**absolute_paths(target)),
            device=device,
            strict=strict,
            reporter=RichReporter(),
        )
        if as_json:
            say_json(result)
        else:
            console.print(metrics_table(f"{name}, prompts of {run}", result))


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders, patterns; - reads names from standard input."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    form: Annotated[
        PredictionForm, typer.Option("--format", "-f", help="How to print predictions.")
    ] = PredictionForm.lines,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    unknown: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Call an image unknown whose best probability is below this."
        ),
    ] = None,
    null: Annotated[
        bool, typer.Option("-0", help="Names on standard input end in NUL, as of find -print0.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 100,
    device: DeviceOption = None,
) -> None:
    """Classify images with a run's prompts.

    Predictions are printed as they are made (a table at the end), so there may be any number of
    images. One that cannot be read is told on standard error and skipped; the exit code is then 1.

    **Examples**

        dapt predict runs/photos new/*.jpg

        dapt predict runs/photos new/ --top 3 --format csv > new.csv

        dapt predict runs/photos 'new/**/*.jpg' --unknown 0.5 --json

        find new -name '*.jpg' -print0 | dapt predict runs/photos -0
    """
    with readable_errors():
        from dapt.predict import Unreadable, find_images, named_in, predict_each
        from dapt.run.directory import RunDirectory
        from dapt.run.load import load_classifier

        given = images or (["-"] if null else [])
        listed = "-" in given
        if null and not listed:
            raise UserError("-0 is about names on standard input; add - to the images")
        if listed and len(given) > 1:
            raise UserError("- stands for all images; name no others beside it")
        paths: Iterable[Path]
        if listed:
            paths, total = named_in(sys.stdin.buffer, b"\0" if null else b"\n"), None
        else:
            paths = find_images(given)
            total = len(paths)
        classifier = load_classifier(RunDirectory(run), device=device)
        chosen = PredictionForm.json if as_json else form
        # The progress bar takes sys.stdout over while it shows; on a terminal, the predictions
        # themselves show how far it is.
        out = sys.stdout
        printed = prediction_printer(chosen, out, min(top, len(classifier.class_names)), unknown)
        quiet = out.isatty() and chosen is not PredictionForm.table
        done = skipped = 0
        with (Reporter() if quiet else RichReporter()).stage("predicting", total) as advance:
            for found in predict_each(classifier, paths, top=top, batch_size=batch_size):
                done += 1
                advance(1)
                if isinstance(found, Unreadable):
                    skipped += 1
                    say_error(f"dapt: skipped: {found.reason}")
                else:
                    printed.add(found)
        printed.close()
        if not done:
            raise UserError("standard input names no images; check the command before the pipe")
        if skipped:
            say_error(f"dapt: {skipped:,} of {done:,} images could not be read and were skipped")
            raise typer.Exit(1)
