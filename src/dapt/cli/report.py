"""``dapt report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dapt.cli.common import app, readable_errors, say, say_error
from dapt.progress import RichReporter


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories, or folders with runs at any depth.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path(
        "report.html"
    ),
    baseline: Annotated[
        str | None,
        typer.Option(help="Method that differences are to; by default zero-shot or the first."),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features",
            help="Load the backbones too: feature maps, reliability diagrams, misnamed images.",
        ),
    ] = False,
) -> None:
    """Tables and figures of any set of runs, on one HTML page that needs nothing else.

    Beside the page, a folder has every table as Markdown, CSV and LaTeX and every figure as SVG
    and PNG. Only runs' files are read, so a hundred runs take seconds; with --features their
    backbones are loaded and test images looked at again.

    **Examples**

        dapt report runs/ --out report.html

        dapt report runs/grid runs/more --baseline coop

        dapt report runs/photos --features
    """
    with readable_errors():
        from dapt.report import write_report

        written = write_report(
            runs, out, baseline=baseline, features=features, reporter=RichReporter()
        )
        for warning in written.warnings:
            say_error(f"warning: {warning}")
        unfinished = f", {written.unfinished} of them unfinished" if written.unfinished else ""
        failed = f", {written.failed} failed" if written.failed else ""
        say(f"{written.runs} runs{unfinished}{failed}: {written.page}")
        say(f"tables and figures: {written.folder}")
