"""A run ready to answer: its classifier, and the support images to compare photos with."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dapt.clip.known import STAND_IN
from dapt.data import ImageStore
from dapt.engine.classifier import Classifier
from dapt.engine.data import task_of
from dapt.engine.evaluate import encode_store
from dapt.errors import UserError
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.run.load import known_support, load_classifier
from dapt.run.records import ForecastRecord
from dapt.settings import backbone_name

# What the model makes of a view: probabilities (C,), and cosines with the n support images (n,).
Answer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Support:
    """The images that a run was tuned on, as its model sees them."""

    class_names: tuple[str, ...]  # of each image; several have commas between
    features: Tensor  # (n, D), normalised
    pictures: tuple[bytes, ...]  # n JPEG files, of 160 px a side at most


@dataclass(frozen=True)
class Served:
    """A classifier and what is shown beside its answers."""

    name: str  # of the run, as that of its
    method: str
    backbone: str
    classifier: Classifier
    support: Support | None  # where the run has support images to show
    forecast: ForecastRecord | None = None  # how well it is expected to do, where that is known
    warning: str = ""  # of its backbone, if there is one

    @property
    def thresholds(self) -> Tensor | None:
        """(C,) from which a label is named, where an image may have several."""
        return self.classifier.thresholds

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order."""
        return self.classifier.class_names

    def answers(self, views: Sequence[np.ndarray]) -> list[Answer]:
        """Classify views (S, S, 3) in one batch."""
        batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
        with torch.inference_mode():
            features = self.classifier.encode(batch)
            probabilities = self.classifier.probabilities(self.classifier.logits(features).cpu())
            cosines = torch.empty(len(views), 0)
            if self.support is not None:
                cosines = features.cpu() @ self.support.features.T
        return list(zip(probabilities, cosines, strict=True))


def load_served(
    run: RunDirectory,
    *,
    device: str | None = None,
    nearest: bool = True,
    reporter: Reporter | None = None,
) -> Served:
    """Load a finished run to answer with, on another device than its own if one is given.

    If ``nearest``, its support images are encoded too; where they are not to be had, that is said.
    Those of a run that `PromptClassifier` saved never are: their paths may lead anywhere on this
    machine, and whoever made the run must not choose what a server shows of it. Nor are others than
    those it was tuned on, by content. Errors are those of `load_classifier`.
    """
    reporter, support = reporter or Reporter(), None
    classifier, told = load_classifier(run, device=device), None
    classifier.text_features()  # made once, here rather than at the first request
    if run.finished:  # or else it was imported, or saved by Python
        try:
            told = run.read_metrics().forecast
        except UserError as error:
            reporter.say(f"without what to expect: {error}")
    if nearest:
        try:
            support = _support(run, classifier, reporter)
        except UserError as error:
            reporter.say(f"without nearest support images: {error}")
    name, settings = run.name, run.read_settings()
    warning = f"{STAND_IN}." if run.stands_in() else ""
    about = (name, settings.method, backbone_name(settings))
    return Served(*about, classifier, support, told, warning)


def _support(run: RunDirectory, classifier: Classifier, reporter: Reporter) -> Support:
    """The images that a run's support set lists, encoded with its prompts."""
    task = task_of(run.read_settings())
    items = known_support(run, task).train
    pictures: list[bytes] = []

    def encode(views: Tensor) -> Tensor:
        for view in views.permute(0, 2, 3, 1).numpy():
            image, file = Image.fromarray(np.ascontiguousarray(view)), io.BytesIO()
            image.thumbnail((160, 160))
            image.save(file, "JPEG", quality=85)
            pictures.append(file.getvalue())
        return classifier.encode(views)

    paths, how = map(task.image_path, items), classifier.of_views()
    with reporter.stage("support images", len(items)) as advance:
        store = ImageStore([*paths], **how)
        features = encode_store(encode, store, batch_size=32, advance=advance)
    names = tuple(", ".join(task.class_names[k] for k in item.labels) for item in items)
    return Support(names, features, tuple(pictures))
