"""What only the backbone and the images can tell: feature maps, confidences, example images.

For each dataset and method one run stands for all: the one with the most shots and, of these, the
lowest seed. Whatever cannot be had (backbone, dataset, image) becomes a note; the rest goes on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from dapt.report.collect import Run, read_confusion
from dapt.report.sections import Block, Maker
from dapt.report.study import row_of
from dapt.report.tables import clean
from dapt.run.directory import RunDirectory
from dapt.run.load import known_support, load_classifier

# Looked at, evenly spaced among the test images where there are more; figures are the run's own.
MOST_IMAGES = 2000
MAP_IMAGES = 400  # of the coloured classes
EXAMPLE_CLASSES, EXAMPLES, THUMBNAIL = 6, 5, 84
CLASS_IMAGES = 300  # looked at of a class to find its examples


def look_inside(maker: Maker, featured: Sequence[Run], reporter: Reporter) -> list[str]:
    """Load each representative run's classifier and look at features and predictions.

    Of ``featured`` runs, whose mistakes are shown, misnamed images are examples of them.
    What was found goes to the maker; returned are notes on what was not.
    """
    runs = [run for d in maker.drawn for m in maker.methods for run in maker.main_runs(d, m)[:1]]
    notes: list[str] = []
    backbones: dict[object, Shared | UserError] = {}
    with reporter.stage("looking into runs", len(runs)) as advance:
        for run in runs:
            try:
                _Look(maker, run, notes, backbones).all(examples=run in featured)
            except Exception as error:  # a damaged run must not cost the whole report
                notes.append(f"{run.dataset}, {row_of(run.method).title}: {clean(error, 400)}")
            advance(1)
    return list(dict.fromkeys(notes))


class _Look:
    """A run's classifier, and what it finds, for ``maker``; ``notes`` take what is missing.

    ``backbones`` are those that are loaded already, or why they cannot be.
    """

    def __init__(
        self, maker: Maker, run: Run, notes: list[str], backbones: dict[object, Shared | UserError]
    ) -> None:
        self.maker, self.run, self.notes = maker, run, notes
        self.entry = maker.entry(run.method)
        self.directory = RunDirectory(run.path)
        self.settings = s = self.directory.read_settings()
        which = (s.backbone, s.pretrained, s.device, s.precision)
        if which not in backbones:
            try:
                backbones[which] = Shared(backbone_of(s))
            except UserError as error:
                backbones[which] = error
        if isinstance(shared := backbones[which], UserError):
            raise shared
        self.shared = shared
        self.classifier = load_classifier(self.directory, backbone=shared.backbone)
        self.names = self.classifier.class_names
        self.shown = [clean(name.replace("_", " "), 60) for name in self.names]

    def all(self, *, examples: bool) -> None:
        there, row, names = True, row_of(self.run.method), self.names
        try:
            self.see(examples=examples)
            counts = np.bincount(self.labels[self.even], minlength=len(names))
        except (UserError, OSError) as error:
            self.notes.append(f"{self.run.dataset}: no images to look at ({clean(error, 400)})")
            there, counts = False, np.ones(len(names), int)
        largest = np.argsort(-counts, kind="stable")[: figures.CLASS_COLOURS]
        coloured = sorted(int(c) for c in largest if counts[c])
        legend = {c: figures.Entry(f"class-{i}", self.shown[c]) for i, c in enumerate(coloured)}
        if row.changes("text"):
            plain = Classifier(self.shared.backbone, names, template=self.classifier.template)
            with torch.inference_mode():
                pair = [c.text_features().cpu().numpy() for c in (plain, self.classifier)]
            self.map("text", f"{len(names):,} class names", pair, range(len(names)), legend)
        if there and row.changes("image"):
            chosen = np.flatnonzero(self.even & np.isin(self.labels, coloured))
            chosen = chosen[:: max(1, -(-len(chosen) // MAP_IMAGES))]
            items = tuple(self.items[i] for i in chosen)
            before = self.shared.encode(self.task, items, self.settings).features.numpy()
            pair, labels = [before, self.image.numpy()[chosen]], self.labels[chosen].tolist()
            self.map("image", f"{len(chosen):,} images", pair, labels, legend)
        if there:
            self.predict()

    def add(
        self, kind: str, parts: Sequence[str], what: str, caption: str, figure: Any, *shown: Any
    ) -> Block:
        """Draw what is ``shown`` of the run, beside what was drawn of others on its dataset."""
        run, (name, *time) = self.run, parts
        whole = f"{what} {self.entry.label} on {run.dataset}, run {run.number}"
        about = self.maker.named(
            *(name, run.dataset, run.method, run.number, *time),
            title=", ".join([whole, *(f"{t} tuning" for t in time)]),
            caption=", ".join([self.entry.label, caption, *time]),
        )
        block = self.maker.looked[run.dataset, kind]
        heads = {"pairs": "Feature maps", "small": "Reliability"}
        block.title, block.kind = f"{heads[kind]}, {self.maker.label(run.dataset)}", kind
        block.drawings.append(figures.draw(figure, about, *shown))
        block.runs = tuple(sorted({*block.runs, run.number}))
        return block

    def see(self, *, examples: bool) -> None:
        """Encode the test images; a `UserError` or `OSError` where they cannot be had."""
        self.task = task = task_of(self.settings)
        if task.class_names != self.names:
            raise UserError("its classes are no longer those that the run was tuned on")
        self.hard = self.hardest() if examples else {}
        labels, step = np.array([i.label for i in task.test]), -(-len(task.test) // MOST_IMAGES)
        spaced = range(0, len(labels), step)
        hard = [i for c in self.hard for i in np.flatnonzero(labels == c)[:CLASS_IMAGES].tolist()]
        place = {task.test[i]: i for i in sorted({*spaced, *hard})}
        found = self.shared.encode(task, tuple(place), self.settings, self.classifier)
        self.items, self.image = list(found.items), found.features
        kept = [place[item] for item in found.items]
        self.labels = labels[kept]
        # Where images were added as examples of their class, the rest stays evenly spaced.
        self.even = np.array([i in spaced for i in kept], bool)

    def hardest(self) -> dict[int, float]:
        """Labels of the run's hardest classes whose images may be shown, and shares named right."""
        try:
            known_support(self.directory, self.task)
        except UserError as error:
            self.notes.append(f"{self.run.dataset}: no examples ({clean(error, 400)})")
            return {}
        try:
            found = read_confusion(self.run)
        except UserError:
            return {}  # the section on mistakes tells
        alike = len(found.class_names) == len(self.names)
        hard = found.hardest()[:EXAMPLE_CLASSES] if alike else []
        return {c: float(found.right[c] / found.images[c]) for c in hard}

    def predict(self) -> None:
        """How reliable predictions are, whether they changed, and examples of wrong ones."""
        logits = torch.cat(list(logits_of(self.classifier, self.image)))
        probabilities = logits.double().softmax(-1).numpy()
        confidence, named = probabilities.max(-1), probabilities.argmax(-1)
        correct, even, total = named == self.labels, self.even, len(self.task.test)
        now, then = correct.mean(), self.run.figures["accuracy"].value
        if total <= MOST_IMAGES and abs(now - then) > 0.5 / len(correct):
            self.notes.append(
                f"{self.run.dataset}, {self.entry.label}: run {self.run.number} recorded an "
                f"accuracy of {then:.1%} and now has {now:.1%}; its test images, or the versions "
                "it ran with, are not those of then"
            )
        shown = f"{even.sum():,} of {total:,}" if even.sum() < total else f"{total:,}"
        looked = (self.entry.colour, confidence[even], correct[even], ECE_BINS)
        name, what = ["reliability"], "Reliability of"
        self.add("small", name, what, f"{shown} images", figures.reliability, *looked)
        root = self.task.root.resolve()
        for label, accuracy in self.hard.items():
            wrong = np.flatnonzero((self.labels == label) & ~correct)
            worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:EXAMPLES]
            paths = {i: self.task.image_path(self.items[i]) for i in worst}
            examples = [
                (_thumbnail(path), self.shown[named[i]], float(confidence[i]))
                for i, path in paths.items()
                # What a link in someone's dataset leads to is not his to show.
                if path.resolve().is_relative_to(root)
            ]
            self.maker.hardest[self.run.number].append((self.shown[label], accuracy, examples))

    def map(
        self,
        kind: str,
        caption: str,
        pair: Sequence[np.ndarray],
        labels: Sequence[int],
        legend: dict[int, figures.Entry],
    ) -> None:
        """Both sets of features (n, D) by one t-SNE; none for fewer than three points."""
        from sklearn.manifold import TSNE

        if (count := len(labels)) < 3:
            return
        embedded = TSNE(
            perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0, metric="cosine"
        ).fit_transform(np.concatenate(pair).astype(np.float64))
        limits = np.stack([embedded.min(0), embedded.max(0)])
        colours = [legend[label].colour if label in legend else None for label in labels]
        for time, points in (("before", embedded[:count]), ("after", embedded[count:])):
            name, what = [f"map-{kind}", time], f"{kind.capitalize()} features,"
            looked = (points, limits, colours, list(legend.values()))
            block = self.add("pairs", name, what, caption, figures.feature_map, *looked)
            block.legend = block.legend or looked[-1]


def _thumbnail(path: Path) -> str:
    """A small copy of an image, which carries nothing of the original file but its pixels."""
    image = open_image(path).convert("RGB")
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
