"""``dapt data``: look at datasets and their support sets."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer, echo

from dapt.cli import common
from dapt.cli.common import command
from dapt.errors import UserError, printable
from dapt.progress import RichReporter, cell, console, say, table
from dapt.safe.files import to_json, user_path

if TYPE_CHECKING:
    from dapt.data.check import Check
    from dapt.engine.photos import Findings

_SHOWN = 10  # problems of a kind that are told one by one

data = Typer(no_args_is_help=True, help="Look at datasets and their support sets.")
common.app.add_typer(data, name="data")

_JsonOption = Annotated[bool, Option("--json", help="Print everything, as JSON.")]


@command("new")
def new(
    folder: Annotated[Path, Argument(help="Folder for your photos.")] = Path("photos"),
    classes: Annotated[list[str] | None, Argument(help="Class names; each gets a folder.")] = None,
) -> None:
    """Show how a folder of photos should look, or make one: dapt new photos cat 'golden retriever'.

    Each class has a folder of its own, called like it. Nothing that is there is changed.
    """
    folder, names = user_path(folder), classes or []
    for name in names:
        if name != name.strip() or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):
            raise UserError(f"class '{name}' is no name of a folder; give one such as 'red fox'")
    if len(set(names)) == 1:
        raise UserError(f"'{names[0]}' is one class; give two or more, as one tells nothing apart")
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    say(f"{folder}/")
    for name in names or ("cat", "dog"):
        say(f"  {name}/")
        for photo in () if names else ("1.jpg", "any name.png", "..."):
            say(f"    {photo}")
    say("4 photos of each class are a start, 16 are good; some are held out to test on by itself")
    say(f"then: dapt train {shlex.quote(str(folder))} -o runs/first")


@command("support-set", data)
def support_set(
    dataset: Annotated[str, Argument(help="As for 'dapt train'.")],
    shots: Annotated[int, Option(min=1, help="Support images per class.")] = 16,
    seed: Annotated[int, Option(min=0, help="Seed of the draw.")] = 1,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    save: Annotated[Path | None, Option(help="File to write, for 'dapt train'.")] = None,
    as_json: _JsonOption = False,
) -> None:
    """Draw a support set exactly as the published protocol does, and print it."""
    from dapt.data import draw_support_set, open_task

    task = open_task(dataset, root=root, domain=domain, class_names=class_names)
    drawn = draw_support_set(task, shots, seed)
    if save:
        drawn.save(save)
    if as_json:
        echo(to_json(drawn.to_json()))
        return
    for part, items in (("train", drawn.train), ("val", drawn.val)):
        for item in items:
            labels, path = "|".join(map(str, item.labels)), printable(item.path)
            name = printable("|".join(task.class_names[k] for k in item.labels))
            echo(f"{part}\t{labels}\t{name}\t{path}")


@command("list", data)
def list_datasets(as_json: _JsonOption = False) -> None:
    """List the datasets known by name: sizes, licences, and where to get them."""
    from dapt.data import BENCHMARKS
    from dapt.data.items import PARTS
    from dapt.data.tasks import LAYOUT

    rows = BENCHMARKS.values()
    if as_json:
        inner = ("read", "least")
        echo(to_json([{k: v for k, v in vars(row).items() if k not in inner} for row in rows]))
        return
    made = table("dataset", figures=("classes", *PARTS, "GB"))
    for row in rows:
        counts = (f"{row.counts[p]:,}" if p in row.counts else "–" for p in PARTS)
        size = f"{row.gigabytes:.1f}" if row.gigabytes < 10 else f"{row.gigabytes:.0f}"
        made.add_row(row.name, f"{row.classes:,}", *counts, size)
    console.print(made)
    say("folder below --root, licence, and where to get it:")
    for row in rows:
        say(f"  {row.folder:21} {row.licence:23} {row.url}")
    say(f"split files and layout: {LAYOUT}")
    say("without a download: bundled, or any folder of images")


@command("check", data)
def check(
    dataset: Annotated[str | None, Argument(help="Default: all benchmarks in --root.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    quick: Annotated[bool, Option("--quick", help="Only check that the files exist.")] = False,
    decode: Annotated[bool, Option("--decode", help="Decode images, not just their ends.")] = False,
    backbone: common.BackboneOption = None,
    pretrained: common.PretrainedOption = None,
    device: common.DeviceOption = None,
    report: Annotated[
        Path | None, Option(help="HTML page of the findings to write; needs -b.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Check a dataset's files and, with a backbone, its photos and labels."""
    from dapt.data import BENCHMARKS
    from dapt.data.check import check_dataset

    if quick and decode:
        raise UserError("--quick and --decode exclude each other; give one")
    if not backbone and (pretrained or device or report):
        raise UserError("--pretrained, --device and --report go with --backbone; give one")
    if report is not None:
        from dapt.report.sheet import require_sheet

        if dataset is None:
            raise UserError("--report goes with one DATASET; give it")
        require_sheet(report := user_path(report))
    root, chosen = _chosen(dataset, root, domain, class_names)
    level, told = "listed" if quick else "decoded" if decode else "whole", RichReporter()
    place: dict[str, Any] = {"root": root, "domain": domain, "class_names": class_names}
    checks = [check_dataset(name, level=level, reporter=told, **place) for name in chosen]
    found: dict[str, Findings] = {}
    if backbone:
        model = {"pretrained": pretrained or None, "device": device or "auto"}
        found = _look(checks, place, backbone, model, report, told)
    if as_json:
        shown = [(c, found.get(c.dataset)) for c in checks]
        echo(to_json([c.to_json() | ({"photos": f.to_json()} if f else {}) for c, f in shown]))
    else:
        _show_checks(checks)
        for name, findings in found.items():
            _show_findings(name, findings)
        absent = ", ".join(n for n in BENCHMARKS if n not in chosen)
        if absent and dataset is None:
            say(f"not below --root: {absent}")
        if report is not None and found:
            say(f"contact sheet: {report}")
    if any(c.problems for c in checks):
        raise Exit(1)


def _chosen(
    dataset: str | None, root: Path | None, domain: str | None, class_names: Path | None
) -> tuple[Path | None, list[str]]:
    """The folder of benchmarks, and the datasets to check."""
    from dapt.data import BENCHMARKS

    if dataset is None and root is None:
        raise UserError("give a DATASET to check, or --root for all benchmarks below it")
    if dataset is None and (domain or class_names):
        raise UserError("--domain and --class-names go with one DATASET; give it")
    root = user_path(root) if root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} does not exist; give the folder of the benchmarks")
    below = [n for n, row in BENCHMARKS.items() if root and (root / row.folder).is_dir()]
    if not (chosen := [dataset] if dataset else below):
        raise UserError(f"--root {root} holds no benchmark's folder; see 'dapt data list'")
    return root, chosen


def _look(
    checks: list[Check],
    place: dict[str, Any],
    backbone: list[str],
    model: dict[str, Any],
    report: Path | None,
    told: RichReporter,
) -> dict[str, Findings]:
    """What a backbone finds, by the names of the datasets that have images to see."""
    from dapt.clip.sources import load_backbone
    from dapt.data import open_task
    from dapt.engine.data import grey_of
    from dapt.engine.photos import look_at_photos

    seen = [c.dataset for c in checks if any(good for _, good, _ in c.parts.values())]
    opened = {name: open_task(name, **place) for name in seen}
    tasks = {name: replace(task, grey=grey_of(task)) for name, task in opened.items()}
    loaded = load_backbone(backbone, **model)
    found = {name: look_at_photos(task, loaded, told) for name, task in tasks.items()}
    if report is not None and found:
        from dapt.report.sheet import write_sheet

        for name, findings in found.items():
            write_sheet(report, tasks[name], findings)
    return found


def _show_findings(dataset: str, found: Findings) -> None:
    """The first few of each kind, the worst first."""
    leaks = sum(copy.leaks for copy in found.copies)
    kinds: dict[str, list[str]] = {
        f"copies: {len(found.copies):,}, {leaks:,} of them between test and train or val": [
            f"{one.kind} in {' and '.join(dict.fromkeys(one.parts))}"
            f"{', labels differ' if one.labels_differ else ''}: "
            f"{one.first.path} and {one.second.path}"
            for one in found.copies
        ],
        f"labels that look wrong: {len(found.labels):,}": [
            f"{one.photo.path}: rather '{one.guess}' than '{one.photo.class_name}'"
            for one in found.labels
        ],
        f"outliers: {len(found.outliers):,}": [
            f"{one.photo.path}, of '{one.photo.class_name}'" for one in found.outliers
        ],
        f"classes hard to tell apart: {len(found.classes):,}": [
            f"'{one.classes[0]}' and '{one.classes[1]}': {one.confused:.0%} of their photos are "
            "nearer to the other"
            + ("" if (cos := one.text_cosine) is None else f"; cosine of the names {cos:.2f}")
            for one in found.classes
        ],
    }
    say(f"{dataset}: {found.images:,} photos, seen by {found.backbone}")
    for note in found.notes:
        say(f"  {note}")
    if found.skipped:
        say(f"  left out, as they cannot be read: {len(found.skipped):,}")
    for title, lines in kinds.items():
        say(f"  {title}")
        for line in lines[:_SHOWN]:
            say(f"    {line}")
        if len(lines) > _SHOWN:
            say(f"    … {len(lines) - _SHOWN:,} more like this; --json lists all")


def _show_checks(checks: list[Check]) -> None:
    """A row a dataset, and below it what is wrong: the first few of each kind."""
    from dapt.data.items import PARTS

    made = table("dataset", figures=("classes", *PARTS, "problems"))
    for found in checks:
        rows = [found.parts.get(part) for part in PARTS]
        cells = [_share(r[1], r[0] if r[2] is None else r[2]) if r else "–" for r in rows]
        classes, problems = _share(*found.classes), f"{len(found.problems):,}"
        made.add_row(cell(found.dataset), classes, *cells, problems)
    console.print(made)
    for found in checks:
        for note in found.notes:
            say(f"{found.dataset}: {note}")
        for kind in dict.fromkeys(problem.kind for problem in found.problems):
            alike = [problem for problem in found.problems if problem.kind == kind]
            for problem in alike[:_SHOWN]:
                say(f"{found.dataset}: {problem.text}")
            if len(alike) > _SHOWN:
                say(f"{found.dataset}: … {len(alike) - _SHOWN:,} more like this; --json lists all")


def _share(found: int, wanted: int | None) -> str:
    return f"{found:,}" if wanted in (None, found) else f"{found:,} of {wanted:,}"
