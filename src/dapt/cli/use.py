"""What is done with a run: to evaluate it, predict, serve, and exchange it with other programs."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.filesize import decimal
from rich.table import Column, Table
from typer import Argument, Context, Exit, Option, echo

from dapt.cli import common
from dapt.cli.common import command, given_settings, say_error
from dapt.errors import (
    UserError,
    install,
    nearest,
    printable,
    readable,
    refusing,
    spreadsheet_cell,
    spreadsheet_path,
)
from dapt.progress import Reporter, RichReporter, cell, console, say
from dapt.safe.files import require_there, to_json, user_path

if TYPE_CHECKING:
    from dapt.run.directory import RunDirectory
    from dapt.run.records import ForecastRecord


@command("eval")
def evaluate(
    context: Context,
    run: common.RunArgument,
    dataset: Annotated[str | None, Option(help="Another dataset to evaluate on.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    classes: Annotated[str | None, Option(help="base (first half), new (the rest) or all.")] = None,
    device: common.RunDeviceOption = None,
    strict: common.StrictOption = False,
    as_json: Annotated[bool, Option("--json", help="Print all metrics as JSON.")] = False,
    plugin: common.PluginOption = None,
) -> None:
    """Evaluate a run on its own test images, another domain, or another dataset."""
    from dapt.run.directory import RunDirectory
    from dapt.run.train import Target, evaluate_run

    target = Target(**given_settings(context, [field.name for field in fields(Target)]))
    name, result = evaluate_run(
        RunDirectory(run), target, device=device, strict=strict, reporter=RichReporter()
    )
    if as_json:
        echo(to_json(result))
    else:
        console.print(common.metrics_table(f"{name}, prompts of {run}", result))


def _are_there(images: list[str] | None) -> list[str] | None:
    """What names images, looked for before anything that takes seconds is imported."""
    for name in images or ():
        if name != "-" and not glob.has_magic(name):
            require_there(user_path(name), "image")
    return images


@command("predict")
def predict(
    run: common.RunArgument,
    images: Annotated[
        list[str] | None,
        Argument(help="Files, folders, patterns; - reads names from stdin.", callback=_are_there),
    ] = None,
    top: Annotated[int, Option(min=1, help="Classes to name for each image.")] = 1,
    form: Annotated[str, Option("--format", "-f", help="lines, json, csv or table.")] = "lines",
    as_json: Annotated[bool, Option("--json", help="The same as --format json.")] = False,
    unknown: Annotated[
        str | None, Option(help="Call an image unknown below this probability; or auto.")
    ] = None,
    known_share: Annotated[
        float, Option(min=0, max=1, help="Share of known images that --unknown auto lets pass.")
    ] = 0.95,
    set_coverage: Annotated[
        float | None,
        Option(min=0, max=1, help="How often the true class is among those named, such as 0.9."),
    ] = None,
    null: Annotated[bool, Option("-0", help="Names end in NUL (find -print0).")] = False,
    batch_size: Annotated[int, Option(min=1, help="Images per batch.")] = 100,
    device: common.RunDeviceOption = None,
    plugin: common.PluginOption = None,
) -> None:
    """Classify images with a run."""
    from dapt.predict import Unreadable, named_in, predict_each
    from dapt.run.directory import RunDirectory
    from dapt.run.load import load_classifier

    form = "json" if as_json else form
    if form not in FORMS:
        raise UserError(f"--format {form}{nearest(form, [*FORMS])}; use one of {', '.join(FORMS)}")
    directory = RunDirectory(run)
    asked = {"--top": top != 1, "--unknown": unknown, "--set-coverage": set_coverage}
    forms = FORMS_OF_SEVERAL if _gives_several(directory, asked) else FORMS
    limit, least = _limit(directory, unknown, known_share), _least(directory, set_coverage, form)
    known = _listed(images, null=null)
    paths = named_in(sys.stdin.buffer, b"\0" if null else b"\n") if known is None else known
    classifier = load_classifier(directory, device=device)
    # The progress bar takes sys.stdout over while it shows; on a terminal, the predictions
    # themselves show how far it is.
    out, done, skipped = sys.stdout, 0, 0
    reporter = Reporter() if out.isatty() and form != "table" else RichReporter()

    def rows() -> Generator[Row, None, None]:
        nonlocal done, skipped
        with reporter.stage("predicting", None if known is None else len(known)) as advance:
            for one in predict_each(classifier, paths, top=width, batch_size=batch_size):
                done += 1
                advance(1)
                if isinstance(one, Unreadable):
                    skipped += 1
                    say_error(f"dapt: skipped: {one.reason}")
                else:
                    path = os.fsencode(one.path).decode("utf-8", "replace")  # for any output
                    classes = one.classes
                    if least is not None:
                        classes = (*classes[:1], *(c for c in classes[1:] if c[1] >= least))
                    yield path, classes, limit is not None and classes[0][1] < limit

    width = len(classifier.class_names)
    width = width if least is not None else min(top, width)
    with closing(rows()) as found:
        for line in forms[form](found, width, limit is not None):
            out.write(f"{line}\n")
            out.flush()
    if not done:
        raise UserError("standard input names no images; check the command before the pipe")
    if skipped:
        say_error(f"dapt: {skipped:,} of {done:,} images could not be read and were skipped")
        raise Exit(1)


def _gives_several(run: RunDirectory, options: Mapping[str, Any]) -> bool:
    """Whether a run gives images several labels; a `UserError` of options of one label each."""
    run.require()
    several = run.read_task().multilabel
    if odd := next((name for name, given in options.items() if several and given), None):
        way = "'dapt predict' names all that reach their thresholds"
        raise UserError(f"{odd} is for one label an image, and {run.path} gives several; {way}")
    return several


def _limit(run: RunDirectory, unknown: str | None, share: float) -> float | None:
    """The probability below which an image is unknown; None where that is not asked."""
    if unknown is None:
        return None
    if unknown == "auto":
        limit = _forecast(run, "--unknown auto").probability_of_known(share)
        reached = f"{100 * share:g} % of photos of known classes reach it"
        say_error(f"unknown: below {100 * limit:.1f} %; {reached}")
        return limit
    with refusing(f"--unknown {unknown}", "give a number from 0 to 1, or auto", ValueError):
        limit = float(unknown)
        if not 0 <= limit <= 1:
            raise ValueError("it is not from 0 to 1")
        return limit


def _least(run: RunDirectory, coverage: float | None, form: str) -> float | None:
    """The probability that classes of a set reach; None where no sets are asked for."""
    if coverage is None:
        return None
    if form not in ("lines", "json"):
        raise UserError(f"--set-coverage names any number of classes; {form} has no room: json")
    return _forecast(run, "--set-coverage").probability_of_sets(coverage)


def _forecast(run: RunDirectory, option: str) -> ForecastRecord:
    """What the run held out; a `UserError` where it has nothing of the kind."""
    if (found := run.read_metrics().forecast) is None:
        way = "train with --method auto, and two photos or more in a class"
        raise UserError(f"{option} needs a run that has tried held-out photos; {way}")
    return found


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
        ranked = ", ".join(f"{readable(name)} {p:.1%}" for name, p in classes) or "no label"
        yield printable(f"{path}: unknown ({ranked})" if unknown else f"{path}: {ranked}")


def _json(rows: Iterable[Row], _top: int, limited: bool) -> Iterator[str]:
    """``{"path", "classes": [{"class", "probability"}], "unknown"}``; the last if it is asked."""
    for path, classes, unknown in rows:
        ranked = [{"class": name, "probability": p} for name, p in classes]
        value = {"path": path, "classes": ranked} | ({"unknown": unknown} if limited else {})
        yield json.dumps(value, ensure_ascii=False)


def _csv(rows: Iterable[Row], top: int, limited: bool) -> Iterator[str]:
    """Columns path, class, probability (class_2, probability_2, ...), unknown; for people."""
    places = ("", *(f"_{place}" for place in range(2, top + 1)))
    columns = [f"{name}{place}" for place in places for name in ("class", "probability")]
    yield _comma_separated("path", *columns, *["unknown"] * limited)
    for path, classes, unknown in rows:
        cells = [text for name, p in classes for text in (spreadsheet_cell(name), f"{p:.6f}")]
        yield _comma_separated(spreadsheet_path(path), *cells, *[str(unknown).lower()] * limited)


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
        best, *cells = [cell(text) for name, p in classes for text in (readable(name), f"{p:.1%}")]
        table.add_row(cell(path), f"unknown ({best})" if unknown else best, *cells)
    yield _as_text(table)


def _as_text(table: Table) -> str:
    with console.capture() as captured:
        console.print(table)
    return captured.get().removesuffix("\n")


def _csv_of_several(rows: Iterable[Row], _top: int, _limited: bool) -> Iterator[str]:
    """Columns path, label, probability: several in a cell have | between, as a table has them."""
    yield _comma_separated("path", "label", "probability")
    for path, classes, _ in rows:
        names, values = [name for name, _ in classes], [f"{p:.6f}" for _, p in classes]
        yield _comma_separated(path, "|".join(names), "|".join(values))


def _table_of_several(rows: Iterable[Row], _top: int, _limited: bool) -> Iterator[str]:
    """A table, once all images are there."""
    table = Table(Column("image", overflow="fold"), "labels")
    for path, classes, _ in rows:
        table.add_row(cell(path), cell(", ".join(f"{readable(n)} {p:.1%}" for n, p in classes)))
    yield _as_text(table)


FORMS = {"lines": _lines, "json": _json, "csv": _csv, "table": _table}
FORMS_OF_SEVERAL = FORMS | {"csv": _csv_of_several, "table": _table_of_several}


@command("suggest")
def suggest(
    run: common.RunArgument,
    images: Annotated[list[str], Argument(help="Files, folders, patterns.", callback=_are_there)],
    count: Annotated[int, Option("--count", "-n", min=1, help="Photos to list.")] = 20,
    form: Annotated[str, Option("--format", "-f", help="lines, json or csv.")] = "lines",
    batch_size: Annotated[int, Option(min=1, help="Images per batch.")] = 100,
    device: common.RunDeviceOption = None,
    plugin: common.PluginOption = None,
) -> None:
    """Suggest which unlabelled photos to label next: unsure ones, unlike each other."""
    from dapt.data import ImageStore
    from dapt.engine.suggest import suggest
    from dapt.predict import find_images
    from dapt.run.directory import RunDirectory
    from dapt.run.load import load_classifier

    if form not in (forms := ("lines", "json", "csv")):
        raise UserError(f"--format {form}{nearest(form, forms)}; use one of {', '.join(forms)}")
    _gives_several(RunDirectory(run), {"'dapt suggest'": True})
    paths, bad = find_images(images), dict[int, str]()
    classifier = load_classifier(RunDirectory(run), device=device)
    store = ImageStore(paths, **classifier.of_views())
    with RichReporter().stage("looking", len(paths)) as advance:
        how: dict[str, Any] = {"batch_size": batch_size, "advance": advance, "unreadable": bad}
        found = suggest(classifier, store, count, **how)
    for reason in bad.values():
        say_error(f"dapt: skipped: {reason}")
    if form == "csv":
        echo(_comma_separated("path", "class", "probability", "reason"))
    for one in found:
        path = os.fsencode(paths[one.place]).decode("utf-8", "replace")
        if form == "lines":
            guess = f"{readable(one.guess)} {one.probability:.1%} ({one.reason})"
            echo(printable(f"{path}: {guess}"))
        elif form == "csv":
            guess, reason = map(spreadsheet_cell, (one.guess, one.reason))
            row = (spreadsheet_path(path), guess, f"{one.probability:.6f}", reason)
            echo(_comma_separated(*row))
        else:
            value = {"path": path, "class": one.guess, "probability": one.probability}
            echo(json.dumps({**value, "reason": one.reason}, ensure_ascii=False))
    if bad:
        say_error(f"dapt: {len(bad):,} of {len(paths):,} images could not be read and were skipped")
        raise Exit(1)


@command("serve")
def serve(
    run: common.RunArgument,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    token: Annotated[
        str | None, Option(envvar="DAPT_TOKEN", help="Token that clients must send.")
    ] = None,
    nearest: Annotated[bool, Option(help="Show the nearest support images, if available.")] = True,
    max_upload: Annotated[float, Option(min=0.01, help="Largest request, in MB.")] = 20,
    max_pixels: Annotated[float, Option(min=0.01, help="Largest image, in megapixels.")] = 50,
    max_images: Annotated[int, Option(min=1, help="Most images per request.")] = 32,
    queue: Annotated[int, Option(min=1, help="Most images waiting, in all.")] = 128,
    batch_size: Annotated[int, Option(min=1, help="Images the model processes at a time.")] = 32,
    timeout: Annotated[float, Option(min=0.1, help="Longest time for a request, in seconds.")] = 30,
    allow_host: Annotated[list[str] | None, Option(help="Another name of this server.")] = None,
    allow_origin: Annotated[
        list[str] | None, Option(help="Other web pages that may use it: scheme, host, port.")
    ] = None,
    workers: Annotated[int, Option(min=1, help="Processes, each with its own model.")] = 1,
    root_path: Annotated[str, Option(help="Path below which a proxy serves it.")] = "",
    feedback: Annotated[
        Path | None, Option(help="Folder for photos that visitors correct.")
    ] = None,
    feedback_room: Annotated[float, Option(min=0.01, help="Most MB for these photos.")] = 1000,
    device: common.RunDeviceOption = None,
    plugin: common.PluginOption = None,
) -> None:
    """Serve a run: a page to drop photos on, and predictions for other programs."""
    try:
        from dapt.serve import server
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: {install('serve')}") from error
    from dapt.run.directory import RunDirectory
    from dapt.serve.app import Limits
    from dapt.serve.feedback import open_feedback
    from dapt.serve.served import load_served

    who = _who(token, allow_host or [], allow_origin or [], root_path)
    if max_images > queue:
        raise UserError(f"--max-images {max_images} do not fit --queue {queue}; change one of them")
    directory = RunDirectory(run)
    directory.require()
    if feedback is not None:
        _gives_several(directory, {"--feedback": True})
        names, room = directory.read_task().class_names, int(feedback_room * 1e6)
        who["feedback"] = open_feedback(feedback, room, names)
    listening = server.open_socket(host, port)
    address, port, *_ = listening.getsockname()
    if token is None and not server.is_loopback(address):
        say_error(
            "dapt: warning: whoever reaches this machine can use the server and see support "
            "images; give --token or DAPT_TOKEN"
        )
    most, pixels = int(max_upload * 1e6), int(max_pixels * 1e6)
    limits = Limits(most, pixels, max_images, queue, batch_size, timeout)
    where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    name, classes = directory.name, len(directory.read_task().class_names)
    told = f"{name}, {classes:,} classes, at {where} (Ctrl-C stops)"
    # The host by its own port: other servers there are others.
    who["names"] += [f"{f'[{host}]' if ':' in host else host}:{port}"]
    if workers > 1:
        from dapt.methods import plugins
        from dapt.serve.workers import Work, serve

        serve(
            Work(run, device, nearest, limits, who, plugins.files()),
            workers,
            listening,
            lambda: say(told),
        )
        return
    served = load_served(directory, device=device, nearest=nearest, reporter=RichReporter())
    made = server.make_server(served, listening, limits, **who, ready=lambda: say(told))
    made.run(sockets=[listening])


def _who(token: str | None, hosts: list[str], origins: list[str], below: str) -> dict[str, Any]:
    """Who may use a server, as `make_server` takes it."""
    from dapt.serve.server import BELOW, is_origin

    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise UserError("--token must be printable ASCII, such as 'openssl rand -hex 16' makes")
    below = f"/{below.strip('/')}" if below.strip("/") else ""
    if below and not BELOW.fullmatch(below):
        raise UserError(f"--root-path {below} is no plain path; give one such as /photos")
    pages = [one.lower().rstrip("/") for one in origins]
    if odd := next((one for one in pages if not is_origin(one)), None):
        raise UserError(f"--allow-origin {odd} is none; give one such as https://photos.example")
    if odd := next((one for one in hosts if not is_origin(f"http://{one}")), None):
        raise UserError(f"--allow-host {odd} is no name; give one such as photos.example")
    return {"token": token and token.strip(), "names": hosts, "origins": pages, "root_path": below}


@command("import")
def import_(
    context: Context,
    checkpoint: Annotated[Path, Argument(help="File, or a directory with model.pth.tar-N.")],
    output: Annotated[Path, Option("--output", "-o", help="Run directory to write.")],
    backbone: common.OneBackboneOption = "bundled",
    pretrained: common.OnePretrainedOption = None,
    class_names: Annotated[Path | None, Option(help="Names in label order, as JSON.")] = None,
    dataset: Annotated[str | None, Option(help="Dataset to evaluate on.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    method: common.MethodOption = None,
    template: Annotated[str | None, Option(help="With {}, if no text prompt is learned.")] = None,
    shots: common.ShotsOption = None,
    seed: common.SeedOption = None,
    epochs: common.EpochsOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    overwrite: common.OverwriteOption = False,
) -> None:
    """Make a run of what the field's published code has tuned, on the same backbone."""
    from dapt.share.exchange import import_checkpoint

    told, given = RichReporter(), given_settings(context)
    run = import_checkpoint(checkpoint, output, given, overwrite=overwrite, reporter=told)
    if run.finished:
        common.show_run(run, "imported")
    else:
        say(f"not evaluated, for want of a dataset; everything is in {run.path}")


@command("export")
def export(
    run: common.RunArgument,
    output: Annotated[Path, Option("--output", "-o", help="File to write.")],
    form: Annotated[str, Option("--format", "-f", help="onnx, torch, coop or peft.")] = "onnx",
    int8: Annotated[bool, Option("--int8", help="ONNX in 8 bits: smaller, a bit worse.")] = False,
    fp16: Annotated[bool, Option("--fp16", help="ONNX in 16 bits: half as large.")] = False,
    batch: Annotated[int | None, Option(min=1, help="Fix the number of images per batch.")] = None,
    plugin: common.PluginOption = None,
) -> None:
    """Write a run's classifier to one file that needs no dapt, with a model card beside it."""
    from dapt.run.directory import RunDirectory
    from dapt.share import export

    how: dict[str, Any] = {"int8": int8, "fp16": fp16, "batch": batch, "reporter": RichReporter()}
    made = export.export(RunDirectory(run), output, form, **how)
    if made.difference is not None:
        same = f"same class for {made.agreement:.0%}, on {made.images}"
        say(f"largest difference of a probability {made.difference:.1e}, {same}")
    say(f"{made.file} ({decimal(made.file.stat().st_size)}) and {made.card}")


@command("push")
def push(
    run: common.RunArgument,
    repo_id: Annotated[str, Argument(help="Model repository, such as name/flowers.")],
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list what would be uploaded.")] = False,
    plugin: common.PluginOption = None,
) -> None:
    """Upload a run and its model card to the Hugging Face hub, in one commit."""
    from dapt.run.directory import RunDirectory
    from dapt.share import card

    directory = RunDirectory(run)
    if not dry_run:
        say(card.push(directory, repo_id, private=private, reporter=RichReporter()))
        return
    for name, content in card.files_to_push(directory, repo_id).items():
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        say(f"{name}  {size:,} bytes")
