"""``dapt data``: look at datasets and their support sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dapt.cli.common import DomainOption, NamesOption, RootOption, app, readable_errors

data = typer.Typer(no_args_is_help=True, help="Look at datasets and their support sets.")
app.add_typer(data, name="data")


@data.command(name="support-set")
def support_set(
    dataset: Annotated[str, typer.Argument(help="As for 'dapt train'.")],
    shots: Annotated[int, typer.Option(min=1, help="Support images a class.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 1,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    save: Annotated[
        Path | None, typer.Option(help="Write it to a file that 'dapt train' can take.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Draw a support set exactly as the published protocol does, and print it.

    **Examples**

        dapt data support-set bundled --shots 4

        dapt data support-set caltech101 --root /data --shots 16 --seed 1 --json
    """
    with readable_errors():
        from dapt.data import draw_support_set, open_task

        task = open_task(dataset, root=root, domain=domain, class_names=class_names)
        drawn = draw_support_set(task, shots, seed)
        if save:
            drawn.save(save)
        if as_json:
            typer.echo(json.dumps(drawn.to_json(), ensure_ascii=False))
            return
        for part in ("train", "val"):
            for item in getattr(drawn, part):
                typer.echo(f"{part}\t{item.label}\t{item.class_name}\t{item.path}")
