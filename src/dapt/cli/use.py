"""What is done with a run: ``dapt eval``, ``dapt predict``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dapt.cli import common
from dapt.cli.common import app, given_settings, metrics_table, say_error, say_json
from dapt.cli.predictions import FORMS
from dapt.errors import UserError, nearest
from dapt.progress import Reporter, RichReporter, console

if TYPE_CHECKING:
    from dapt.predict import Prediction


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    run: common.RunArgument,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    classes: Annotated[
        str | None, typer.Option(help="base (first half by label), new (the rest) or all.")
    ] = None,
    device: common.DeviceOption = None,
    strict: common.StrictOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate a run's prompts: on its own test images, another domain, or another dataset.

    **Examples**

        dapt eval runs/first

        dapt eval runs/first --domain fluent-emoji-high-contrast

        dapt eval runs/caltech --dataset oxford_pets --root /data
    """
    from dapt.run.directory import RunDirectory
    from dapt.run.transfer import Target, evaluate_run

    target = Target(**given_settings(context, [field.name for field in fields(Target)]))
    name, result = evaluate_run(
        RunDirectory(run), target, device=device, strict=strict, reporter=RichReporter()
    )
    if as_json:
        say_json(result)
    else:
        console.print(metrics_table(f"{name}, prompts of {run}", result))


@app.command()
def predict(
    run: common.RunArgument,
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Image files, folders, patterns; - reads names from standard input."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    form: Annotated[
        str, typer.Option("--format", "-f", help="Of predictions: lines, json, csv or table.")
    ] = "lines",
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
    device: common.DeviceOption = None,
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
    from dapt.predict import Unreadable, find_images, named_in, predict_each
    from dapt.run.directory import RunDirectory
    from dapt.run.train import load_classifier

    form = "json" if as_json else form
    if form not in FORMS:
        raise UserError(f"--format {form}{nearest(form, [*FORMS])}; use one of {', '.join(FORMS)}")
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
    # The progress bar takes sys.stdout over while it shows; on a terminal, the predictions
    # themselves show how far it is.
    out = sys.stdout
    quiet = out.isatty() and form != "table"
    done = skipped = 0
    with (Reporter() if quiet else RichReporter()).stage("predicting", total) as advance:

        def readable() -> Iterator[Prediction]:
            nonlocal done, skipped
            for found in predict_each(classifier, paths, top=top, batch_size=batch_size):
                done += 1
                advance(1)
                if isinstance(found, Unreadable):
                    skipped += 1
                    say_error(f"dapt: skipped: {found.reason}")
                else:
                    yield found

        for line in FORMS[form](readable(), min(top, len(classifier.class_names)), unknown):
            out.write(f"{line}\n")
            out.flush()
    if not done:
        raise UserError("standard input names no images; check the command before the pipe")
    if skipped:
        say_error(f"dapt: {skipped:,} of {done:,} images could not be read and were skipped")
        raise typer.Exit(1)
