"""The command: what to time, and the table of what came of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from dapt.cli.common import DeviceOption, readable_errors, say
from dapt.errors import UserError
from dapt.progress import RichReporter, cell, console
from dapt.safe.files import parse_json, read_text, write_json

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command()
def bench(
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbone", "-b", help="As for 'dapt train'; may be repeated."),
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Weights of an open_clip model; by default random ones.")
    ] = None,
    class_names: Annotated[
        list[Path] | None,
        typer.Option(help="JSON list or text file of names; may be repeated. Default: bundled."),
    ] = None,
    batch_sizes: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Images a training step; may be repeated."),
    ] = None,
    eval_batch_size: Annotated[int, typer.Option(min=1, help="Images an evaluation batch.")] = 100,
    eval_images: Annotated[
        int,
        typer.Option(min=1, help="Images an evaluation; the default is Caltech-101's test set."),
    ] = 2465,
    variants: Annotated[str, typer.Option(help="Of plain, fp32, bf16, fp16.")] = "plain,fp32,bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns each case takes.")] = 3,
    together: Annotated[
        bool,
        typer.Option(
            "--together",
            help="All cases take turns, so that lists, too, compare; all stay in memory.",
        ),
    ] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Time evaluation only.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Time training steps only.")] = False,
    device: DeviceOption = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Of rows of the table, or all: a table of what each costs."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to it.")] = (
        None
    ),
) -> None:
    """Time a training step and an evaluation, the plain way and ours, in one run.

    The variants on one backbone, list of names and batch size take turns; --together lets all do.
    One that fails, for want of memory say, is a row of the table, and the others go on.

    **Examples**

        dapt bench --class-names sun397.json --batch-size 16 --json bench.json

        dapt bench --class-names a.json --class-names b.json --variants bf16 --together

        dapt bench --methods all -b bundled --batch-size 4 --json costs.json

        dapt bench -b bundled -b ViT-B-32 --batch-size 8 --batch-size 32 --variants plain,fp32
    """
    with readable_errors():
        from open_clip import list_models

        from benchmarks.bench import run_bench
        from dapt.data import open_task

        if json_file and not json_file.parent.is_dir():
            raise UserError(f"--json {json_file}: its folder does not exist; make it first")
        tasks = [t for t, off in (("train", no_train), ("eval", no_eval)) if not off]
        if not tasks:
            raise UserError("--no-train and --no-eval leave nothing to time; give one of them")
        files = class_names or []
        stems = [file.stem for file in files]
        names = {
            file.stem if stems.count(file.stem) == 1 else str(file): read_class_names(file)
            for file in files
        } or {"bundled": list(open_task("bundled").class_names)}
        # What the weights are does not change the time.
        known = list_models()
        chosen = {
            name: pretrained or ("random" if name in known else None)
            for name in backbones or ["ViT-B-16"]
        }
        sizes = list(dict.fromkeys(batch_sizes or [32]))
        columns = list(dict.fromkeys(v.strip() for v in variants.split(",") if v.strip()))
        what: dict[str, Any] = {
            "backbones": chosen, "class_names": names, "batch_sizes": sizes,
            "eval_batch_size": eval_batch_size, "eval_images": eval_images, "variants": columns,
            "rounds": rounds, "tasks": tasks, "together": together, "device": device or "auto",
        }  # fmt: skip
        if methods is not None:
            from benchmarks.costs import bench_methods, show_costs

            show_costs(bench_methods(methods, json_file, what))
            return
        count = len(chosen) * len(names) * len(sizes) * len(columns)
        with RichReporter().stage("bench", (rounds + 1) * count) as advance:
            report = run_bench(**what, advance=advance)
        if json_file:
            write_json(json_file, report)
        _show(report["cases"])
        _explain(report)


def read_class_names(path: Path) -> list[str]:
    """Class names from a JSON list, or from a text file, one a line.

    Raises:
        UserError: the file cannot be read or names no class.
    """
    try:
        text = read_text(path)
        value = parse_json(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"class names file {path} cannot be read ({error})") from error
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
        raise UserError(f"class names file {path} must hold a list of names")
    names = [n.strip() for n in value if n.strip()]
    if not names:
        raise UserError(f"class names file {path} names no class")
    return names


_SPEED = "eval_images_per_second"
# Headings, and what stands below them: from a variant's row, and from the first one of its setting.
_COLUMNS: list[tuple[str, Callable[[dict[str, Any], dict[str, Any]], str]]] = [
    ("forw. s", lambda row, _: f"{row['forward']:.3g}"),
    ("backw. s", lambda row, _: f"{row['backward']:.3g}"),
    ("step s", lambda row, _: f"{row['step']:.3g}"),
    ("×", lambda row, first: f"{first['step'] / row['step']:.1f}"),
    ("share", lambda row, _: f"{row['share_of_matmul_rate']:.0%}"),
    ("eval/s", lambda row, _: f"{row[_SPEED]:.3g}"),
    ("×", lambda row, first: f"{row[_SPEED] / first[_SPEED]:.1f}"),
    ("peak GB", lambda row, _: f"{row['peak_bytes'] / 1e9:.1f}"),
]


def _show(cases: list[dict[str, Any]]) -> None:
    """A table for each setting: a row a variant, with ratios to the first one."""
    from benchmarks.bench import SETTING

    for (backbone, names, batch_size, _), rows in groupby(cases, lambda c: [c[k] for k in SETTING]):
        first, *others = rows
        title = f"{backbone}, {names} ({first['classes']:,} names), batch {batch_size}"
        table = Table(title=cell(title), title_justify="left")
        table.add_column("", no_wrap=True)
        for heading, _ in _COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in (first, *others):
            cells = ["failed"]  # the reason stands below
            if "error" not in row:
                cells = [_cell(form, row, first) for _, form in _COLUMNS]
            table.add_row(row["variant"], *cells)
        console.print(table)
        for row in (first, *others):
            if "error" in row:
                say(f"{row['variant']}: {row['error']}")


def _cell(form: Callable[..., str], *rows: dict[str, Any]) -> str:
    """Empty where what it shows was not measured, or not of the first variant."""
    with suppress(KeyError, TypeError):
        return form(*rows)
    return ""


def _explain(report: dict[str, Any]) -> None:
    """What the columns mean, and the figures that belong to the whole run."""
    from benchmarks.bench import PLAIN

    done = [row for row in report["cases"] if "error" not in row]

    if any("step" in row for row in done):
        rates = _told(done, "matmul_flops_per_second", lambda v: f"{median(v) / 1e9:,.0f}")
        say(
            "share: of the rate of matrix products in the same turns; operations that "
            f"recomputation repeats do not count; Gflop/s on {report['threads']} threads: {rates}"
        )
    if any("eval_batch" in row for row in done):
        images, size = report["eval_images"], report["eval_batch_size"]
        say(
            f"eval/s: images a second in an evaluation of {images:,}, reckoned from the measured "
            f"seconds of class features (once; plain: in every batch) and of a batch of {size}"
        )
    ours = [row for row in done if row["variant"] != PLAIN]
    if worst := _told(ours, "loss_difference", lambda v: f"{max(v):.1e}"):
        say(f"loss of the same step, largest relative difference to plain: {worst}")


def _told(rows: Iterable[dict[str, Any]], figure: str, form: Callable[[list[float]], str]) -> str:
    """Each variant with one number made of what its rows have of a figure."""
    found = defaultdict(list)
    for row in rows:
        if figure in row:
            found[row["variant"]].append(row[figure])
    return ", ".join(f"{variant} {form(values)}" for variant, values in found.items())
