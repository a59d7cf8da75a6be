"""Prompt tuning as a scikit-learn classifier: fit on images and labels, predict, score."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted, column_or_1d

from dapt import notebook
from dapt.clip.backbone import Backbone
from dapt.clip.known import STAND_IN, SUITED, Each, Names, as_one, each_of, names_of, stands_in
from dapt.clip.sources import load_backbone
from dapt.data import BadImage, ImageStore, Item, SupportSet, Task, draw_support_set
from dapt.data.given import as_labels, as_sequence, labels_of, names_of_labels
from dapt.data.images import image_in
from dapt.data.items import check_class_names
from dapt.engine.classifier import Classifier
from dapt.engine.data import Data, task_of, with_grey
from dapt.engine.effort import choose, new_search, settings_to_begin_with, summary, time_of
from dapt.engine.evaluate import classify
from dapt.engine.features import Shared
from dapt.engine.fit import Interrupted, Journal, fit
from dapt.engine.forecast import forecast
from dapt.engine.suited import differing
from dapt.errors import InputError, UserError, nearest
from dapt.labels import are_lists, classes_of, classes_of_lists, names_for
from dapt.methods import get_method
from dapt.predict import best
from dapt.progress import Reporter, RichReporter
from dapt.run.directory import RunDirectory
from dapt.run.hub import find_run
from dapt.run.load import classifier_of, load_classifier
from dapt.run.records import SupportRecord, TaskRecord
from dapt.run.train import check_output, files_of
from dapt.safe.files import to_json
from dapt.settings import (
    FITTED,
    Settings,
    absolute_paths,
    all_fields,
    kept_values,
    make_settings,
)


@dataclass(eq=False, repr=False)
class PromptClassifier(notebook.Shown, ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier that learns from a few labelled images.

    Images are paths, files' bytes, PIL images, arrays (H, W, 3) or tensors (3, H, W) (uint8, or
    floating point in 0 .. 1), a table with a column ``image`` or ``path``, or a torch or Hugging
    Face dataset, streamed or not. Labels are class names, or anything else together with
    ``class_names``. They may be left out for datasets, tables and pairs that contain them. If each
    image has a list of labels, `predict` returns lists, and `predict_proba` a separate probability
    for each class. (Cross-validation selects rows from arrays; from a Hugging Face dataset, pass
    ``dataset["image"]`` and ``dataset["label"]``.) Loading a pickled classifier can run code;
    loading what `save` writes cannot.

    Args:
        backbone: 'auto', the best for photographs on this machine (see ``dapt backbones``), which
            is downloaded once; 'bundled', an open_clip name, a hub id, or a file. Features
            of a list of them are joined, for a head on all.
        method: a method, such as auto, dapt, coop, vpt, linear-probe or zero-shot.
        shots: train on at most this many images per class, drawn with ``seed``; None uses all.
        pretrained: open_clip tag, weights file, or 'random'; for several backbones, a list.
        class_names: names of the classes for the prompts, if labels are not names: a mapping
            from label to name, or a list in the order of ``classes_``.
        epochs, lr, beta_visual, beta_text, text_vectors, visual_vectors, batch_size: settings of
            the method; None uses its default for your own data, see ``dapt settings``.
        seed: seed of support set, prompts, order and views.
        precision: precision of the frozen model: fp32, bf16 or fp16.
        device: auto, cpu, cuda, cuda:N or mps.
        settings: any other settings that ``dapt settings`` lists.
        effort: 'seconds', 'minutes', 'hours' or a time such as '20m'. Beyond seconds, methods that
            tune the towers are also tried on held-out images, and one is used if clearly better.
        verbose: show a progress bar.

    Attributes:
        classes_: labels, in the order of the columns of `predict_proba`.
        class_names_: their names in prompts.
        files_: the files, by name, that `save` writes.
        effort_: what was tried beside auto, and its results; None without ``effort``.
        forecast_: what to expect on new photos, as in metrics.json; None if not known.
    """

    backbone: Names = SUITED
    _: KW_ONLY
    method: str = "auto"
    shots: int | None = 16
    pretrained: Each = None
    class_names: Mapping[Any, str] | Sequence[str] | None = None
    epochs: int | None = None
    lr: float | None = None
    beta_visual: float | None = None
    beta_text: float | None = None
    text_vectors: int | None = None
    visual_vectors: int | None = None
    batch_size: int | None = None
    seed: int = 1
    precision: str = "fp32"
    device: str = "auto"
    settings: Mapping[str, Any] | None = None
    effort: str | None = None
    verbose: bool = False

    def __sklearn_tags__(self) -> Any:
        """Images, not rows of features; labels are needed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(self, X: Any, y: Any = None) -> PromptClassifier:
        """Fit the classifier to n images and labels; without ``y``, to the labels in dataset ``X``.

        Warns if labels are numbers without names, unless the method reads no class names. Bad input
        raises a `UserError`, which is also a ValueError if the fault is in ``X`` or ``y``.
        """
        images = as_sequence(X)
        labels = labels_of(images) if y is None else y
        several = are_lists(labels)
        classes, codes = (classes_of_lists if several else classes_of)(labels, len(images))
        given = names_of_labels(y) if self.class_names is None else self.class_names
        names = names_for(given or None, classes)
        most = int(np.bincount([code for own in codes for code in own]).max())
        settings = self._settings(most if self.shots is None else self.shots)
        if settings.shots > most:  # settings for few images go by how many there are
            settings = self._settings(most)
        numbers = not any(isinstance(label, str) for label in classes.tolist())
        backbone, head = self._backbone(settings), get_method(settings.method).head
        if numbers and not given and head.reads_text and backbone.reads_text:
            called = f"prompts call the classes {names[0]!r}, {names[1]!r} and so on"
            hint = "give class_names, such as {0: 'cat', 1: 'dog'}"
            warnings.warn(f"{called}, for want of names; {hint}", stacklevel=2)
        # Each item's path is its image's place, until it is known which are files.
        items = tuple(
            Item(str(i), first, names[first], tuple(others))
            for i, (first, *others) in enumerate(codes)
        )
        task = Task(FITTED, Path(), names, items, (), (), multilabel=several, pictures=images)
        task = with_grey(task, settings)
        support = draw_support_set(task, settings.shots, settings.seed)
        drawn = tuple(_located(images, item) for item in support.train)
        data = Data(task, replace(support, train=drawn))
        if stands_in(settings.backbone, [model.name for model in backbone.members]):
            hint = "connect and start Python anew, or give backbone the name of a model"
            warnings.warn(f"{STAND_IN}; {hint}", stacklevel=2)
        self._tune(data, settings, backbone, classes)
        return self

    def _tune(
        self, data: Data, settings: Settings, backbone: Backbone, classes: np.ndarray
    ) -> None:
        journal, reporter = Journal(), RichReporter() if self.verbose else Reporter()
        shared, more = Shared(backbone), dict[str, Any](labels=_json(classes))
        try:
            if self.effort is not None and time_of(self.effort):
                search, settings = new_search(self.effort), settings_to_begin_with(settings)
                settings = choose(search, settings, data, shared=shared, reporter=reporter)
                more["effort"] = summary(search)
            tuned = fit(data, settings, shared=shared, journal=journal, reporter=reporter)
        except Interrupted:
            raise KeyboardInterrupt from None
        except BadImage as error:
            raise InputError(str(error)) from error
        tuned.classifier.requires_grad_(False)
        self.effort_, self.forecast_ = more.get("effort"), forecast(tuned)
        if other := differing(settings, tuned.settings):
            more["asked"] = other
        self._adopt(files_of(tuned, journal, **more), classes, tuned.classifier)
        self._data = data

    def predict(self, X: Any) -> np.ndarray:
        """Predict (n,) labels of n images, or lists of the labels that reach their thresholds."""
        found = self.predict_proba(X)  # which also says if nothing was fitted
        if (thresholds := self._classifier.thresholds) is None:
            return self.classes_[found.argmax(-1)]
        lists = np.empty(len(found), dtype=object)
        for place, row in enumerate(found >= thresholds.numpy()[self._places]):
            lists[place] = self.classes_[row].tolist()
        return lists

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict (n, C) probabilities for n images, with columns in the order of ``classes_``.

        Raises an `InputError` if an image cannot be read, and NotFittedError before `fit` or
        `load`.
        """
        classifier = self._ready()
        store = ImageStore(as_sequence(X), **classifier.of_views())
        try:
            logits = classify(classifier, store)
        except BadImage as error:
            raise InputError(str(error)) from error
        return classifier.probabilities(logits.double()).numpy()[:, self._places]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Compute the accuracy on images and labels; without ``y``, on the labels in dataset ``X``.

        With lists of labels, it is the share of images whose labels are predicted exactly.
        """
        if y is None:
            y = labels_of(X := as_sequence(X))
        check_is_fitted(self, "files_")
        if are_lists(y):
            pairs = zip(y, self.predict(X), strict=True)
            right = [set(own) == set(found) for own, found in pairs]
            return float(np.average(right, weights=sample_weight))
        # A dataset knows its classes by number and by name, and `fit` may have seen either.
        own, names = set(self.classes_.tolist()), names_of_labels(y)
        by_name = dict(zip(self.class_names_, self.classes_.tolist(), strict=True))
        labels = as_labels(y).ravel().tolist()
        labels = [x if x in own else by_name.get(names.get(x, x), x) for x in labels]
        return float(super().score(X, labels, sample_weight))

    def show(self, X: Any, top: int = 3) -> notebook.Page:
        """Show images with their ``top`` classes in a notebook; raises the errors of `predict`.

        With several labels per image, shows the most probable ones, whatever their thresholds.
        """
        found = best(torch.from_numpy(self.predict_proba(X)), self.class_names_, top)
        return notebook.photos(as_sequence(X), found, self._classifier.grey)

    def _ready(self) -> Classifier:
        """The classifier, put together again where it was pickled; NotFittedError before `fit`."""
        check_is_fitted(self, "files_")
        if not hasattr(self, "_classifier"):
            self._classifier = self._built(self.files_)
        return self._classifier

    def add_classes(
        self, names: Sequence[str] | Mapping[Any, str], X: Any = None, y: Any = None
    ) -> PromptClassifier:
        """Add classes to a fitted classifier.

        Methods that learn prompts recognise them by name, without tuning again. A head that knows
        only the classes it was fitted on, such as that of ``auto``, is fitted again on its earlier
        images and the new ones: at most ``shots`` per class, as in `fit`. Added classes without
        images are known only by their names.

        Args:
            names: class names, or a mapping from labels to names if labels are not names.
            X, y: images and labels of added classes, as for `fit`.

        The run's test figures are dropped, because they are for fewer classes. Raises a `UserError`
        if a name exists already or is not a name; if a head must be fitted again and its earlier
        images are gone (images in memory end with the process; files must be where they were); if
        the head reads no names and a class has no images; or if a method without a head is given
        images.
        """
        check_is_fitted(self, "files_")
        if isinstance(names, str):
            raise InputError(f"add_classes takes a list of class names; write [{names!r}]")
        given = names if isinstance(names, Mapping) else {name: name for name in names}
        back = np.argsort(self._places)  # to the run's own order, to which they are added
        classes = np.asarray([*self.classes_[back].tolist(), *given])
        text = self.classes_.dtype.kind in "UO"  # whether labels are names
        fresh = len(set(classes.tolist())) == len(self.classes_) + len(given)
        if not fresh or any(isinstance(label, str) != text for label in given):
            what = "labels of added classes must be new, and of the same kind as those there"
            hint = "give a mapping from label to class name where labels are no names"
            raise InputError(f"{what}; {hint}")
        before = [self.class_names_[i] for i in back]
        everything = [*before, *map(str, given.values())]
        check_class_names(everything, "added classes")
        settings = make_settings(json.loads(self.files_["settings.json"]))
        if self._ready().closed(settings):
            self._fit_again(settings, classes, tuple(everything), X, y)
            return self
        if X is not None:
            what = f"method '{settings.method}' takes new classes by their names, without images"
            raise InputError(f"{what}; leave X and y out, or fit anew on all images")
        files = {name: file for name, file in self.files_.items() if name != "metrics.json"}
        added: dict[str, Any] = {"class_names": everything, "labels": _json(classes)}
        for name, entry in (("task.json", "class_names"), ("environment.json", "labels")):
            files[name] = to_json({**json.loads(files[name]), entry: added[entry]}, indent=1)
        self.forecast_ = None
        self._adopt(files, classes, self._built(files, own_names=before))
        return self

    def _fit_again(
        self, settings: Settings, classes: np.ndarray, names: tuple[str, ...], X: Any, y: Any
    ) -> None:
        """Fit to the images of before, and those of classes that stand last in ``classes``."""
        images: Sequence[Any] = () if X is None else as_sequence(X)
        labels = () if X is None else labels_of(images) if y is None else y
        codes = {label: code for code, label in enumerate(classes.tolist())}
        given = [codes.get(label, -1) for label in column_or_1d(np.asarray(labels)).tolist()]
        added = range(len(self.classes_), len(classes))
        if len(given) != len(images) or not set(given) <= set(added):
            raise InputError("add_classes needs a label for each image, one of the added classes")
        lacking = [names[code] for code in added if code not in given]
        read = self._classifier.backbone.reads_text
        if lacking and not (read and get_method(settings.method).head.reads_text):
            what = f"method '{settings.method}' knows classes by images alone"
            raise InputError(f"{what}; give some of '{lacking[0]}': add_classes(names, X, y)")
        known = self._known()
        new = tuple(Item(str(i), code, names[code]) for i, code in enumerate(given))
        task = Task(FITTED, Path(), names, new, (), (), known.task.template, pictures=images)
        drawn = draw_support_set(task, settings.shots, settings.seed).train
        before, val = known.support.train, known.support.val
        pictures = [*map(known.task.source, (*before, *val)), *map(task.source, drawn)]
        listed = (replace(i, path=str(n)) for n, i in enumerate((*before, *val, *drawn)))
        items, first, last = [_located(pictures, i) for i in listed], len(before), len(before + val)
        train, val = (*items[:first], *items[last:]), tuple(items[first:last])
        task = replace(task, train=train, val=val, pictures=pictures)
        support = SupportSet(FITTED, settings.shots, settings.seed, train, val)
        elsewhere = dict.fromkeys(("root", "domain", "class_names", "support_set"))
        own = {**elsewhere, "dataset": FITTED, "classes": "all", "strict": True}
        settings = settings.model_copy(update=own)
        self._tune(Data(task, support), settings, self._loaded(settings), classes)

    def _known(self) -> Data:
        """The images that it was fitted on; a `UserError` if they were in a memory that is gone."""
        if hasattr(self, "_data"):  # it is not pickled
            return self._data
        settings = make_settings(json.loads(self.files_["settings.json"]))
        record = SupportRecord.model_validate_json(self.files_["support_set.json"])
        task = TaskRecord.model_validate_json(self.files_["task.json"])
        train, val = (
            tuple(Item(i.path, i.label, i.class_name) for i in part)
            for part in (record.train, record.val)
        )
        own = settings.dataset == FITTED
        if not train or (own and any(item.path.isdecimal() for item in train)):
            what = "the images it was fitted on are not here any more"
            raise UserError(f"{what}; fit anew, on them and on those of added classes")
        root = Path() if own else task_of(settings).root
        found = Task(FITTED, root, tuple(task.class_names), train, val, (), task.template)
        return Data(found, SupportSet(FITTED, settings.shots, settings.seed, train, val))

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write a run directory, which ``dapt predict`` and the other commands can read.

        It contains only tensors and JSON. (Loading a pickle or joblib file can run code.)

        Raises a `UserError` if the directory holds a run, unless ``overwrite``, or is in use.
        """
        check_is_fitted(self, "files_")
        run, way = RunDirectory(path), "give {}=True, or choose another path"
        check_output(run, None, overwrite=overwrite, way=way)
        with run.locked():
            check_output(run, None, overwrite=overwrite, way=way)
            run.begin(self.files_)
        return run.path

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", backbone: Names | None = None
    ) -> PromptClassifier:
        """Load a classifier from a directory that `save`, ``dapt train`` or ``dapt import`` wrote.

        ``path`` can also be ``org/name`` or ``org/name@commit`` on the Hugging Face hub, if
        ``dapt push`` put a run there.

        ``backbone`` says where the backbone's weights are now, if they have moved. Raises a
        `UserError` if there is no finished run, or the backbone is not the one it was tuned on.
        """
        run = RunDirectory(find_run(path))
        run.require()
        settings = run.read_settings()
        if backbone:  # whose weights are elsewhere, those of the others are where they were
            tags = each_of(settings.backbone, settings.pretrained)
            known = dict(zip(names_of(settings.backbone), tags, strict=True))
            there = names_of(absolute_paths({"backbone": backbone})["backbone"])
            its = [known.get(name) for name in there]
            moved = {"backbone": as_one(there), "pretrained": as_one(its)}
            settings = settings.model_copy(update=moved)
        values = settings.model_dump()
        own = {name: values[name] for name in _OWN}
        usual = make_settings(own | {"dataset": FITTED}).model_dump()
        others = {name: values[name] for name in _free() if values[name] != usual[name]}
        own["device"] = device
        found = cls(**own, settings=others or None)
        names = run.read_task().class_names
        labels: Any = run.read_environment().labels
        if labels is None:
            labels = names
        elif len(set(map(repr, labels))) != len(names):
            raise UserError(
                f"{run.environment_file} is damaged: its labels are not those of classes"
            )
        if labels != names:
            found.class_names = dict(zip(labels, names, strict=True))
        commit = run.revision() if backbone is None else None
        classifier = load_classifier(run, backbone=found._backbone(settings, commit))
        run.check_links(run.files())
        files = {file.name: file.read_bytes() for file in run.files()}
        files[run.settings_file.name] = to_json(kept_values(settings), indent=1)
        told = run.read_metrics().forecast if run.finished else None
        found.forecast_ = None if told is None else told.model_dump()
        found._adopt(files, np.asarray(labels), classifier)
        return found

    def _settings(self, shots: int) -> Settings:
        own, others = {name: getattr(self, name) for name in _OWN}, self.settings or {}
        if clash := sorted(others.keys() - _free()):
            what = f"setting '{clash[0]}' is no entry of PromptClassifier's settings"
            near = "" if clash[0] in all_fields() else nearest(clash[0], sorted(_free()))
            raise UserError(f"{what}{near}; give it as a parameter, if it is one")
        given = {**own, **others, "shots": shots, "dataset": FITTED, "strict": True}
        return make_settings(absolute_paths(given))

    def _adopt(self, files: dict[str, bytes], classes: np.ndarray, classifier: Classifier) -> None:
        """Become what a run holds; its labels are sorted, as scikit-learn's scorers take them."""
        self.files_, self._classifier = files, classifier
        self._places = np.argsort(classes, kind="stable")
        self.classes_ = classes[self._places]
        self.class_names_ = tuple(classifier.class_names[i] for i in self._places)

    def _backbone(self, settings: Settings, revision: Each = None) -> Backbone:
        name, tag, precision = settings.backbone, settings.pretrained, settings.precision
        how = {"device": self.device or "auto", "precision": precision, "revision": revision}
        return _load_backbone(name, tag, **how)

    def _loaded(self, settings: Settings) -> Backbone:
        """The backbone it has, if it was not pickled since."""
        if hasattr(self, "_classifier"):
            return self._classifier.backbone
        return self._backbone(settings)

    def _built(self, files: dict[str, bytes], own_names: Sequence[str] | None = None) -> Classifier:
        """The classifier that a run's files hold; it was tuned on other classes, if given."""
        settings = make_settings(json.loads(files["settings.json"]))
        task = TaskRecord.model_validate_json(files["task.json"])
        backbone = self._loaded(settings)
        tensors, where = load(files["prompts.safetensors"]), "what was fitted"
        parts = (settings, tensors, backbone, task, where, own_names)
        return classifier_of(*parts, multilabel=task.multilabel)

    def __getstate__(self) -> dict[str, Any]:
        """Parameters and the run's files; the backbone is loaded again, images are not kept."""
        left = ("_classifier", "_data")
        return {k: v for k, v in super().__getstate__().items() if k not in left}


# Kept between fits: a grid search loads it once.
_load_backbone = lru_cache(maxsize=2)(load_backbone)
# Settings that are parameters.
_OWN = frozenset(PromptClassifier().get_params()) - {"class_names", "settings", "effort", "verbose"}


def _free() -> frozenset[str]:
    """Other settings, that the way images are given leaves open."""
    given = {"dataset", "root", "domain", "class_names", "classes", "multi_label", "support_set",
             "memory_budget", "strict", "test_fraction"}  # fmt: skip
    return frozenset(all_fields()) - _OWN - given


def _located(images: Sequence[Any], item: Item) -> Item:
    """The item with the absolute path of its image, where it is a file."""
    value = image_in(images[int(item.path)])
    is_file = isinstance(value, str | Path)
    return replace(item, path=str(Path(value).absolute())) if is_file else item


def _json(classes: np.ndarray) -> list[Any] | None:
    """Labels for a JSON record, None where it cannot hold them."""
    labels = classes.tolist()
    return labels if all(isinstance(label, str | int | float) for label in labels) else None
