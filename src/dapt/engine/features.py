"""Features of images, and what runs on one backbone have in common, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dapt.clip.backbone import Backbone
from dapt.clip.image import image_features
from dapt.clip.known import Each
from dapt.clip.sources import load_backbone
from dapt.data import Allowance, ImageStore, Item, SupportSet, Task
from dapt.data.items import by_label
from dapt.engine.classifier import Classifier
from dapt.engine.data import Data
from dapt.errors import UserError
from dapt.methods.losses import class_prototypes
from dapt.progress import Advance, Reporter, nothing
from dapt.settings import Settings

# Images named in warnings; the record of a run has them all.
_NAMED = 5


def backbone_of(
    settings: Settings, *, device: str | None = None, revision: Each = None
) -> Backbone:
    """Load the backbone that settings name, on another device than theirs if one is given.

    Of a hub's repository the commit ``revision``, which a run was tuned on, in place of the latest;
    of several models, each one's.
    """
    how: dict[str, Any] = {"device": device or settings.device, "precision": settings.precision}
    return load_backbone(settings.backbone, settings.pretrained, revision=revision, **how)


def chunks(count: int, size: int) -> list[list[int]]:
    """Indices 0 .. count-1 in order, ``size`` at a time."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def encode_store(
    encode: Callable[[Tensor], Tensor],
    store: ImageStore,
    *,
    batch_size: int = 100,
    advance: Advance = nothing,
    unreadable: dict[int, str] | None = None,
) -> Tensor:
    """Run ``encode`` on the test views of every image in ``store``: (n, D) in fp32 on the CPU.

    Rows of images that ``unreadable`` comes to name (see `ImageStore.batches`) mean nothing;
    without it, such an image is a `UserError`.
    """
    features = []
    with torch.inference_mode():
        for views in store.batches(chunks(len(store), batch_size), unreadable=unreadable):
            features.append(encode(views))
            advance(len(views))
    # Copied from the device once, not batch by batch, each of which would wait for it. A clone is
    # an ordinary tensor, which later gradient computations may use.
    found = torch.cat(features).cpu().clone()
    require_finite(found, "image features")
    return found


def require_finite(values: Tensor, what: str) -> None:
    """Raise `UserError` where a model gives what is no number: nothing can be told from it."""
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the model's {what} are not finite numbers; its weights are damaged, its precision "
            "is too low for them, or tuning diverged (train again with a smaller lr)"
        )


@dataclass(frozen=True)
class Encoded:
    """Images as (n, D) features, without those that could not be read; ``skipped`` records them."""

    items: tuple[Item, ...]
    features: Tensor
    skipped: list[dict[str, str]]

    classes: int | None = None  # C, where images may have several labels

    @property
    def labels(self) -> Tensor:
        """(n,), or (n, C) of 0 and 1 where images may have several."""
        return labels_of(self.items, self.classes)


def labels_of(items: Sequence[Item], classes: int | None = None) -> Tensor:
    """Labels (n,) of images, or (n, C) of 0 and 1 where they may have several of C classes."""
    if classes is None:
        return torch.tensor([item.label for item in items])
    found = torch.zeros(len(items), classes)
    for row, item in zip(found, items, strict=True):
        row[list(item.labels)] = 1
    return found


def classes_if_several(task: Task) -> int | None:
    """C of a task whose images may have several labels, else None."""
    return len(task.class_names) if task.multilabel else None


@dataclass(frozen=True)
class Support:
    """A support set as its backbone sees it with nothing learned; the same for every method.

    ``drawn`` is the set without the images that cannot be read, which ``skipped`` records.
    """

    drawn: SupportSet
    skipped: list[dict[str, str]]
    store: ImageStore
    labels: Tensor  # as of `Encoded`
    features: Tensor  # (n, D), normalised, on the CPU
    prototypes: Tensor  # (C, D)

    def features_of(
        self, classifier: Classifier, settings: Settings, *, looks: bool = True
    ) -> Tensor:
        """(n, D), as a classifier sees the images: in all its looks, or in one."""
        looks = looks and classifier.looks > 1
        if not (classifier.changes_images or looks):
            return self.features
        encode = classifier.encode if looks else classifier.image_features
        return encode_store(encode, self.store, batch_size=settings.eval_batch_size)


@dataclass
class _Images:
    store: ImageStore
    # By batch size, as with another one they may round otherwise, and number of looks.
    features: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)


class Shared:
    """Decoded images and frozen features of one backbone, kept between runs.

    Zero-shot CLIP, the probe and CoOp evaluate on the same image features, and every method starts
    from the same prototypes; a grid of runs hands one of these to all of them. What is kept never
    changes a result, to the bit.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._known: dict[tuple, _Images] = {}  # the last used comes last
        self._allowance = Allowance(0)

    def store(self, task: Task, items: tuple[Item, ...], settings: Settings) -> ImageStore:
        """The images of ``items``, decoded as the backbone wants them."""
        return self._images(task, items, settings).store

    def encode(
        self,
        task: Task,
        items: tuple[Item, ...],
        settings: Settings,
        classifier: Classifier | None = None,
        *,
        what: str = "test",
        reporter: Reporter | None = None,
    ) -> Encoded:
        """Normalised features of ``items`` as the bare backbone, or a classifier, sees them.

        Images that cannot be read are left out, and told as ``what`` they are.

        Raises:
            UserError: an image cannot be read, and settings are strict or none can.
        """
        images, reporter = self._images(task, items, settings), reporter or Reporter()
        size, looks = settings.eval_batch_size, 1 if classifier is None else classifier.looks
        plain = partial(image_features, self.backbone)
        encode = plain if classifier is None or looks == 1 else classifier.encode
        features = images.features.get((size, looks))
        if own := classifier is not None and classifier.changes_images:
            encode, features = classifier.encode, None
        if features is None:
            bad = None if settings.strict else images.unreadable
            with reporter.stage(f"{what} images", len(items)) as advance:
                features = encode_store(
                    encode, images.store, batch_size=size, advance=advance, unreadable=bad
                )
        if not own:
            images.features[size, looks] = features
        if not (bad := images.unreadable):
            return Encoded(items, features, [], classes_if_several(task))
        first = bad[min(bad)]
        if settings.strict:
            raise UserError(first)
        if len(bad) == len(items):
            more = f" (nor any other of its {len(items):,} {what} images)" if len(items) > 1 else ""
            raise UserError(f"{first}{more}")
        for index in sorted(bad)[:_NAMED]:
            reporter.warn(f"{bad[index]}; skipped")
        reporter.warn(
            f"{len(bad):,} of {len(items):,} {what} images cannot be read and are skipped; "
            "the metrics name them, and --strict makes them an error"
        )
        kept = [i for i in range(len(items)) if i not in bad]
        skipped = [{"image": items[i].path, "reason": bad[i]} for i in sorted(bad)]
        left = tuple(items[i] for i in kept)
        return Encoded(left, features[kept], skipped, classes_if_several(task))

    def support(self, data: Data, settings: Settings, reporter: Reporter) -> Support:
        """The support images as the backbone sees them, and class prototypes from that.

        Raises:
            UserError: an image cannot be read, and settings are strict or its class has no other.
        """
        task, drawn = data.task, data.support
        found = self.encode(task, drawn.train, settings, what="support", reporter=reporter)
        left, reasons = by_label(found.items), {s["image"]: s["reason"] for s in found.skipped}
        for item in drawn.train:
            for label in item.labels:
                if label not in left:
                    name = task.class_names[label]
                    lost = f"no support image of class '{name}' can be read"
                    raise UserError(f"{reasons[item.path]}: {lost}")
        return Support(
            replace(drawn, train=found.items),
            found.skipped,
            self.store(task, found.items, settings),
            found.labels,
            found.features,
            class_prototypes(found.features, labels_of(found.items), len(task.class_names)),
        )

    def _images(self, task: Task, items: tuple[Item, ...], settings: Settings) -> _Images:
        sources = tuple(task.source(item) for item in items)
        allowance, crop_min = self._allowance, settings.crop_min
        allowance.limit = int(settings.memory_budget * 2**30)
        # Of a picture in memory, that very object is meant, which may not be hashable.
        own: dict[str, Any] = {"crop_min": crop_min, "grey": task.grey}
        key = (tuple(s if isinstance(s, Path) else id(s) for s in sources), *own.values())
        if (wanted := self._known.pop(key, None)) is None:
            views = self.backbone.preprocessing.of_views()
            wanted = _Images(ImageStore(sources, **views, **own, allowance=allowance))
        self._known[key] = wanted
        # Those wanted now get at least half; the oldest go first. Features are small and stay.
        for known in self._known.values():
            if known is not wanted and allowance.used > allowance.limit / 2:
                known.store.forget()
        return wanted
