"""What only the backbone and the images can tell: feature maps, confidences, example images.

For each dataset and method one run stands for all: the one with the most shots and, of these, the
lowest seed. Whatever cannot be had (backbone, dataset, image) becomes a note; the rest goes on.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dapt.data import open_image
from dapt.engine.classifier import Classifier
from dapt.engine.data import task_of
from dapt.engine.evaluate import ECE_BINS, logits_of
from dapt.engine.features import Shared, backbone_of
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.report import figures
from dapt.report.collect import Run, clean, read_confusion
from dapt.report.rows import method_title, prompts
from dapt.report.study import Study
from dapt.report.tables import Named
from dapt.run.directory import RunDirectory
from dapt.run.load import known_support, load_classifier

# Looked at, evenly spaced among the test images where there are more; figures are the run's own.
MOST_IMAGES = 2000
MAP_IMAGES = 400  # of the coloured classes
EXAMPLE_CLASSES, EXAMPLES, THUMBNAIL = 6, 5, 84
CLASS_IMAGES = 300  # looked at of a class to find its examples


# Name, share of the images that were named right, and some that were not: data URI, what it was
# taken for and how sure that was.
HardClass = tuple[str, float, list[tuple[str, str, float]]]


@dataclass
class Inside:
    """One representative run, looked into.

    Drawings are "pairs" of feature maps before and after tuning, to which the legend belongs, each
    two embedded by one fit and so comparable; and a "small" diagram of reliability.
    """

    run: Run
    drawings: dict[str, list[figures.Drawing]] = field(
        default_factory=lambda: {"pairs": [], "small": []}
    )
    legend: list[figures.Entry] = field(default_factory=list)
    hardest: list[HardClass] = field(default_factory=list)


def look_inside(
    study: Study, datasets: Iterable[str], featured: Sequence[Run], reporter: Reporter
) -> tuple[list[Inside], list[str]]:
    """Load each representative run's classifier and look at features and predictions.

    Of ``featured`` runs, whose mistakes are shown, misnamed images are examples of them.

    Returns:
        What was found, and notes on what was not.
    """
    runs = [run for d in datasets for m in study.methods for run in study.main_runs(d, m)[:1]]
    notes: dict[str, None] = {}
    found: list[Inside] = []
    backbones: dict[object, Shared | UserError] = {}
    with reporter.stage("looking into runs", len(runs)) as advance:
        for run in runs:
            found.append(Inside(run))
            colour = figures.method_colour(run.method, study.methods)
            try:
                look = _Look(found[-1], backbones)
                for note in look.all(colour, examples=run in featured):
                    notes[note] = None
            except Exception as error:  # a damaged run must not cost the whole report
                notes[f"{run.dataset}, {method_title(run.method)}: {clean(error, 400)}"] = None
            advance(1)
    return found, list(notes)


class _Look:
    """A run's classifier, and what it finds, to fill ``inside``.

    ``backbones`` are those that are loaded already, or why they cannot be.
    """

    def __init__(self, inside: Inside, backbones: dict[object, Shared | UserError]) -> None:
        self.inside, self.run = inside, inside.run
        self.title = method_title(self.run.method)
        self.directory = RunDirectory(self.run.path)
        self.settings = s = self.directory.read_settings()
        which = (s.backbone, s.pretrained, s.device, s.precision)
        try:
            shared = backbones.get(which) or Shared(backbone_of(s))
        except UserError as error:
            shared = error
        backbones[which] = shared
        if isinstance(shared, UserError):
            raise shared
        self.shared = shared
        self.classifier = load_classifier(self.directory, backbone=shared.backbone)
        self.names = self.classifier.class_names

    def all(self, colour: str, *, examples: bool) -> Iterator[str]:
        """Everything, diagrams in ``colour``; yields notes on what is missing."""
        there = True
        try:
            yield from self.see(examples=examples)
            counts = np.bincount(self.labels[self.even], minlength=len(self.names))
        except (UserError, OSError) as error:
            yield f"{self.run.dataset}: no images to look at ({clean(error, 400)})"
            there, counts = False, np.ones(len(self.names), int)
        largest = np.argsort(-counts, kind="stable")[: figures.CLASS_COLOURS]
        coloured = sorted(int(c) for c in largest if counts[c])
        colours = {c: f"class-{i}" for i, c in enumerate(coloured)}
        self.inside.legend = [
            figures.Entry(name, _name(self.names[c])) for c, name in colours.items()
        ]
        if "text" in prompts(self.run.method):
            template = self.classifier.template
            plain = Classifier(self.shared.backbone, self.names, template=template)
            with torch.inference_mode():
                before, after = (c.text_features().cpu().numpy() for c in (plain, self.classifier))
            about = self.about("map-text", "Text features,", f"{len(self.names):,} class names")
            self.map(about, before, after, [colours.get(c) for c in range(len(self.names))])
        if there and "visual" in prompts(self.run.method):
            chosen = np.flatnonzero(self.even & np.isin(self.labels, coloured))
            chosen = chosen[:: max(1, -(-len(chosen) // MAP_IMAGES))]
            items = tuple(self.items[i] for i in chosen)
            before = self.shared.encode(self.task, items, self.settings).features.numpy()
            about = self.about("map-image", "Image features,", f"{len(chosen):,} images")
            shown = [colours[label] for label in self.labels[chosen].tolist()]
            self.map(about, before, self.image.numpy()[chosen], shown)
        if there:
            yield from self.predict(colour)

    def about(self, kind: str, what: str, caption: str) -> Named:
        """What a figure of the run is called."""
        run, whose = self.run, f"{self.title} on {self.run.dataset}, run {self.run.number}"
        name = re.sub(r"[^a-z0-9]+", "-", f"{run.dataset}-{run.method}-{run.number}".lower())
        return Named(f"{kind}-{name}", f"{what} {whose}", f"{self.title}, {caption}")

    def see(self, *, examples: bool) -> Iterator[str]:
        """Encode the test images; yields a note where there may be no examples.

        Raises:
            UserError, OSError: the images cannot be had.
        """
        self.task = task = task_of(self.settings)
        if task.class_names != self.names:
            raise UserError("its classes are no longer those that the run was tuned on")
        try:
            if examples:
                known_support(self.directory, task)
        except UserError as error:
            yield f"{self.run.dataset}: no examples ({clean(error, 400)})"
            examples = False
        self.hard = self.hardest() if examples else {}
        labels, step = np.array([i.label for i in task.test]), -(-len(task.test) // MOST_IMAGES)
        spaced = range(0, len(labels), step)
        hard = [i for c in self.hard for i in np.flatnonzero(labels == c)[:CLASS_IMAGES].tolist()]
        wanted = sorted({*spaced, *hard})
        place = {task.test[i]: i for i in wanted}
        found = self.shared.encode(task, tuple(place), self.settings, self.classifier)
        self.items, self.image = list(found.items), found.features
        kept = [place[item] for item in found.items]
        self.labels = labels[kept]
        # Where images were added as examples of their class, the rest stays evenly spaced.
        self.even = np.array([i in spaced for i in kept], bool)

    def hardest(self) -> dict[int, float]:
        """Labels of the run's hardest classes, and the share of each that was named right."""
        try:
            found = read_confusion(self.run)
        except UserError:
            return {}  # the section on mistakes tells
        alike = len(found.class_names) == len(self.names)
        hard = found.hardest()[:EXAMPLE_CLASSES] if alike else []
        return {c: float(found.right[c] / found.images[c]) for c in hard}

    def predict(self, colour: str) -> Iterator[str]:
        """How reliable predictions are, and examples of wrong ones; notes if they changed."""
        logits = torch.cat(list(logits_of(self.classifier, self.image)))
        probabilities = logits.double().softmax(-1).numpy()
        confidence, named = probabilities.max(-1), probabilities.argmax(-1)
        correct, even, total = named == self.labels, self.even, len(self.task.test)
        now, then = correct.mean(), self.run.figures["accuracy"].value
        if total <= MOST_IMAGES and abs(now - then) > 0.5 / len(correct):
            yield (
                f"{self.run.dataset}, {self.title}: run {self.run.number} recorded an accuracy of "
                f"{then:.1%} and now has {now:.1%}; its test images, or the versions it ran with, "
                "are not those of then"
            )
        shown = f"{even.sum():,} of {total:,}" if even.sum() < total else f"{total:,}"
        about = self.about("reliability", "Reliability of", f"{shown} images")
        bars = figures.reliability(about, colour, confidence[even], correct[even], ECE_BINS)
        self.inside.drawings["small"].append(bars)
        root = self.task.root.resolve()
        for label, accuracy in self.hard.items():
            wrong = np.flatnonzero((self.labels == label) & ~correct)
            worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:EXAMPLES]
            paths = {i: self.task.image_path(self.items[i]) for i in worst}
            examples = [
                (_thumbnail(path), _name(self.names[named[i]]), float(confidence[i]))
                for i, path in paths.items()
                # What a link in someone's dataset leads to is not his to show.
                if path.resolve().is_relative_to(root)
            ]
            self.inside.hardest.append((_name(self.names[label]), accuracy, examples))

    def map(
        self, about: Named, before: np.ndarray, after: np.ndarray, colours: Sequence[str | None]
    ) -> None:
        """Both sets of features (n, D) by one t-SNE; none for fewer than three points."""
        from sklearn.manifold import TSNE

        count = len(before)
        if count < 3:
            return
        embedded = TSNE(
            perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0, metric="cosine"
        ).fit_transform(np.concatenate([before, after]).astype(np.float64))
        limits = np.stack([embedded.min(0), embedded.max(0)])
        for time, points in (("before", embedded[:count]), ("after", embedded[count:])):
            title, caption = f"{about.title}, {time} tuning", f"{about.caption}, {time}"
            named = Named(f"{about.name}-{time}", title, caption)
            drawing = figures.feature_map(named, points, limits, colours, self.inside.legend)
            self.inside.drawings["pairs"].append(drawing)


def _thumbnail(path: Path) -> str:
    """A small copy of an image, which carries nothing of the original file but its pixels."""
    image = open_image(path).convert("RGB")
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _name(class_name: str) -> str:
    return clean(class_name.replace("_", " "), 60)
