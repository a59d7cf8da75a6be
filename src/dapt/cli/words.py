"""What was learned, in words: ``dapt words``."""

from __future__ import annotations

from typing import Annotated

from typer import Option, echo

from dapt.cli import common
from dapt.cli.common import command
from dapt.progress import cell, console, table
from dapt.safe.files import to_json


@command("words")
def words(
    run: common.RunArgument,
    count: Annotated[int, Option("--count", "-n", min=1, help="Words to list per vector.")] = 5,
    as_json: Annotated[bool, Option("--json", help="Print words and distances as JSON.")] = False,
    device: common.RunDeviceOption = None,
) -> None:
    """Say which words the learned text vectors of a run are nearest to."""
    from dapt.engine.words import nearest_words
    from dapt.run.directory import RunDirectory
    from dapt.run.load import load_classifier

    found = nearest_words(load_classifier(RunDirectory(run), device=device), count)
    if as_json:
        echo(to_json([one._asdict() for one in found]))
        return
    made = table("vector", "nearest words (Euclidean distance)")
    for one in found:
        nearest = ", ".join(f"{word} {far:.2f}" for word, far in one.nearest)
        made.add_row(cell(f"{one.class_name} {one.vector}".strip()), cell(nearest))
    console.print(made)
