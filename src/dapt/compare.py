"""Methods side by side on one support set: a table, a picture and a sentence."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapt.data import Item, Task
from dapt.data.images import read_picture
from dapt.engine.data import Data, open_data
from dapt.engine.evaluate import logits_of
from dapt.engine.features import Shared, backbone_of
from dapt.engine.fit import require_method
from dapt.engine.forecast import wilson
from dapt.errors import UserError, readable
from dapt.methods import METHODS, ZERO_SHOT, get_method
from dapt.progress import Reporter, cell, console, say, table
from dapt.run.directory import RunDirectory
from dapt.run.load import load_classifier
from dapt.run.records import Metrics
from dapt.run.train import train
from dapt.safe.files import write_atomic
from dapt.settings import Settings, with_method

# What is compared if nothing else is asked for.
COMPARED = tuple(name for name, row in METHODS.items() if row.shown)
_HIGHEST, _OTHERS = "#c2410c", "#94a3b8"


def compare(
    settings: Settings,
    output: Path,
    methods: Sequence[str] | None = None,
    *,
    picture: str = "comparison.png",
    reporter: Reporter,
) -> list[RunDirectory]:
    """Train methods as the settings say, a run each below ``output``; print a table, draw bars.

    Runs that are already there, at the same settings, are kept; an unfinished one is continued.

    Args:
        methods: `COMPARED` if not given; of those, what the data or backbone takes none of is told
            and left out. One of another backbone or dataset is a `UserError`, as of `train`.
        picture: name of the PNG in ``output``.
    """
    for method in methods or ():
        get_method(method)
    data, shared = open_data(settings), Shared(backbone_of(settings))
    if not data.task.test:
        raise UserError(f"no image of '{data.task.name}' is there to test on; hold some out")
    runs = list[RunDirectory]()
    for method in methods or COMPARED:
        run = RunDirectory(output / method)
        try:
            require_method(data.task, method)
            one = with_method(settings, method)
            train(one, run.path, resume=True, shared=shared, data=data, reporter=reporter)
        except UserError as error:
            # The backbone's own zero-shot is refused for what would refuse all the others, too.
            if methods or run.exists or method == ZERO_SHOT:
                raise
            reporter.warn(f"{get_method(method).title} is left out: {error}")
            continue
        runs.append(run)
    results = [run.read_metrics() for run in runs]
    _tell(data.task, settings, runs, results)
    places = (_reference(results), _highest(results))
    mended = _mended(data, settings, [runs[i] for i in places], shared)
    write_atomic(output / picture, _drawn(data.task, results, mended))
    say(f"picture: {output / picture}")
    return runs


def _score(result: Metrics) -> float:
    """Accuracy on test images, or mean average precision where they have several labels."""
    if result.test is None:
        return 0.0
    return result.test.accuracy if result.test.map is None else result.test.map


def _title(result: Metrics) -> str:
    return get_method(result.method).title


def _highest(results: Sequence[Metrics]) -> int:
    """Place of the highest figure; of equals the last, which are later in the table of methods."""
    return max(range(len(results)), key=lambda i: (_score(results[i]), i))


def _reference(results: Sequence[Metrics]) -> int:
    """Place of what others are compared with: zero-shot, or the first."""
    return next((i for i, result in enumerate(results) if result.method == ZERO_SHOT), 0)


def _tell(
    task: Task, settings: Settings, runs: Sequence[RunDirectory], results: Sequence[Metrics]
) -> None:
    """A row a method, and what follows from them."""
    what = f"{len(task.class_names)} classes, {settings.shots} shots, seed {settings.seed}"
    learning = [run.read_settings() for run in runs if get_method(run.path.name).learns]
    passes = {one.epochs for one in learning if one.steps is None}
    what += f", {passes.pop()} epochs" if len(passes) == 1 else ""
    figure = "mAP" if task.multilabel else "accuracy"
    numbers = (figure, "learned parameters", "seconds")
    made = table("method", figures=numbers, title=f"{readable(task.name)}: {what}")
    for run, result in zip(runs, results, strict=True):
        seconds = run.read_environment().tuning_seconds or 0
        figures = (f"{_score(result):.1%}", f"{result.learned_parameters:,}", f"{seconds:.1f}")
        made.add_row(cell(_title(result)), *figures)
    console.print(made)
    place, first = _highest(results), results[_reference(results)]
    best, images = results[place], len(task.test)
    said = f"highest: {_title(best)}, {_score(best):.1%} {figure} on {images:,} test images"
    if best is not first:
        said += f", {100 * (_score(best) - _score(first)):.1f} points above {_title(first)}"
    if not task.multilabel:  # of each by itself; paired, fewer may be alike
        low = wilson(_score(best), images)[0]
        alike = [_title(one) for one in results if one is not best and _score(one) >= low]
        said += f" ({', '.join(alike)}: too close to tell apart by so few)" if alike else ""
    say(said)
    say(f"to use it: dapt predict {runs[place].path} IMAGES")


def _mended(
    data: Data, settings: Settings, pair: Sequence[RunDirectory], shared: Shared
) -> list[tuple[Item, int]]:
    """Test images that the second run names right and the first does not, with what it says."""
    task = data.task
    if task.multilabel or pair[0].path == pair[1].path:
        return []
    before, after = (_named(run, task, settings, shared) for run in pair)
    return [(item, before[item]) for item in before if after[item] == item.label != before[item]]


def _named(run: RunDirectory, task: Task, settings: Settings, shared: Shared) -> dict[Item, int]:
    """Label that a run gives each test image that can be read."""
    classifier = load_classifier(run, backbone=shared.backbone)
    # Those that cannot be read were told when the runs were evaluated.
    found = shared.encode(task, task.test, settings, classifier)
    labels = torch.cat(list(logits_of(classifier, found.features))).argmax(-1)
    return dict(zip(found.items, labels.tolist(), strict=True))


def _drawn(task: Task, results: Sequence[Metrics], mended: Sequence[tuple[Item, int]]) -> bytes:
    """Bars of accuracy, and ``mended`` test images, where there are some: PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if mended else 5, 4.6), layout="constrained")
    left, right = figure, None
    if mended:
        left, right = np.asarray(figure.subfigures(1, 2, width_ratios=(1, 1.5)))
    axes, highest = left.subplots(), _highest(results)
    titles, values = [_title(r) for r in results], [100 * _score(r) for r in results]
    colours = [_HIGHEST if i == highest else _OTHERS for i in range(len(results))]
    bars = axes.barh(titles[::-1], values[::-1], color=colours[::-1])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    what = "mean average precision" if task.multilabel else "accuracy"
    chance = "" if task.multilabel else " (dotted: chance)"
    if chance:
        axes.axvline(100 / len(task.class_names), color="black", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"{what} on test images, %{chance}", xlim=(0, max(*values, 1) * 1.15))
    axes.spines[["top", "right"]].set_visible(False)
    if right is not None:
        first = titles[_reference(results)]
        right.suptitle(f"named by {titles[highest]}, missed by {first}", fontsize=10)
        _show(right, task, mended)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, bbox_inches="tight")
    return content.getvalue()


def _show(figure: Any, task: Task, mended: Sequence[tuple[Item, int]]) -> None:
    """Images with their class, and what they were taken for; one a class, so that they vary."""
    shown = {item.label: (item, before) for item, before in reversed(mended)}
    places = figure.subplots(2, 6)
    for place, (item, before) in zip(places.flat, shown.values(), strict=False):
        place.imshow(read_picture(task.source(item), task.grey))
        place.set_title(readable(item.class_name), fontsize=8, color=_HIGHEST)
        place.set_xlabel(f"not: {readable(task.class_names[before])}", fontsize=7, color="#64748b")
    for place in places.flat:
        place.set(xticks=[], yticks=[])
        place.spines[:].set_visible(False)
