"""``dapt data``: look at datasets and their support sets."""

from __future__ import annotations

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

_SHOWN = 10  # problems of a kind that are told one by one

data = Typer(no_args_is_help=True, help="Look at datasets and their support sets.")
common.app.add_typer(data, name="data")

_JsonOption = Annotated[bool, Option("--json", help="Print all of it, as JSON.")]


@command("support-set", data)
def support_set(
    dataset: Annotated[str, Argument(help="As for 'dapt train'.")],
    shots: Annotated[int, Option(min=1, help="Support images a class.")] = 16,
    seed: Annotated[int, Option(min=0, help="Of the draw.")] = 1,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    save: Annotated[Path | None, Option(help="Write it to a file for 'dapt train'.")] = None,
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
            name, path = printable(item.class_name), printable(item.path)
            echo(f"{part}\t{item.label}\t{name}\t{path}")


@command("list", data)
def list_datasets(as_json: _JsonOption = False) -> None:
    """List the datasets that are known by name: sizes, licences, and where to get them."""
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
    dataset: Annotated[str | None, Argument(help="If none, all benchmarks below --root.")] = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    quick: Annotated[bool, Option("--quick", help="Look for files alone, not into them.")] = False,
    decode: Annotated[bool, Option("--decode", help="Decode images, not just their ends.")] = False,
    as_json: _JsonOption = False,
) -> None:
    """Check a dataset's layout, counts and images; exit code 1 if anything is wrong."""
    from dapt.data import BENCHMARKS
    from dapt.data.check import check_dataset

    if quick and decode:
        raise UserError("--quick and --decode exclude each other; give one")
    if dataset is None and root is None:
        raise UserError("give a DATASET to check, or --root for all benchmarks below it")
    if dataset is None and (domain or class_names):
        raise UserError("--domain and --class-names go with one DATASET; give it")
    root = user_path(root) if root else None
    if root is not None and not root.is_dir():
        raise UserError(f"--root {root} does not exist; give the folder of the benchmarks")
    below = [n for n, row in BENCHMARKS.items() if root and (root / row.folder).is_dir()]
    chosen = [dataset] if dataset else below
    if not chosen:
        raise UserError(f"--root {root} holds no benchmark's folder; see 'dapt data list'")
    level, told = "listed" if quick else "decoded" if decode else "whole", RichReporter()
    place: dict[str, Any] = {"root": root, "domain": domain, "class_names": class_names}
    checks = [check_dataset(name, level=level, reporter=told, **place) for name in chosen]
    if as_json:
        echo(to_json([found.to_json() for found in checks]))
    else:
        _show_checks(checks)
        absent = ", ".join(n for n in BENCHMARKS if n not in chosen)
        if absent and dataset is None:
            say(f"not below --root: {absent}")
    if any(c.problems for c in checks):
        raise Exit(1)


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
        for kind in dict.fromkeys(problem.kind for problem in found.problems):
            alike = [problem for problem in found.problems if problem.kind == kind]
            for problem in alike[:_SHOWN]:
                say(f"{found.dataset}: {problem.text}")
            if len(alike) > _SHOWN:
                say(f"{found.dataset}: … {len(alike) - _SHOWN:,} more like this; --json lists all")


def _share(found: int, wanted: int | None) -> str:
    return f"{found:,}" if wanted in (None, found) else f"{found:,} of {wanted:,}"
