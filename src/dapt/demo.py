"""The bundled task in one go: every method on the same support set, a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapt.clip.sources import load_backbone
from dapt.data import Item, Task, open_image
from dapt.engine.data import open_data
from dapt.engine.evaluate import classify
from dapt.engine.features import Shared
from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.progress import Reporter, console, say, table
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.records import Metrics
from dapt.run.train import train
from dapt.safe.files import write_atomic
from dapt.settings import make_settings

DEMO_METHODS = tuple(name for name, row in METHODS.items() if row.shown)
# A small part of the published schedule: enough to show what tuning does within minutes.
DEMO_EPOCHS = 30


def run_demo(
    output: Path, *, epochs: int | None = None, seed: int = 1, reporter: Reporter
) -> list[RunDirectory]:
    """Run `DEMO_METHODS` on the bundled task under ``output``, print a table, draw a picture.

    Runs that are already there, at the same settings, are kept; an unfinished one is continued.
    """
    base = make_settings({"dataset": "bundled", "epochs": epochs or DEMO_EPOCHS, "seed": seed})
    data, shared = open_data(base), Shared(load_backbone())
    runs = []
    for method in DEMO_METHODS:
        settings, run = base.model_copy(update={"method": method}), RunDirectory(output / method)
        if run.exists and run.read_settings() != settings:
            raise UserError(f"{run.path} holds a run with other settings; choose another --output")
        train(settings, run.path, resume=True, shared=shared, data=data, reporter=reporter)
        runs.append(run)

    results, task = [run.read_metrics() for run in runs], data.task
    what = f"{len(task.class_names)} classes, {base.shots} shots, seed {seed}, {base.epochs} epochs"
    numbers = ("accuracy", "learned parameters", "seconds")
    compared = table("method", figures=numbers, title=f"{task.name}: {what}")
    for run, result in zip(runs, results, strict=True):
        seconds = run.read_environment().tuning_seconds or 0
        figures = (f"{_accuracy(result):.1%}", f"{result.learned_parameters:,}")
        compared.add_row(METHODS[result.method].title, *figures, f"{seconds:.1f}")
    console.print(compared)

    store = shared.store(task, task.test, base)
    classifiers = [load_classifier(runs[i], backbone=shared.backbone) for i in (0, -1)]
    first, last = (classify(c, store).argmax(-1).tolist() for c in classifiers)
    named = zip(task.test, first, last, strict=True)
    mended = [(item, before) for item, before, after in named if after == item.label != before]
    write_atomic(output / "demo.png", _drawn(task, results, mended))
    say(f"picture: {output / 'demo.png'}")
    return runs


def _accuracy(result: Metrics) -> float:
    """On test images, which the bundled task has."""
    return result.test.accuracy if result.test else 0.0


def _drawn(task: Task, results: Sequence[Metrics], mended: Sequence[tuple[Item, int]]) -> bytes:
    """Bars of accuracy, and test images that the last method names and the first does not: PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.5)))
    axes = left.subplots()
    titles = [METHODS[r.method].title for r in results]
    values = [100 * _accuracy(r) for r in results][::-1]
    bars = axes.barh(titles[::-1], values, color=["#c2410c", *["#94a3b8"] * (len(values) - 1)])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(100 / len(task.class_names), color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel="accuracy on test images, % (dotted: chance)", xlim=(0, max(values) * 1.15))
    axes.spines[["top", "right"]].set_visible(False)
    right.suptitle(f"named by {titles[-1]}, missed without tuning", fontsize=10)
    # One image a class at most, so that the picture shows variety.
    shown = {item.label: (item, before) for item, before in reversed(mended)}
    for place, (item, before) in zip(right.subplots(2, 6).flat, shown.values(), strict=False):
        place.imshow(open_image(task.image_path(item)))
        wrong = task.class_names[before].replace("_", " ")
        place.set_title(item.class_name.replace("_", " "), fontsize=8, color="#c2410c")
        place.set_xlabel(f"not: {wrong}", fontsize=7, color="#64748b")
    for place in right.get_axes():
        place.set(xticks=[], yticks=[])
        place.spines[:].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, bbox_inches="tight")
    return content.getvalue()
