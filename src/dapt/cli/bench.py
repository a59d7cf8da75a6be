"""``dapt bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dapt.cli.common import DeviceOption, app, readable_errors, say
from dapt.errors import UserError
from dapt.progress import RichReporter, console


@app.command()
def bench(
    backbone: Annotated[str, typer.Option("--backbone", "-b", help="As for 'dapt train'.")] = (
        "ViT-B-16"
    ),
    pretrained: Annotated[
        str | None, typer.Option(help="Weights of an open_clip model; by default random ones.")
    ] = None,
    class_names: Annotated[
        list[Path] | None,
        typer.Option(help="JSON list or text file of names; may be repeated. Default: bundled."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a training step.")] = 32,
    eval_batch_size: Annotated[int, typer.Option(min=1, help="Images an evaluation batch.")] = 100,
    variants: Annotated[str, typer.Option(help="Of plain, fp32, bf16, fp16.")] = "plain,fp32,bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Turns each case takes.")] = 3,
    no_train: Annotated[bool, typer.Option("--no-train", help="Time evaluation only.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Time training steps only.")] = False,
    device: DeviceOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to it.")] = (
        None
    ),
) -> None:
    """Time a training step and an evaluation, the plain way and ours, in one run.

    **Examples**

        dapt bench --class-names sun397.json --batch-size 16 --json bench.json

        dapt bench --class-names caltech101.json --class-names imagenet.json --variants bf16

        dapt bench -b bundled --variants plain,fp32 --rounds 10
    """
    with readable_errors():
        from open_clip import list_models

        from dapt.bench import read_class_names, run_bench
        from dapt.data import open_task
        from dapt.files import write_json

        if json_file and not json_file.parent.is_dir():
            raise UserError(f"--json {json_file}: its folder does not exist; make it first")
        tasks = [t for t, off in (("train", no_train), ("eval", no_eval)) if not off]
        if not tasks:
            raise UserError("--no-train and --no-eval leave nothing to time; give one of them")
        names = [read_class_names(file) for file in class_names or ()]
        names = names or [list(open_task("bundled").class_names)]
        chosen = [v.strip() for v in variants.split(",") if v.strip()]
        with RichReporter().stage("bench", (rounds + 1) * len(chosen) * len(names)) as advance:
            report = run_bench(
                backbone=backbone,
                # What the weights are does not change the time.
                pretrained=pretrained or ("random" if backbone in list_models() else None),
                class_names=names,
                batch_size=batch_size,
                eval_batch_size=eval_batch_size,
                variants=chosen,
                rounds=rounds,
                tasks=tasks,
                device=device or "auto",
                advance=advance,
            )
        if json_file:
            write_json(json_file, report)
        _show_bench(report)


def _show_bench(report: dict[str, Any]) -> None:
    """One row a case, with ratios to the first variant on the same names."""
    table = Table(
        title=f"{report['backbone']}, batch {report['batch_size']}, {report['threads']} threads",
        title_justify="left",
    )
    for column in ("classes", "", "forw. s", "backw. s", "step s", "×", "share", "eval/s", "×",
                   "peak GB"):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    firsts: dict[int, dict[str, Any]] = {}
    for row in report["cases"]:
        first = firsts.setdefault(row["classes"], row)
        cells = [""] * 5
        if "step" in row:
            cells = [
                *(f"{row[part]:.2f}" for part in ("forward", "backward", "step")),
                f"{first['step'] / row['step']:.1f}",
                f"{row['share_of_matmul_rate']:.0%}",
            ]
        speed = row.get("eval_images_per_second")
        if speed:
            cells += [f"{speed:.1f}", f"{speed / first['eval_images_per_second']:.1f}"]
        else:
            cells += ["", ""]
        table.add_row(
            f"{row['classes']:,}", row["variant"], *cells, f"{row['peak_bytes'] / 1e9:.1f}"
        )
    console.print(table)
    rates = {
        row["variant"]: f"{row['matmul_flops_per_second'] / 1e9:,.0f}" for row in report["cases"]
    }
    say(
        "eval/s: images a second in evaluation; share: of the rate of matrix products in the same "
        f"turns, Gflop/s: {', '.join(f'{v} {rate}' for v, rate in rates.items())}"
    )
