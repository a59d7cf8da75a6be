"""What only the backbone and the images can tell: feature maps, confidences, example images.

For each dataset and method one run stands for all: the one with the most shots and, of these, the
lowest seed. Whatever cannot be had (backbone, dataset, image) becomes a note; the rest goes on.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.progress import Reporter
from dapt.report.collect import Confusion, Damaged, Run, clean, read_confusion
from dapt.report.figures import (
    CLASS_COLOURS,
    Drawing,
    Entry,
    data_uri,
    feature_map,
    method_colour,
    reliability,
)
from dapt.report.study import Study, method_title

# Looked at, evenly spaced among the test images where there are more; figures are the run's own.
MOST_IMAGES = 2000
MAP_IMAGES = 400  # of the coloured classes
EXAMPLE_CLASSES, EXAMPLES, THUMBNAIL = 6, 5, 84
CLASS_IMAGES = 300  # looked at of a class to find its examples


@dataclass(frozen=True)
class Example:
    """A misnamed test image as a data URI, what it was taken for and how sure that was."""

    source: str
    named: str
    confidence: float


@dataclass(frozen=True)
class HardClass:
    """A class, the share of its images that were named right, and some that were not."""

    name: str
    accuracy: float
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class MapPair:
    """Features before and after tuning, embedded by one fit, and so comparable."""

    before: Drawing
    after: Drawing
    legend: list[Entry]


@dataclass
class Inside:
    """One representative run, looked into."""

    run: Run
    maps: list[MapPair] = field(default_factory=list)
    reliability: Drawing | None = None
    hardest: list[HardClass] = field(default_factory=list)


def look_inside(
    study: Study, datasets: Sequence[str], featured: dict[str, Run], reporter: Reporter
) -> tuple[list[Inside], list[str]]:
    """Load each representative run's classifier and look at features and predictions.

    Args:
        study: whose runs.
        datasets: which of its datasets.
        featured: dataset -> the run whose mistakes are shown.
        reporter: is told the progress.

    Returns:
        What was found, and notes on what was not.
    """
    runs = [
        run
        for dataset in datasets
        for method in study.methods
        if (run := study.representative(dataset, method)) is not None
    ]
    notes: dict[str, None] = {}
    found: list[Inside] = []
    backbones: dict[tuple[Any, ...], Any] = {}
    with reporter.stage("looking into runs", len(runs)) as advance:
        for run in runs:
            inside = Inside(run)
            examples = featured.get(run.dataset) == run
            try:
                for note in _look(inside, study, backbones, examples=examples):
                    notes[note] = None
            except Exception as error:  # a damaged run must not cost the whole report
                notes[f"{run.dataset}, {method_title(run.method)}: {clean(error, 400)}"] = None
            found.append(inside)
            advance(1)
    return found, list(notes)


def _look(
    inside: Inside, study: Study, backbones: dict[tuple[Any, ...], Any], *, examples: bool
) -> Iterator[str]:
    """Fill ``inside``; yields notes on what is missing."""
    import torch

    from dapt.engine.classifier import PromptedClassifier
    from dapt.engine.evaluate import ECE_BINS, encode_store
    from dapt.engine.features import Shared, backbone_of, skip_unreadable
    from dapt.methods.prompts import Prompts
    from dapt.run.directory import RunDirectory
    from dapt.run.train import known_support, load_classifier, task_of

    run = inside.run
    directory = RunDirectory(run.path)
    settings = directory.read_settings()
    which = (settings.backbone, settings.pretrained, settings.device, settings.precision)
    if which not in backbones:
        try:
            backbones[which] = Shared(backbone_of(settings))
        except UserError as error:
            backbones[which] = error
    if isinstance(shared := backbones[which], UserError):
        raise shared
    backbone = shared.backbone
    classifier = load_classifier(directory, backbone=backbone)
    names = classifier.class_names
    _, _, template = directory.read_task()
    with torch.inference_mode():
        text = classifier.text_features().cpu()
    prefix = re.sub(r"[^a-z0-9]+", "-", f"{run.dataset}-{run.method}-{run.number}".lower())
    title = method_title(run.method)
    who = f"{title} on {run.dataset}, run {run.number}"
    method = METHODS[settings.method]

    try:
        task = task_of(settings)
        if task.class_names != names:
            raise UserError("its classes are no longer those that the run was tuned on")
        if examples:
            try:
                known_support(directory, task)
            except UserError as error:
                yield f"{run.dataset}: no examples ({clean(error, 400)})"
                examples = False
        step = -(-len(task.test) // MOST_IMAGES)
        spaced = range(0, len(task.test), step)
        confusion = _confusion(run, names) if examples else None
        hard = confusion.hardest()[:EXAMPLE_CLASSES] if confusion else []
        wanted = sorted({*spaced, *_of_classes(task.test, hard)})
        items, unreadable = tuple(task.test[i] for i in wanted), dict[int, str]()
        if classifier.prompts_images:
            store = shared.store(task, items, settings)
            size = settings.eval_batch_size
            image = encode_store(
                classifier.image_features, store, batch_size=size, unreadable=unreadable
            )
        else:
            image = shared.features(task, items, settings, unreadable=unreadable)
        kept, _ = skip_unreadable(items, unreadable, "test", Reporter())
        items, image = tuple(items[i] for i in kept), image[kept]
        # Where classes were added for their examples, the rest stays evenly spaced.
        even = np.array([wanted[i] % step == 0 for i in kept], bool)
    except (UserError, OSError) as error:
        yield f"{run.dataset}: no images to look at ({clean(error, 400)})"
        items, labels = (), np.zeros(0, int)
        coloured = list(range(min(len(names), CLASS_COLOURS)))
    else:
        labels = np.array([item.label for item in items])
        counts = np.bincount(labels[even], minlength=len(names))
        largest = np.argsort(-counts, kind="stable")[:CLASS_COLOURS]
        coloured = sorted(int(c) for c in largest if counts[c])

    legend = [Entry(f"class-{i}", _name(names[c])) for i, c in enumerate(coloured)]
    colour_of: dict[int, str] = {c: f"class-{i}" for i, c in enumerate(coloured)}
    if method.text:
        plain = PromptedClassifier(backbone, names, Prompts(), settings.template or template)
        with torch.inference_mode():
            before = plain.text_features().cpu().numpy()
        inside.maps += _maps(
            f"map-text-{prefix}",
            f"Text features, {who}",
            f"{title}, {len(names):,} class names",
            before,
            text.numpy(),
            [colour_of.get(c) for c in range(len(names))],
            legend,
        )
    if not len(items):
        return
    with torch.inference_mode():
        place = backbone.device
        logits = classifier.logits(image.to(place), text.to(place)).cpu()
    probabilities = logits.double().softmax(-1).numpy()
    confidence, named = probabilities.max(-1), probabilities.argmax(-1)
    correct = named == labels
    total = len(task.test)
    shown = (
        f"{even.sum():,} images" if even.sum() == total else f"{even.sum():,} of {total:,} images"
    )
    if step == 1 and run.scores and abs(correct.mean() - run.scores.accuracy) > 0.5 / len(labels):
        yield (
            f"{run.dataset}, {title}: run {run.number} recorded an accuracy of "
            f"{run.scores.accuracy:.1%} and now has {correct.mean():.1%}; its test images, or the "
            "versions it ran with, are not those of then"
        )
    inside.reliability = reliability(
        f"reliability-{prefix}",
        f"Reliability of {who}",
        method_colour(run.method, study.methods),
        confidence[even],
        correct[even],
        ECE_BINS,
        f"{title}, {shown}",
    )
    if method.visual:
        chosen = np.flatnonzero(even & np.isin(labels, coloured))
        chosen = chosen[:: max(1, -(-len(chosen) // MAP_IMAGES))]
        before = shared.features(task, tuple(items[i] for i in chosen), settings).numpy()
        inside.maps += _maps(
            f"map-image-{prefix}",
            f"Image features, {who}",
            f"{title}, {len(chosen):,} images",
            before,
            image.numpy()[chosen],
            [colour_of[int(labels[i])] for i in chosen],
            legend,
        )
    if confusion is not None:
        inside.hardest = _examples(task, items, names, hard, confusion, labels, named, confidence)


def _maps(
    name: str,
    title: str,
    caption: str,
    before: np.ndarray,
    after: np.ndarray,
    colours: list[str | None],
    legend: list[Entry],
) -> list[MapPair]:
    """Both sets of features (n, D) by one t-SNE; none for fewer than three points."""
    from sklearn.manifold import TSNE

    count = len(before)
    if count < 3:
        return []
    both = np.concatenate([before, after]).astype(np.float64)
    embedded = TSNE(
        perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0, metric="cosine"
    ).fit_transform(both)
    limits = np.stack([embedded.min(0), embedded.max(0)])
    parts = {"before": embedded[:count], "after": embedded[count:]}
    drawings = {
        time: feature_map(
            f"{name}-{time}",
            f"{title}, {time} tuning",
            points,
            limits,
            colours,
            legend,
            f"{caption}, {time}",
        )
        for time, points in parts.items()
    }
    return [MapPair(drawings["before"], drawings["after"], legend)]


def _confusion(run: Run, names: Sequence[str]) -> Confusion | None:
    """The run's own, which says which classes are hard; None where it cannot be had."""
    try:
        found = read_confusion(run)
    except Damaged:
        return None  # the section on mistakes tells
    return found if len(found.class_names) == len(names) else None


def _of_classes(items: Sequence[Any], classes: Sequence[int]) -> list[int]:
    """Places of images of some classes, at most `CLASS_IMAGES` of each."""
    left = dict.fromkeys(classes, CLASS_IMAGES)
    places = []
    for i, item in enumerate(items):
        if left.get(item.label):
            left[item.label] -= 1
            places.append(i)
    return places


def _examples(
    task: Any,
    items: Sequence[Any],
    names: Sequence[str],
    hard: Sequence[int],
    confusion: Confusion,
    labels: np.ndarray,
    named: np.ndarray,
    confidence: np.ndarray,
) -> list[HardClass]:
    """The hardest classes, and their most confidently misnamed images."""
    hardest, root = [], task.root.resolve()
    for label in hard:
        wrong = np.flatnonzero((labels == label) & (named != label))
        worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:EXAMPLES]
        # What a link in someone's dataset leads to is not his to show.
        own = [i for i in worst if task.image_path(items[i]).resolve().is_relative_to(root)]
        examples = tuple(
            Example(
                _thumbnail(task.image_path(items[i])),
                _name(names[int(named[i])]),
                float(confidence[i]),
            )
            for i in own
        )
        accuracy = float(confusion.right[label] / confusion.images[label])
        hardest.append(HardClass(_name(names[label]), accuracy, examples))
    return hardest


def _thumbnail(path: Any) -> str:
    """A small copy of an image, which carries nothing of the original file but its pixels."""
    from PIL import Image

    from dapt.data import open_image

    image = open_image(path).convert("RGB")
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return data_uri(file.getvalue(), "webp")


def _name(class_name: str) -> str:
    return clean(class_name.replace("_", " "), 60)
