"""``dapt bench``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from dapt.cli.common import DeviceOption, app, readable_errors, say
from dapt.errors import UserError
from dapt.progress import RichReporter, cell, console


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

        dapt bench -b bundled -b ViT-B-32 --batch-size 8 --batch-size 32 --variants plain,fp32
    """
    with readable_errors():
        from open_clip import list_models

        from dapt.bench import read_class_names, run_bench
        from dapt.data import open_task
        from dapt.safe.files import write_json

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
        count = len(chosen) * len(names) * len(sizes) * len(columns)
        with RichReporter().stage("bench", (rounds + 1) * count) as advance:
            report = run_bench(
                backbones=chosen,
                class_names=names,
                batch_sizes=sizes,
                eval_batch_size=eval_batch_size,
                eval_images=eval_images,
                variants=columns,
                rounds=rounds,
                tasks=tasks,
                together=together,
                device=device or "auto",
                advance=advance,
            )
        if json_file:
            write_json(json_file, report)
        _show_bench(report)


def _show_bench(report: dict[str, Any]) -> None:
    """A table for each setting: a row a variant, with ratios to the first one."""
    from dapt.bench import SETTING

    for setting, rows in groupby(report["cases"], key=lambda row: [row[k] for k in SETTING]):
        backbone, names, batch_size = setting
        variants = list(rows)
        first = variants[0]
        table = Table(
            title=cell(f"{backbone}, {names} ({first['classes']:,} names), batch {batch_size}"),
            title_justify="left",
        )
        table.add_column("", no_wrap=True)
        for column in ("forw. s", "backw. s", "step s", "×", "share", "eval/s", "×", "peak GB"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in variants:
            if "error" in row:
                table.add_row(row["variant"], "failed")  # the reason stands below
                continue
            cells = [""] * 8
            if "step" in row:
                cells[:3] = [f"{row[part]:.3g}" for part in ("forward", "backward", "step")]
                cells[4] = f"{row['share_of_matmul_rate']:.0%}"
                if "step" in first:
                    cells[3] = f"{first['step'] / row['step']:.1f}"
            if speed := row.get("eval_images_per_second"):
                cells[5] = f"{speed:.3g}"
                if "eval_images_per_second" in first:
                    cells[6] = f"{speed / first['eval_images_per_second']:.1f}"
            if row["peak_bytes"]:
                cells[7] = f"{row['peak_bytes'] / 1e9:.1f}"
            table.add_row(row["variant"], *cells)
        console.print(table)
        for row in variants:
            if "error" in row:
                say(f"{row['variant']}: {row['error']}")
    _explain(report)


def _explain(report: dict[str, Any]) -> None:
    """What the columns mean, and the figures that belong to the whole run."""
    from dapt.bench import PLAIN

    done = [row for row in report["cases"] if "error" not in row]
    if any("step" in row for row in done):
        rates = {
            variant: median(r["matmul_flops_per_second"] for r in done if r["variant"] == variant)
            for variant in dict.fromkeys(r["variant"] for r in done)
        }
        told = (f"{variant} {rate / 1e9:,.0f}" for variant, rate in rates.items())
        say(
            "share: of the rate of matrix products in the same turns; operations that "
            "recomputation repeats do not count; Gflop/s on "
            f"{report['threads']} threads: {', '.join(told)}"
        )
    if any("eval_batch" in row for row in done):
        images, size = report["eval_images"], report["eval_batch_size"]
        say(
            f"eval/s: images a second in an evaluation of {images:,}, reckoned from the measured "
            f"seconds of class features (once; plain: in every batch) and of a batch of {size}"
        )
    worst: dict[str, float] = {}
    for row in done:
        if row["variant"] != PLAIN and "loss_difference" in row:
            worst[row["variant"]] = max(worst.get(row["variant"], 0.0), row["loss_difference"])
    if worst:
        parts = ", ".join(f"{variant} {value:.1e}" for variant, value in worst.items())
        say(f"loss of the same step, largest relative difference to plain: {parts}")
