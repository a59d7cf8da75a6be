"""What happens inside runs: loss terms, dispersion, features, mistakes, and confidence.

What only the backbone and the images can tell, `look_inside` finds: for each dataset and method
one run stands for all, the one with the most shots and, of these, the lowest seed. Whatever cannot
be had (backbone, dataset, image) becomes a note; the rest goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapt.data import open_image
from dapt.data.grey import Scale
from dapt.data.pictures import data_uri
from dapt.engine.classifier import Classifier
from dapt.engine.data import task_of
from dapt.engine.evaluate import ECE_BINS, logits_of
from dapt.engine.features import Shared, backbone_of
from dapt.engine.words import Words, nearest_words
from dapt.errors import UserError
from dapt.methods import METHODS
from dapt.progress import Reporter
from dapt.report import figures
from dapt.report.collect import ConfusionMatrix, Run, read_confusion, read_log, warning
from dapt.report.study import Block, Scope, Study, loss_title, row_of
from dapt.report.tables import PLAIN, Cell, Column, Row, Sample, Samples, Table, clean
from dapt.run.directory import RunDirectory
from dapt.run.load import known_support, load_classifier, unseen

MATRIX_CLASSES = 60  # more cannot be read; the hardest are shown
LISTED = 10  # hardest classes and most frequent confusions
_MOST_TERMS = 8  # of the loss
# Looked at, evenly spaced among the test images where there are more; figures are the run's own.
MOST_IMAGES = 2000
MAP_IMAGES = 400  # of the coloured classes
EXAMPLE_CLASSES, EXAMPLES, THUMBNAIL = 6, 5, 84
LISTED_VECTORS = 64  # of a run, whose nearest words are told
CLASS_IMAGES = 300  # looked at of a class to find its examples


def curves(study: Study) -> Iterator[Block]:
    """Every loss term by epoch, at the number of shots that most methods have."""
    for dataset in study.drawn:
        scope = study.best([dataset])
        label = f"{study.label(dataset)}, {scope.at}"
        logs: list[tuple[figures.Entry, int, dict[str, np.ndarray]]] = []
        for method in study.methods:
            for run in study.runs_in(scope, method):
                try:
                    if log := read_log(run):
                        logs.append((study.entry(method), run.number, log))
                except UserError as error:
                    study.warnings.append(warning(run.path, error, "its curves are left out"))
        legend = list(dict.fromkeys(entry for entry, _, _ in logs))
        block = Block(label, legend=legend, runs=tuple(sorted({number for _, number, _ in logs})))
        for name in list(dict.fromkeys(term for _, _, log in logs for term in log))[:_MOST_TERMS]:
            curves: dict[figures.Entry, list[np.ndarray]] = defaultdict(list)
            for entry, _, log in logs:
                if name in log:
                    curves[entry].append(log[name])
            stacked = {
                # Of rows of different length, NaN where one has ended.
                entry: np.array(list(zip_longest(*rows, fillvalue=np.nan))).T
                for entry, rows in curves.items()
            }
            term = loss_title(name)
            title = f"{term} by epoch, {label}"
            about = study.named("curve", name, dataset, caption=term.capitalize(), title=title)
            drawing = figures.draw(figures.training_curves, about, term, stacked)
            block.drawings.append(drawing)
        yield block


def dispersion(study: Study) -> Iterator[Block]:
    """Inter- and intra-dispersion before and after, and maps of the features themselves."""
    kinds, times = ("inter", "intra"), ("before", "after")
    names = [f"{kind} {time}" for kind in kinds for time in times]
    for dataset in study.datasets:
        scope, label = study.best([dataset]), study.label(dataset)
        about = study.named("dispersion", dataset, caption="Dispersion", of=f"{label}, {scope.at}")
        table = study.by_method(about, [study.column(name, scope, name) for name in names])
        block = Block(f"{label}, {scope.at}", tables=[table], runs=table.runs)
        for kind in kinds if dataset in study.drawn else ():
            changes = {}
            for method in study.methods:
                change = [study.samples(scope, method, f"{kind} {time}") for time in times]
                if all(change):
                    before, after = (samples.estimate().mean for samples in change)
                    changes[study.entry(method)] = (before, after)
            if changes:
                what = f"{kind}-dispersion"
                caption = f"{what.capitalize()}, before (hollow) and after tuning"
                title = f"{what.capitalize()} before and after, {label}"
                about = study.named("dispersion", kind, dataset, caption=caption, title=title)
                drawing = figures.draw(figures.before_and_after, about, what, changes)
                block.drawings.append(drawing)
        yield block
        yield study.looked[dataset, "pairs"]


def featured(study: Study) -> list[Run]:
    """For each dataset the run whose mistakes are shown.

    It is of the method with the highest mean accuracy at the number of shots that most methods
    have, of those that learn a prompt if there are any; its representative run.
    """
    found = []
    for dataset in study.drawn:
        scope = study.best([dataset])
        learning = [m for m in study.methods if m not in METHODS or METHODS[m].learns]
        tuned = [m for m in learning if study.runs_in(scope, m)]
        samples = {method: study.samples(scope, method) for method in tuned or study.methods}
        means = {m: own.estimate().mean for m, own in samples.items() if own}
        if means:
            found += tested(study, dataset, max(means, key=lambda m: means[m]))
    return found


def tested(study: Study, dataset: str, method: str) -> list[Run]:
    """The method's representative run of those that had images to test on, if there is one."""
    return [run for run in study.main_runs(dataset, method) if "accuracy" in run.figures][:1]


def mistakes(study: Study) -> Iterator[Block]:
    """Confusion matrix, hardest classes and most frequent confusions of one run a dataset."""
    for run in featured(study):
        if run.metrics is not None and run.metrics.multilabel:
            continue  # of several labels an image, none is taken for another
        try:
            confusion = read_confusion(run)
        except UserError as error:
            study.warnings.append(warning(run.path, error, "its mistakes are left out"))
            continue
        label, size = study.label(run.dataset), len(confusion.class_names)
        what = f"{label}: {row_of(run.method).title}, {Scope([], run.shots).at}, seed {run.seed}"
        note = f"The matrix shows the {MATRIX_CLASSES} hardest of {size} classes."
        # Classes with the most misnamed images, in label order.
        wrong, images = confusion.images - confusion.right, confusion.images
        kept = np.sort(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES])
        about = study.named("confusion", run.dataset, caption="Confusion matrix", of=what)
        names = [confusion.class_names[c] for c in kept]
        shares = confusion.counts[kept][:, kept].toarray() / np.maximum(images[kept, None], 1)
        yield Block(
            what,
            note if size > MATRIX_CLASSES else "",
            [figures.draw(figures.confusion_matrix, about, names, shares)],
            _tables(study, run, confusion),
            hardest=study.hardest[run.number],
            beside=size <= 36,
            kind="natural",
            runs=(run.number,),
        )


def _tables(study: Study, run: Run, confusion: ConfusionMatrix) -> list[Table]:
    names, images, right = confusion.class_names, confusion.images, confusion.right
    wrong, source, label = confusion.mistakes(), (run.number,), study.label(run.dataset)
    # Of each class the name that it was given most.
    taken = {true: f"{names[named]} ({count})" for true, named, count in reversed(wrong)}

    def one(value: float) -> Samples:
        return Samples({run.seed: Sample(value, source)})

    hardest = [
        Column("accuracy", lambda c: one(right[c] / images[c])),
        Column("images", lambda c: one(images[c]), PLAIN),
        Column("mostly taken for", lambda c: Cell(taken[c], source), PLAIN),
    ]
    confused = [
        Column("named", lambda cell: Cell(names[cell[1]], source), PLAIN),
        Column("images", lambda cell: one(cell[2]), PLAIN),
        Column("of class", lambda cell: one(cell[2] / images[cell[0]])),
    ]
    about = study.named("hardest", run.dataset, caption="Hardest classes", of=label)
    rows = [Row(names[c], c) for c in confusion.hardest()[:LISTED]]
    mixed = study.named("confused", run.dataset, caption="Most frequent confusions", of=label)
    pairs = [Row(names[cell[0]], cell) for cell in wrong[:LISTED]]
    return [Table(about, "class", hardest, rows), Table(mixed, "true class", confused, pairs)]


def calibration(study: Study) -> Iterator[Block]:
    """Expected calibration error, and reliability diagrams where confidences are known."""
    for dataset in study.datasets:
        label, scopes = study.label(dataset), [Scope([dataset], k) for k in study.shots]
        about = study.named("ece", dataset, caption="ECE", of=label)
        columns = [study.column(scope.at, scope, "ece") for scope in scopes]
        yield Block(label, tables=[study.by_method(about, columns)])
        yield study.looked[dataset, "small"]


def look_inside(study: Study, reporter: Reporter) -> list[str]:
    """Load each representative run's classifier and look at features and predictions.

    What was found goes to the study; returned are notes on what was not.
    """
    shown = featured(study)
    runs = [run for d in study.drawn for m in study.methods for run in tested(study, d, m)]
    notes: list[str] = []
    backbones: dict[object, Shared | UserError] = {}
    with reporter.stage("looking into runs", len(runs)) as advance:
        for run in runs:
            try:
                _Look(study, run, notes, backbones).all(examples=run in shown)
            except Exception as error:  # a damaged run must not cost the whole report
                notes.append(f"{run.dataset}, {row_of(run.method).title}: {clean(error, 400)}")
            advance(1)
    return list(dict.fromkeys(notes))


class _Look:
    """A run's classifier, and what it finds, for ``study``; ``notes`` take what is missing.

    ``backbones`` are those that are loaded already, or why they cannot be.
    """

    def __init__(
        self, study: Study, run: Run, notes: list[str], backbones: dict[object, Shared | UserError]
    ) -> None:
        self.study, self.run, self.notes = study, run, notes
        self.entry = study.entry(run.method)
        self.directory = RunDirectory(run.path)
        self.settings = s = self.directory.read_settings()
        at = self.directory.revision()
        which = (s.backbone, s.pretrained, s.device, s.precision, at)
        if which not in backbones:
            try:
                backbones[which] = Shared(backbone_of(s, revision=at))
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
        named = [figures.Entry(f"class-{i}", self.shown[c]) for i, c in enumerate(coloured)]
        self.legend = dict(zip(coloured, named, strict=True))
        if row.changes("text") and self.shared.backbone.reads_text:
            plain = Classifier(self.shared.backbone, names, template=self.classifier.template)
            with torch.inference_mode():
                pair = [c.text_features().cpu().numpy() for c in (plain, self.classifier)]
            self.map("text", f"{len(names):,} class names", pair, range(len(names)))
            self.words()
        if there and row.changes("image"):
            chosen = np.flatnonzero(self.even & np.isin(self.labels, coloured))
            chosen = chosen[:: max(1, -(-len(chosen) // MAP_IMAGES))]
            items = tuple(self.items[i] for i in chosen)
            before = self.shared.encode(self.task, items, self.settings).features.numpy()
            pair, labels = [before, self.image.numpy()[chosen]], self.labels[chosen].tolist()
            self.map("image", f"{len(chosen):,} images", pair, labels)
        if there:
            self.predict()

    def _note(self, sentence: str) -> None:
        self.notes.append(f"{self.run.dataset}: {clean(sentence, 400)}")

    def words(self) -> None:
        """A table of the words that learned text vectors are nearest to, where there are some."""
        with suppress(UserError):
            found = nearest_words(self.classifier)[:LISTED_VECTORS]
            run = self.run
            what = f"{self.entry.label} on {self.study.label(run.dataset)}, run {run.number}"
            name = ("words", run.dataset, run.method, run.number)
            about = self.study.named(*name, caption="Nearest words of text vectors", of=what)
            source = (run.number,)
            near = [
                Column(f"{place + 1}.", partial(_near, place, source), PLAIN)
                for place in range(len(found[0].nearest))
            ]
            rows = [Row(f"{one.class_name} {one.vector}".strip(), one) for one in found]
            block = self.study.looked[run.dataset, "pairs"]
            block.tables = [*block.tables, Table(about, "vector", near, rows)]

    def add(self, kind: str, name: str, title: str, caption: str, *shown: Any) -> Block:
        """Draw of the run what is ``shown``, beside what was drawn of others on its dataset.

        Its name and title have a place for what the run is called.
        """
        run, study = self.run, self.study
        title = title.format(f"{self.entry.label} on {run.dataset}, run {run.number}")
        name = name.format(f"{run.dataset}-{run.method}-{run.number}")
        about = study.named(name, title=title, caption=f"{self.entry.label}, {caption}")
        block = study.looked[run.dataset, kind]
        heads = {"pairs": "Feature maps", "small": "Reliability"}
        block.title, block.kind = f"{heads[kind]}, {study.label(run.dataset)}", kind
        block.drawings.append(figures.draw(shown[0], about, *shown[1:]))
        block.runs = tuple(sorted({*block.runs, run.number}))
        return block

    def see(self, *, examples: bool) -> None:
        """Encode the test images; a `UserError` or `OSError` where they cannot be had."""
        task = replace(task_of(self.settings), grey=self.classifier.grey)
        self.task = task = unseen(self.directory, task, self._note)
        if self.classifier.thresholds is not None:
            raise UserError("they have several labels each, of which these figures know one")
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
        with suppress(UserError):  # the section on mistakes tells
            found = read_confusion(self.run)
            if len(found.class_names) == len(self.names):
                hard = found.hardest()[:EXAMPLE_CLASSES]
                return {c: float(found.right[c] / found.images[c]) for c in hard}
        return {}

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
        looked = (figures.reliability, self.entry.colour, confidence[even], correct[even])
        title, caption = "Reliability of {}", f"{shown} images"
        self.add("small", "reliability-{}", title, caption, *looked, ECE_BINS)
        root = self.task.root.resolve()
        for label, accuracy in self.hard.items():
            wrong = np.flatnonzero((self.labels == label) & ~correct)
            worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:EXAMPLES]
            paths = {i: self.task.image_path(self.items[i]) for i in worst}
            examples = [
                (thumbnail(path, self.task.grey), self.shown[named[i]], float(confidence[i]))
                for i, path in paths.items()
                # What a link in someone's dataset leads to is not his to show.
                if path.resolve().is_relative_to(root)
            ]
            self.study.hardest[self.run.number].append((self.shown[label], accuracy, examples))

    def map(self, kind: str, caption: str, pair: list[np.ndarray], labels: Sequence[int]) -> None:
        """Both sets of features (n, D) by one t-SNE; none for fewer than three points."""
        from sklearn.manifold import TSNE

        if (count := len(labels)) < 3:
            return
        embedded = TSNE(
            perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0, metric="cosine"
        ).fit_transform(np.concatenate(pair).astype(np.float64))
        limits = np.stack([embedded.min(0), embedded.max(0)])
        legend = list(self.legend.values())
        colours = [self.legend[n].colour if n in self.legend else None for n in labels]
        for time, points in (("before", embedded[:count]), ("after", embedded[count:])):
            title = f"{kind.capitalize()} features, {{}}, {time} tuning"
            looked = (figures.feature_map, points, limits, colours, legend)
            name, when = f"map-{kind}-{{}}-{time}", f"{caption}, {time}"
            block = self.add("pairs", name, title, when, *looked)
            block.legend = block.legend or legend


def _near(place: int, source: tuple[int, ...], one: Words) -> Cell:
    word, far = one.nearest[place]
    return Cell(f"{word} ({far:.2f})", source)


def thumbnail(path: Path, grey: Scale | None = None) -> str:
    """A small copy of an image as a data URI: nothing of the original file but its pixels."""
    return data_uri(open_image(path, grey), 2 * THUMBNAIL)
