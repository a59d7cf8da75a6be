"""Methods side by side: ``dapt compare`` on any dataset, ``dapt demo`` on the bundled one."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from dapt.cli import common
from dapt.cli.common import command, given_settings, listed, readable_errors
from dapt.data.there import BUNDLED, require_dataset
from dapt.progress import RichReporter

# A small part of the published schedule: enough to show what tuning does within minutes.
DEMO_EPOCHS = 30


@command("compare")
def compare(
    context: Context,
    dataset: Annotated[str, Argument(help="As for 'dapt train'.")],
    output: Annotated[Path, Option("--output", "-o", help="Results folder.")] = Path("comparison"),
    methods: Annotated[
        str | None, Option(help="Methods to compare: a,b.", show_default="seven, zero-shot to auto")
    ] = None,
    shots: common.ShotsOption = None,
    seed: common.SeedOption = None,
    root: common.RootOption = None,
    domain: common.DomainOption = None,
    class_names: common.NamesOption = None,
    backbone: Annotated[
        list[str] | None,
        Option("--backbone", "-b", help=common.BACKBONES, show_default="as dapt train"),
    ] = None,
    pretrained: common.PretrainedOption = None,
    precision: common.PrecisionOption = None,
    device: common.DeviceOption = None,
    epochs: common.EpochsOption = None,
    settings: common.SetOption = None,
    strict: common.StrictOption = False,
) -> None:
    """Train several methods on the same few images, and compare them side by side."""
    require_dataset(dataset)
    given = given_settings(context, assignments=settings)
    again = f"dapt compare {shlex.quote(dataset)} --output {shlex.quote(str(output))} ..."
    _compare(given, output, listed(context, "methods"), f"{again} (the same command)")


@command("demo")
def demo(
    output: Annotated[Path, Option("--output", "-o", help="Results folder.")] = Path("demo"),
    epochs: Annotated[int, Option(min=1, help="Passes over the support set.")] = DEMO_EPOCHS,
    seed: Annotated[int, Option(min=0, help="Seed of support set, prompts and order.")] = 1,
) -> None:
    """Compare zero-shot, a linear probe, prompts and the automatic head on the bundled task."""
    given = {"dataset": BUNDLED, "epochs": epochs, "seed": seed}
    again = f"dapt demo --output {shlex.quote(str(output))}"
    _compare(given, output, None, again, picture="demo.png")


def _compare(
    given: dict[str, Any], output: Path, methods: list[str] | None, again: str, **how: str
) -> None:
    from dapt import compare
    from dapt.engine.data import by_images
    from dapt.engine.fit import Interrupted
    from dapt.settings import make_settings

    with readable_errors(output, again, Interrupted):
        settings = by_images(make_settings(given), given)
        compare.compare(settings, output, methods, reporter=RichReporter(), **how)
