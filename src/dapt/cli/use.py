"""What is done with a run: ``dapt eval``, ``dapt predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dapt.cli.common import (
    DeviceOption,
    DomainOption,
    NamesOption,
    RootOption,
    RunArgument,
    app,
    metrics_table,
    readable_errors,
)
from dapt.progress import RichReporter, console


@app.command(name="eval")
def evaluate(
    run: RunArgument,
    dataset: Annotated[str | None, typer.Option(help="Another dataset than the run's own.")] = None,
    root: RootOption = None,
    domain: DomainOption = None,
    class_names: NamesOption = None,
    classes: Annotated[
        str | None, typer.Option(help="base (first half by label), new (the rest) or all.")
    ] = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics as JSON.")] = False,
) -> None:
    """Evaluate a run's prompts: on its own test images, another domain, or another dataset.

    **Examples**

        dapt eval runs/first

        dapt eval runs/first --domain high-contrast

        dapt eval runs/caltech --dataset oxford_pets --root /data
    """
    with readable_errors():
        from dapt.runs import RunDirectory
        from dapt.settings import absolute_paths
        from dapt.transfer import Target, evaluate_run

        target = {
            "dataset": dataset,
            "root": root and str(root),
            "domain": domain,
            "class_names": class_names and str(class_names),
            "classes": classes,
        }
        name, result = evaluate_run(
            RunDirectory(run),
            Target(**absolute_paths(target)),
            device=device,
            reporter=RichReporter(),
        )
        if as_json:
            typer.echo(json.dumps(result, ensure_ascii=False))
        else:
            console.print(metrics_table(f"{name}, prompts of {run}", result))


@app.command()
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    device: DeviceOption = None,
) -> None:
    """Classify images with a run's prompts.

    **Examples**

        dapt predict runs/photos new/*.jpg

        dapt predict runs/photos new/ --top 3 --json
    """
    with readable_errors():
        from dapt.predict import find_images
        from dapt.predict import predict as run_prediction
        from dapt.runs import RunDirectory
        from dapt.train import load_classifier

        paths = find_images(images)
        classifier = load_classifier(RunDirectory(run), device=device)
        with RichReporter().stage("predicting", len(paths)) as advance:
            found = run_prediction(classifier, paths, top=top, advance=advance)
        for prediction in found:
            if as_json:
                ranked = [{"class": c, "probability": p} for c, p in prediction.classes]
                line = {"path": str(prediction.path), "classes": ranked}
                typer.echo(json.dumps(line, ensure_ascii=False))
            else:
                ranked_text = ", ".join(f"{c} {p:.1%}" for c, p in prediction.classes)
                typer.echo(f"{prediction.path}: {ranked_text}")
