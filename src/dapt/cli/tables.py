"""What there is to choose from: ``dapt methods``, ``dapt settings``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from dapt.cli.common import app
from dapt.progress import cell, console


@app.command()
def methods() -> None:
    """List the methods: what each learns, and by which loss terms."""
    from dapt.methods import METHODS

    table = Table("name", "method", "text prompt", "visual prompt", "loss terms")
    for name, row in METHODS.items():
        learns = ["learned" if row.text else "words", "learned" if row.visual else "–"]
        if row.probe:
            learns = ["–", "–"]
        table.add_row(name, row.title, *learns, ", ".join(row.terms) or "–")
    console.print(table)


@app.command(name="settings")
def list_settings(
    dataset: Annotated[str, typer.Argument(help="Show the settings published for it.")] = "bundled",
    shots: Annotated[int, typer.Option(min=1, help="Support images a class.")] = 16,
) -> None:
    """List every setting with its default for a dataset, and what it means."""
    from dapt.settings import Settings, default_settings

    defaults = default_settings({"dataset": dataset, "shots": shots})
    given = {"dataset": dataset, "shots": shots}
    table = Table("setting", "default", "meaning")
    for name, field in Settings.model_fields.items():
        value = given.get(name, defaults.get(name, field.default))
        table.add_row(name, "" if value is None else cell(str(value)), field.description or "")
    console.print(table)
