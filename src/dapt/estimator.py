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
from safetensors.torch import load
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d

from dapt.clip.backbone import Backbone
from dapt.clip.sources import load_backbone
from dapt.data import BadImage, ImageStore, Item, Task, draw_support_set
from dapt.data.images import InputError, as_sequence, labels_of
from dapt.data.items import check_class_names
from dapt.engine.classifier import Classifier
from dapt.engine.data import Data
from dapt.engine.evaluate import classify
from dapt.engine.features import Shared
from dapt.engine.fit import Interrupted, Journal, fit
from dapt.errors import UserError
from dapt.methods import get_method
from dapt.progress import Reporter, RichReporter
from dapt.run.directory import RunDirectory
from dapt.run.load import classifier_of, load_classifier
from dapt.run.records import TaskRecord
from dapt.run.train import check_output, files_of
from dapt.safe.files import to_json
from dapt.settings import FITTED, Settings, absolute_paths, all_fields, make_settings


@dataclass(eq=False, repr=False)
class PromptClassifier(ClassifierMixin, BaseEstimator):
    """A few labelled images in, a classifier out.

    Images are paths, PIL images, arrays (H, W, 3) or tensors (3, H, W) (uint8, or floating point
    in 0 .. 1), or a torch or Hugging Face dataset. Labels are class names, or anything else with
    ``class_names``; they may be left out for datasets, rows and pairs that have them. (Model
    selection picks rows as of an array, which a Hugging Face dataset is not: give it
    ``dataset["image"]`` and ``dataset["label"]``.)

    Args:
        backbone: 'bundled', an open_clip name, a hub id, or a file.
        method: a row of the method table, such as auto, dapt, coop, vpt, linear-probe, zero-shot.
        shots: at most this many images a class are tuned on, drawn by ``seed``; None takes all.
        pretrained: open_clip tag, weights file, or 'random'.
        class_names: what prompts call the classes, where labels are not their names: a mapping
            from label to name, or a list in the order of ``classes_``.
        epochs, lr, beta_visual, beta_text, text_vectors, visual_vectors, batch_size: None takes the
            method's default for own data; see ``dapt settings``.
        seed: of support set, prompts, order and views.
        precision: fp32, bf16 or fp16, of the frozen model.
        device: auto, cpu, cuda, cuda:N or mps.
        settings: any others that ``dapt settings`` lists.
        verbose: show a progress bar.

    Attributes:
        classes_: labels, in the order of the columns of `predict_proba`.
        class_names_: what prompts call them.
        files_: the run's files, by name: what `save` writes.
    """

    backbone: str = "bundled"
    _: KW_ONLY
    method: str = "auto"
    shots: int | None = 16
    pretrained: str | None = None
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
    verbose: bool = False

    def __sklearn_tags__(self) -> Any:
        """Images, not rows of features; labels are needed."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(self, X: Any, y: Any = None) -> PromptClassifier:
        """Tune prompts on n images and labels; without labels, on those of the dataset ``X``.

        Warns where labels are numbers and nothing says what they mean, unless no prompt reads it.
        What cannot be used is a `UserError`, a ValueError too where ``X`` or ``y`` is to blame.
        """
        images = as_sequence(X)
        classes, codes = _classes(labels_of(images) if y is None else y, len(images))
        names = _names(self.class_names, classes)
        shots = int(np.bincount(codes).max()) if self.shots is None else self.shots
        settings = self._settings(shots)
        numbers = not any(isinstance(label, str) for label in classes.tolist())
        if numbers and self.class_names is None and get_method(settings.method).head.reads_text:
            called = f"prompts call the classes {names[0]!r}, {names[1]!r} and so on"
            hint = "give class_names, such as {0: 'cat', 1: 'dog'}"
            warnings.warn(f"{called}, for want of names; {hint}", stacklevel=2)
        # Each item's path is its image's place, until it is known which are files.
        items = tuple(Item(str(i), c, names[c]) for i, c in enumerate(codes.tolist()))
        task = Task(FITTED, Path(), names, items, (), (), pictures=images)
        support = draw_support_set(task, shots, settings.seed)
        drawn = tuple(_located(images, item) for item in support.train)
        data = Data(task, replace(support, train=drawn))
        journal, shared = Journal(), Shared(self._backbone(settings))
        reporter = RichReporter() if self.verbose else Reporter()
        try:
            tuned = fit(data, settings, shared=shared, journal=journal, reporter=reporter)
        except Interrupted:
            raise KeyboardInterrupt from None
        except BadImage as error:
            raise InputError(str(error)) from error
        tuned.classifier.requires_grad_(False)
        self._adopt(files_of(tuned, journal, labels=_json(classes)), classes, tuned.classifier)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n,) labels of n images."""
        places = self.predict_proba(X).argmax(-1)  # which also says if nothing was fitted
        return self.classes_[places]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, C) probabilities of n images, columns in the order of ``classes_``.

        An image that cannot be read is an `InputError`; before `fit` or `load`, NotFittedError.
        """
        check_is_fitted(self, "files_")
        images = as_sequence(X)
        if not hasattr(self, "_classifier"):  # it is not pickled
            self._classifier = self._built(self.files_)
        store = ImageStore(images, **self._classifier.backbone.preprocessing.of_views())
        try:
            logits = classify(self._classifier, store)
        except BadImage as error:
            raise InputError(str(error)) from error
        return logits.double().softmax(-1).numpy()[:, self._places]

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Accuracy on images and labels; without labels, on those of the dataset ``X``."""
        if y is None:
            y = labels_of(X := as_sequence(X))
        return float(super().score(X, y, sample_weight))

    def add_classes(self, names: Sequence[str] | Mapping[Any, str]) -> PromptClassifier:
        """Tell apart further classes by the tuned context, without tuning again.

        ``names`` are class names, or a mapping from labels to them where labels are no names.
        Metrics that came with the run are dropped: they are those of fewer classes. A `UserError`
        if a name is there already or is none, or the head knows only classes it was fitted on.
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
        files = {name: file for name, file in self.files_.items() if name != "metrics.json"}
        added: dict[str, Any] = {"class_names": everything, "labels": _json(classes)}
        for name, entry in (("task.json", "class_names"), ("environment.json", "labels")):
            files[name] = to_json({**json.loads(files[name]), entry: added[entry]}, indent=1)
        self._adopt(files, classes, self._built(files, own_names=before))
        return self

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write a run directory, which ``dapt predict`` and the other commands read.

        A `UserError` if a run is there already, unless to ``overwrite``, or it is in use.
        """
        check_is_fitted(self, "files_")
        run, settings = RunDirectory(path), make_settings(json.loads(self.files_["settings.json"]))
        check_output(run, settings, overwrite=overwrite)
        with run.locked():
            check_output(run, settings, overwrite=overwrite)
            run.begin(self.files_)
        return run.path

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", backbone: str | None = None
    ) -> PromptClassifier:
        """The classifier of a run directory that `save`, ``dapt train`` or ``dapt import`` wrote.

        ``backbone`` says where the weights it was tuned on are now, if they have moved. A
        `UserError` if there is no finished run, or its backbone is not what it was tuned on.
        """
        run = RunDirectory(path)
        run.require()
        settings = run.read_settings()
        if backbone is not None:
            moved = absolute_paths({"backbone": backbone})
            settings = settings.model_copy(update={**moved, "pretrained": None})
        values = settings.model_dump()
        same = {"dataset": FITTED, "shots": settings.shots, "method": settings.method}
        usual = make_settings(same).model_dump()
        others = {name: values[name] for name in _free() if values[name] != usual[name]}
        own = {name: values[name] for name in _OWN} | {"device": device}
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
        files[run.settings_file.name] = to_json(settings.model_dump(), indent=1)
        found._adopt(files, np.asarray(labels), classifier)
        return found

    def _settings(self, shots: int) -> Settings:
        own, others = {name: getattr(self, name) for name in _OWN}, self.settings or {}
        if clash := sorted(others.keys() - _free()):
            what = f"setting '{clash[0]}' is no entry of PromptClassifier's settings"
            raise UserError(f"{what}; give it as a parameter, if it is one")
        given = {**own, **others, "shots": shots, "dataset": FITTED, "strict": True}
        return make_settings(absolute_paths(given))

    def _adopt(self, files: dict[str, bytes], classes: np.ndarray, classifier: Classifier) -> None:
        """Become what a run holds; its labels are sorted, as scikit-learn's scorers take them."""
        self.files_, self._classifier = files, classifier
        self._places = np.argsort(classes, kind="stable")
        self.classes_ = classes[self._places]
        self.class_names_ = tuple(classifier.class_names[i] for i in self._places)

    def _backbone(self, settings: Settings, revision: str | None = None) -> Backbone:
        name, tag, precision = settings.backbone, settings.pretrained, settings.precision
        how = {"device": self.device or "auto", "precision": precision, "revision": revision}
        return _load_backbone(name, tag, **how)

    def _built(self, files: dict[str, bytes], own_names: Sequence[str] | None = None) -> Classifier:
        """The classifier that a run's files hold; it was tuned on other classes, if given."""
        settings = make_settings(json.loads(files["settings.json"]))
        task = TaskRecord.model_validate_json(files["task.json"])
        same = hasattr(self, "_classifier")
        backbone = self._classifier.backbone if same else self._backbone(settings)
        tensors, where = load(files["prompts.safetensors"]), "what was fitted"
        return classifier_of(settings, tensors, backbone, task, where, own_names)

    def __getstate__(self) -> dict[str, Any]:
        """Parameters and the run's files; the backbone is loaded again, not pickled."""
        return {k: v for k, v in super().__getstate__().items() if k != "_classifier"}


# Kept between fits: a grid search loads it once.
_load_backbone = lru_cache(maxsize=2)(load_backbone)
# Settings that are parameters.
_OWN = frozenset(PromptClassifier().get_params()) - {"class_names", "settings", "verbose"}


def _free() -> frozenset[str]:
    """Other settings, that the way images are given leaves open."""
    given = {"dataset", "root", "domain", "class_names", "classes", "support_set", "memory_budget",
             "strict"}  # fmt: skip
    return frozenset(all_fields()) - _OWN - given


def _classes(y: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct labels in sorted order, and the place of each image's among them."""
    labels = column_or_1d(np.asarray(y), warn=True)
    check_classification_targets(labels)
    if len(labels) != count:
        raise InputError(f"{count} images, but {len(labels)} labels; give one for each")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise InputError(f"y has one class, {classes[0]!r}; give images of two or more classes")
    return classes, codes


def _names(given: Any, classes: np.ndarray) -> tuple[str, ...]:
    """What prompts call the classes."""
    names = labels = classes.tolist()
    if isinstance(given, Mapping):
        if missing := [label for label in labels if label not in given]:
            raise InputError(f"class_names has no name for label {missing[0]!r}; add it")
        names = [given[label] for label in labels]
    elif given is not None and len(names := given) != len(labels):
        what = f"class_names lists {len(given)} names, but y has {len(labels)} classes"
        raise InputError(f"{what}; list one for each, in sorted order of labels")
    called = tuple(map(str, names))
    check_class_names(called, "labels" if given is None else "class_names")
    return called


def _located(images: Sequence[Any], item: Item) -> Item:
    """The item with the absolute path of its image, where it is a file."""
    value = images[int(item.path)]
    value = value[0] if isinstance(value, tuple) and len(value) == 2 else value
    is_file = isinstance(value, str | Path)
    return replace(item, path=str(Path(value).absolute())) if is_file else item


def _json(classes: np.ndarray) -> list[Any] | None:
    """Labels for a JSON record, None where it cannot hold them."""
    labels = classes.tolist()
    return labels if all(isinstance(label, str | int | float) for label in labels) else None
