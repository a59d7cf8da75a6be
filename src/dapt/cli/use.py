"""What is done with a run: ``dapt eval``, ``dapt predict``."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Annotated

from rich.table import Column, Table
from typer import Argument, Context, Exit, Option

from dapt.cli import common
from dapt.cli.common import app, given_settings, metrics_table, say_error, say_json
from dapt.errors import UserError, nearest, printable
from dapt.progress import Reporter, RichReporter, cell, console


@app.command(name="eval")
def evaluate(
    context: Context,
    run: common.RunArgument,
    dataset: Annotated[str | None, Option(help="Another dataset than the run's own.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    classes: Annotated[str | None, Option(help="base (first half), new (the rest) or all.")] = None,
    device: common.DeviceOption = None,
    strict: common.StrictOption = False,
    as_json: Annotated[bool, Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate a run's prompts: on its own test images, another domain, or another dataset.

    **Examples**

    - `dapt eval runs/first`
    - `dapt eval runs/first --domain fluent-emoji-high-contrast`
    - `dapt eval runs/caltech --dataset oxford_pets --root /data`
    """
    from dapt.run.directory import RunDirectory
    from dapt.run.train import Target, evaluate_run

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
        list[str] | None, Argument(help="Files, folders, patterns; - reads names from stdin.")
    ] = None,
    top: Annotated[int, Option(min=1, help="Classes to name for each image.")] = 1,
    form: Annotated[str, Option("--format", "-f", help="lines, json, csv or table.")] = "lines",
    as_json: Annotated[bool, Option("--json", help="The same as --format json.")] = False,
    unknown: Annotated[
        float | None, Option(min=0, max=1, help="Less probable than this, an image is unknown.")
    ] = None,
    null: Annotated[bool, Option("-0", help="Names end in NUL, as of find -print0.")] = False,
    batch_size: Annotated[int, Option(min=1, help="Images a batch.")] = 100,
    device: common.DeviceOption = None,
) -> None:
    """Classify images with a run's prompts.

    Predictions are printed as they are made (a table at the end), so there may be any number of
    images. One that cannot be read is told on standard error and skipped; the exit code is then 1.

    **Examples**

    - `dapt predict runs/photos new/*.jpg`
    - `dapt predict runs/photos new/ --top 3 --format csv > new.csv`
    - `dapt predict runs/photos 'new/**/*.jpg' --unknown 0.5 --json`
    - `find new -name '*.jpg' -print0 | dapt predict runs/photos -0`
    """
    from dapt.predict import Unreadable, named_in, predict_each
    from dapt.run.directory import RunDirectory
    from dapt.run.load import load_classifier

    form = "json" if as_json else form
    if form not in FORMS:
        raise UserError(f"--format {form}{nearest(form, [*FORMS])}; use one of {', '.join(FORMS)}")
    known = _listed(images, null=null)
    paths = named_in(sys.stdin.buffer, b"\0" if null else b"\n") if known is None else known
    classifier = load_classifier(RunDirectory(run), device=device)
    # The progress bar takes sys.stdout over while it shows; on a terminal, the predictions
    # themselves show how far it is.
    out, done, skipped = sys.stdout, 0, 0
    reporter = Reporter() if out.isatty() and form != "table" else RichReporter()

    def rows() -> Generator[Row, None, None]:
        nonlocal done, skipped
        with reporter.stage("predicting", None if known is None else len(known)) as advance:
            for one in predict_each(classifier, paths, top=top, batch_size=batch_size):
                done += 1
                advance(1)
                if isinstance(one, Unreadable):
                    skipped += 1
                    say_error(f"dapt: skipped: {one.reason}")
                else:
                    path = os.fsencode(one.path).decode("utf-8", "replace")  # for any output
                    yield path, one.classes, one.classes[0][1] < (unknown or 0)

    with closing(rows()) as found:
        width = min(top, len(classifier.class_names))
        for line in FORMS[form](found, width, unknown is not None):
            out.write(f"{line}\n")
            out.flush()
    if not done:
        raise UserError("standard input names no images; check the command before the pipe")
    if skipped:
        say_error(f"dapt: {skipped:,} of {done:,} images could not be read and were skipped")
        raise Exit(1)


def _listed(images: list[str] | None, *, null: bool) -> list[Path] | None:
    """Images that arguments name; None where standard input does."""
    from dapt.predict import find_images

    given = images or (["-"] if null else [])
    if null and "-" not in given:
        raise UserError("-0 is about names on standard input; add - to the images")
    if "-" in given and len(given) > 1:
        raise UserError("- stands for all images; name no others beside it")
    return None if "-" in given else find_images(given)


# Forms of predictions, each a function to lines of: rows (path, classes with their probabilities,
# whether the best is too improbable), number of classes in a row, whether that is asked at all.
Row = tuple[str, Sequence[tuple[str, float]], bool]


def _lines(rows: Iterable[Row], _top: int, _limited: bool) -> Iterator[str]:
    """``path: class 90.0%, class 5.0%``, an image a line."""
    for path, classes, unknown in rows:
        ranked = ", ".join(f"{name} {p:.1%}" for name, p in classes)
        yield printable(f"{path}: unknown ({ranked})" if unknown else f"{path}: {ranked}")


def _json(rows: Iterable[Row], _top: int, limited: bool) -> Iterator[str]:
    """``{"path", "classes": [{"class", "probability"}], "unknown"}``; the last if it is asked."""
    for path, classes, unknown in rows:
        ranked = [{"class": name, "probability": p} for name, p in classes]
        value = {"path": path, "classes": ranked} | ({"unknown": unknown} if limited else {})
        yield json.dumps(value, ensure_ascii=False)


def _csv(rows: Iterable[Row], top: int, limited: bool) -> Iterator[str]:
    """Columns path, class, probability (class_2, probability_2, ...), unknown."""
    places = ("", *(f"_{place}" for place in range(2, top + 1)))
    columns = [f"{name}{place}" for place in places for name in ("class", "probability")]
    yield _comma_separated("path", *columns, *["unknown"] * limited)
    for path, classes, unknown in rows:
        cells = [text for name, p in classes for text in (name, f"{p:.6f}")]
        yield _comma_separated(path, *cells, *[str(unknown).lower()] * limited)


def _comma_separated(*cells: str) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # its line end is what makes it quote those in a name
    return text.getvalue().removesuffix("\r\n")


def _table(rows: Iterable[Row], top: int, _limited: bool) -> Iterator[str]:
    """A table, once all images are there."""
    table = Table(Column("image", overflow="fold"))
    for place in range(top):
        table.add_column("class" if place == 0 else f"{place + 1}.")
        table.add_column("", justify="right")
    for path, classes, unknown in rows:
        best, *cells = [cell(text) for name, p in classes for text in (name, f"{p:.1%}")]
        table.add_row(cell(path), f"unknown ({best})" if unknown else best, *cells)
    with console.capture() as captured:
        console.print(table)
    yield captured.get().removesuffix("\n")


FORMS = {"lines": _lines, "json": _json, "csv": _csv, "table": _table}
