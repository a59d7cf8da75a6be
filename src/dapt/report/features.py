"""What only the backbone and the images can tell: feature maps, confidences, example images.

For each dataset and method one run stands for all: the one with the most shots and, of these, the
lowest seed. Whatever cannot be had (backbone, dataset, image) becomes a note; the rest goes on.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
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
from dapt.report.sections import Inside, Maker
from dapt.report.study import row_of
from dapt.report.tables import Named
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
    study = maker.study
    runs = [run for d in maker.drawn for m in study.methods for run in study.main_runs(d, m)[:1]]
    notes: list[str] = []
    backbones: dict[object, Shared | UserError] = {}
    with reporter.stage("looking into runs", len(runs)) as advance:
        for run in runs:
            maker.inside.append(inside := Inside(run))
            try:
                _Look(maker, inside, notes, backbones).all(examples=run in featured)
            except Exception as error:  # a damaged run must not cost the whole report
                notes.append(f"{run.dataset}, {row_of(run.method).title}: {clean(error, 400)}")
            advance(1)
    return list(dict.fromkeys(notes))


class _Look:
    """A run's classifier, and what it finds, to fill ``inside``; ``notes`` take what is missing.

    ``backbones`` are those that are loaded already, or why they cannot be.
    """

    def __init__(
        self,
        maker: Maker,
        inside: Inside,
        notes: list[str],
        backbones: dict[object, Shared | UserError],
    ) -> None:
        self.maker, self.inside, self.run, self.notes = maker, inside, inside.run, notes
        self.row = row_of(self.run.method)
        self.directory = RunDirectory(self.run.path)
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
        """Everything there is to see."""
        there = True
        try:
            self.see(examples=examples)
            counts = np.bincount(self.labels[self.even], minlength=len(self.names))
        except (UserError, OSError) as error:
            self.note(f"no images to look at ({clean(error, 400)})")
            there, counts = False, np.ones(len(self.names), int)
        largest = np.argsort(-counts, kind="stable")[: figures.CLASS_COLOURS]
        coloured = sorted(int(c) for c in largest if counts[c])
        colours = {c: f"class-{i}" for i, c in enumerate(coloured)}
        self.inside.legend = [figures.Entry(name, self.shown[c]) for c, name in colours.items()]
        if self.row.changes("text"):
            template = self.classifier.template
            plain = Classifier(self.shared.backbone, self.names, template=template)
            with torch.inference_mode():
                pair = [c.text_features().cpu().numpy() for c in (plain, self.classifier)]
            places = [colours.get(c) for c in range(len(self.names))]
            self.map("text", f"{len(self.names):,} class names", pair, places)
        if there and self.row.changes("image"):
            chosen = np.flatnonzero(self.even & np.isin(self.labels, coloured))
            chosen = chosen[:: max(1, -(-len(chosen) // MAP_IMAGES))]
            items = tuple(self.items[i] for i in chosen)
            before = self.shared.encode(self.task, items, self.settings).features.numpy()
            places = [colours[label] for label in self.labels[chosen].tolist()]
            pair = [before, self.image.numpy()[chosen]]
            self.map("image", f"{len(chosen):,} images", pair, places)
        if there:
            self.predict()

    def note(self, what: str) -> None:
        """Say what is missing."""
        self.notes.append(f"{self.run.dataset}: {what}")

    def named(self, kind: str, what: str, caption: str, time: str = "") -> Named:
        """What a figure of the run is called."""
        run, title = self.run, self.row.title
        whole = f"{what} {title} on {run.dataset}, run {run.number}"
        parts = [kind, run.dataset, run.method, run.number, *filter(None, [time])]
        if not time:
            return self.maker.named(*parts, title=whole, caption=f"{title}, {caption}")
        caption, whole = f"{title}, {caption}, {time}", f"{whole}, {time} tuning"
        return self.maker.named(*parts, title=whole, caption=caption)

    def see(self, *, examples: bool) -> None:
        """Encode the test images.

        Raises:
            UserError, OSError: the images cannot be had.
        """
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
            self.note(f"no examples ({clean(error, 400)})")
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
                f"{self.run.dataset}, {self.row.title}: run {self.run.number} recorded an accuracy "
                f"of {then:.1%} and now has {now:.1%}; its test images, or the versions it ran "
                "with, are not those of then"
            )
        shown = f"{even.sum():,} of {total:,}" if even.sum() < total else f"{total:,}"
        about = self.named("reliability", "Reliability of", f"{shown} images")
        colour = self.maker.entry(self.run.method).colour
        looked = (colour, confidence[even], correct[even], ECE_BINS)
        bars = figures.draw(figures.reliability, about, *looked)
        self.inside.drawings["small"].append(bars)
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
            self.inside.hardest.append((self.shown[label], accuracy, examples))

    def map(
        self, kind: str, caption: str, pair: Sequence[np.ndarray], colours: Sequence[str | None]
    ) -> None:
        """Both sets of features (n, D) by one t-SNE; none for fewer than three points."""
        from sklearn.manifold import TSNE

        if (count := len(colours)) < 3:
            return
        embedded = TSNE(
            perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0, metric="cosine"
        ).fit_transform(np.concatenate(pair).astype(np.float64))
        limits = np.stack([embedded.min(0), embedded.max(0)])
        for time, points in (("before", embedded[:count]), ("after", embedded[count:])):
            about = self.named(f"map-{kind}", f"{kind.capitalize()} features,", caption, time)
            looked = (points, limits, colours, self.inside.legend)
            drawing = figures.draw(figures.feature_map, about, *looked)
            self.inside.drawings["pairs"].append(drawing)


def _thumbnail(path: Path) -> str:
    """A small copy of an image, which carries nothing of the original file but its pixels."""
    image = open_image(path).convert("RGB")
    image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    image.info.clear()
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
